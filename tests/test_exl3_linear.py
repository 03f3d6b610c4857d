"""Linears that stay packed: against the decoded weights, alone and as parts of a model."""

import pytest
import torch
from test_cuda_host import random_layer
from tiny_models import save_tiny
from tiny_quants import convert, save_model

from exl3 import ops, reference
from exl3.errors import UserError
from exl3.evaluate.stream import stream_logits
from exl3.format.codebook import CODEBOOKS
from exl3.format.layer import decode_layer
from exl3.model.exl3_linear import Exl3Linear
from exl3.model.quantized import QuantizedCheckpoint, open_model, runs_packed
from exl3.model.streamed import StreamedModel


def stored(codebook: str, bits: int, bias: bool = True) -> dict[str, torch.Tensor]:
    """A (256, 128) layer's tensors."""
    names = ("trellis", "suh", "svh")
    tensors = dict(zip(names, random_layer(256, 128, bits), strict=True))
    if CODEBOOKS[codebook].marker is not None:
        tensors[codebook] = CODEBOOKS[codebook].marker
    return tensors | ({"bias": torch.linspace(-1, 1, 128).half()} if bias else {})


def close(y: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return (y.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_forward_is_that_of_the_decoded_weight(codebook, dtype):
    tensors = stored(codebook, 3)
    weight = decode_layer(tensors).double()
    linear = Exl3Linear(tensors, 256, 128)
    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = linear(x)
    assert (y.dtype, y.shape) == (dtype, (2, 5, 128))
    expected = x.double() @ weight + tensors["bias"].double()
    assert close(y, expected, {torch.float32: 1e-6, torch.float16: 1e-3}.get(dtype, 4e-3))


def test_padding_is_cut_off():
    tensors = stored("mul1", 4)
    weight = decode_layer(tensors)[:200, :100]
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    y = Exl3Linear(tensors, 200, 100)(x)
    assert y.shape == (3, 100)
    assert close(y, (x @ weight + tensors["bias"][:100].float()).double(), 1e-6)


def test_no_rows():
    assert Exl3Linear(stored("mul1", 4), 256, 128)(torch.zeros(0, 7, 256)).shape == (0, 7, 128)


def test_it_holds_what_is_stored():
    tensors = stored("mcg", 2)
    held = Exl3Linear(tensors, 256, 128).state_dict()
    assert held.keys() == tensors.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in tensors.items())


def test_old_signs_and_contradictions():
    tensors = stored("3inst", 2, bias=False)
    signs = torch.tensor([-0x8000 + 5] * 16, dtype=torch.int16)
    old = {"trellis": tensors["trellis"], "su": signs, "svh": tensors["svh"]}
    x = torch.randn(2, 256)
    expected = (x @ decode_layer(old)).double()
    assert close(Exl3Linear(old, 256, 128)(x), expected, 1e-6)
    with pytest.raises(UserError, match="svh"):
        Exl3Linear(tensors | {"svh": torch.ones(256).half()}, 256, 128)


def test_wide_layers_are_decoded_in_panels(monkeypatch):
    trellis, suh, svh = random_layer(128, 512, 2)
    x = torch.randn(3, 128)
    whole = ops.linear(x, trellis, suh, svh, "mcg")
    monkeypatch.setattr(reference, "PANEL_WEIGHTS", 128 * 48)
    assert close(ops.linear(x, trellis, suh, svh, "mcg"), whole.double(), 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 128)}, "shape"),
        ({"x": torch.zeros(2, 256, dtype=torch.float64)}, "float32"),
        ({"suh": torch.zeros(256)}, "scales"),
        ({"codebook": "mcg2"}, "codebook"),
        ({"bias": torch.zeros(256).half()}, "scales"),
        ({"trellis": torch.zeros(16, 9, 64, dtype=torch.int16)}, "shape"),
    ],
)
def test_bad_arguments(change, message):
    trellis, suh, svh = random_layer(256, 128, 4)
    good = {"x": torch.zeros(2, 256), "trellis": trellis, "suh": suh, "svh": svh}
    good |= {"codebook": "mcg", "bias": None}
    with pytest.raises(ValueError, match=message):
        ops.linear(**(good | change))


@pytest.fixture(scope="module")
def quant(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    return convert(save_model(folder / "model"), folder / "quant", 3)


def logits(model: StreamedModel, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([part for _, part in stream_logits(model, ids)])


def test_model_of_packed_linears(quant):
    """The same logits but for the order of sums, from parts that never held a weight."""
    ids = torch.randint(250, (2, 24), generator=torch.Generator().manual_seed(0))
    source = QuantizedCheckpoint(quant)
    model = StreamedModel(quant, checkpoint=source, dtype=torch.float32, packed=source)
    assert torch.allclose(logits(model, ids), logits(open_model(quant), ids), atol=2e-4, rtol=1e-4)
    block = model.load_block(0)
    linears = [m for m in block.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 7
    assert all(m.weight.is_meta and "forward" in vars(m) for m in linears)
    model.free_block(0)
    assert not any("forward" in vars(m) for m in linears)


def test_cpu_and_originals_are_not_packed(quant, tmp_path):
    assert not runs_packed("cpu")
    save_tiny("llama", tmp_path)
    for folder in (quant, tmp_path):
        model = open_model(folder, packed=True)
        assert not any(m.weight.is_meta for m in model.load_block(0).modules()
                       if isinstance(m, torch.nn.Linear))  # fmt: skip
