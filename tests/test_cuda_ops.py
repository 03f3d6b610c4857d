"""The CUDA kernels on a GPU, against the reference and the format's golden vectors."""

import pytest
import torch
from safetensors.torch import load_file
from shared_files import shared
from test_cuda_host import expected_linear, random_layer, relative
from test_ops import ALL_BITS, SCALES, assert_legal, gaussian, mse

from exl3 import ops, reference
from exl3.evaluate.stream import stream_logits
from exl3.format.codebook import CODEBOOKS
from exl3.format.layer import decode_layer
from exl3.model.exl3_linear import Exl3Linear
from exl3.model.quantized import open_model

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.skipif(not ops.HAVE_GPU_KERNELS, reason="the GPU's kernels are not built"),
]
GPU = torch.device("cuda")


def on_gpu(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if t is None else t.to(GPU) for t in tensors]


def same_bits(x: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(x.cpu().view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_decode_trellis_is_exact(codebook, bits):
    for rows, columns in ((128, 128), (80, 48), (16, 272), (1024, 512)):
        trellis, _, _ = random_layer(rows, columns, bits)
        expected = reference.decode_trellis(trellis, codebook, 1)
        assert same_bits(ops.decode_trellis(trellis.to(GPU), codebook), expected)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_decode_trellis_against_golden(codebook):
    golden = load_file(shared("format/golden.safetensors"))
    for bits in ALL_BITS:
        trellis, inner = (golden[f"{codebook}.k{bits}.{leaf}"] for leaf in ("trellis", "inner"))
        assert same_bits(ops.decode_trellis(trellis.to(GPU), codebook), inner)


def test_decode_trellis_of_a_view_and_of_nothing():
    trellis, _, _ = random_layer(256, 384, 5)
    expected = reference.decode_trellis(trellis[:, 3:20].contiguous(), "mcg", 1)
    assert same_bits(ops.decode_trellis(trellis.to(GPU)[:, 3:20], "mcg"), expected)
    empty = torch.empty(0, 4, 64, dtype=torch.int16, device=GPU)
    assert ops.decode_trellis(empty, "mcg").shape == (0, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_decode_weight(codebook, dtype):
    for bits in ALL_BITS:
        layer = random_layer(256, 384, bits)
        weight = ops.decode_weight(*on_gpu(*layer), codebook, dtype)
        expected = reference.decode_weight(*layer, codebook, torch.float32, 1)
        assert weight.dtype == dtype
        assert relative(weight.cpu(), expected) < (1e-6 if dtype == torch.float32 else 3e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_hadamard_128(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, 384, generator=generator).to(dtype)
    before, after = (torch.randn(384, generator=generator).half() for _ in range(2))
    for scales in ((None, None), (before, None), (None, after), (before, after)):
        y = ops.hadamard_128(x.to(GPU), *on_gpu(*scales))
        assert (y.dtype, y.shape) == (dtype, x.shape)
        expected = reference.hadamard_128(x.float(), *scales, 1)
        assert relative(y.cpu(), expected) < (1e-6 if dtype == torch.float32 else 3e-4)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_linear(codebook, bits):
    """Few rows in one kernel, many through W_hat; float32 through W_hat always."""
    for rows, inputs, outputs in ((1, 1024, 128), (8, 128, 384), (11, 640, 256), (32, 256, 128),
                                  (33, 256, 128), (200, 512, 128)):  # fmt: skip
        layer = random_layer(inputs, outputs, bits, rows)
        generator = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, inputs, generator=generator)
        bias = torch.randn(outputs, generator=generator).half()
        half = ops.linear(x.half().to(GPU), *on_gpu(*layer), codebook, bias.to(GPU))
        assert relative(half.cpu(), expected_linear(x.half(), *layer, codebook, bias)) < 5e-4
        full = ops.linear(x.to(GPU), *on_gpu(*layer), codebook, bias.to(GPU))
        assert relative(full.cpu(), expected_linear(x, *layer, codebook, bias)) < 5e-6


def test_linear_with_slices_of_many_chunks():
    layer = random_layer(1024, 65 * 128, 2)
    x = torch.randn(9, 1024, generator=torch.Generator().manual_seed(1)).half()
    y = ops.linear(x.to(GPU), *on_gpu(*layer), "mcg")
    assert relative(y.cpu(), expected_linear(x, *layer, "mcg")) < 5e-4


def test_results_do_not_change_from_call_to_call():
    layer = on_gpu(*random_layer(2048, 512, 4))
    x = torch.randn(16, 2048, generator=torch.Generator().manual_seed(1)).half().to(GPU)
    first = ops.linear(x, *layer, "mul1")
    assert all(torch.equal(ops.linear(x, *layer, "mul1"), first) for _ in range(20))


def test_another_stream():
    layer = on_gpu(*random_layer(256, 128, 4))
    x = torch.randn(4, 256, device=GPU).half()
    expected = ops.linear(x, *layer, "mul1")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        assert torch.equal(ops.linear(x, *layer, "mul1"), expected)


def test_errors_are_sentences():
    trellis, suh, svh = on_gpu(*random_layer(256, 128, 4))
    x = torch.zeros(2, 256, device=GPU).half()
    with pytest.raises(RuntimeError, match="suh is on cpu"):
        torch.ops.exl3.fused_linear(x, trellis, suh.cpu(), svh, None, "mcg", 1)
    with pytest.raises(RuntimeError, match="x may have 32 rows"):
        torch.ops.exl3.fused_linear(x.repeat(17, 1), trellis, suh, svh, None, "mcg", 1)
    with pytest.raises(RuntimeError, match="unknown codebook"):
        torch.ops.exl3.decode_trellis(trellis, "mcg2", 1)


def test_exl3_linear():
    tensors = dict(zip(("trellis", "suh", "svh"), random_layer(256, 128, 3), strict=True))
    weight = decode_layer(tensors).double()
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    linear = Exl3Linear(tensors, 256, 128).to(GPU)
    assert relative(linear(x.to(GPU)).cpu(), x.double() @ weight) < 2e-6


def test_model_runs_packed(tiny):
    """A quant on the GPU keeps its linears packed and gives the logits that it has on the CPU."""
    ids = torch.randint(250, (2, 24), generator=torch.Generator().manual_seed(0))
    model = open_model(tiny.quants[1], device=GPU, packed=True)
    found = torch.cat([part.cpu() for _, part in stream_logits(model, ids)])
    expected = torch.cat([part for _, part in stream_logits(open_model(tiny.quants[1]), ids)])
    assert torch.allclose(found, expected, atol=1e-3, rtol=1e-3)
    before = torch.cuda.memory_allocated()
    block = model.load_block(0)
    assert all(m.weight.is_meta for m in block.modules() if isinstance(m, torch.nn.Linear))
    assert torch.cuda.memory_allocated() - before < 200 << 10  # decoded it is three times that
    model.free_block(0)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_encode_tiles(codebook, bits):
    """Legal circles, as good as the CPU's, and the same whatever tiles come beside them."""
    tiles = gaussian(512, SCALES[codebook][bits - 1], bits)
    values, states = ops.encode_tiles(tiles.to(GPU), bits, codebook)
    assert_legal(values.cpu(), states.cpu(), bits, codebook)
    on_cpu, _ = ops.encode_tiles(tiles, bits, codebook)
    assert mse(values.cpu(), tiles) < 1.001 * mse(on_cpu, tiles)
    again = ops.encode_tiles(tiles[5:12].to(GPU), bits, codebook)[1]
    assert torch.equal(again, states[5:12])
