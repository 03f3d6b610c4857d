"""Sources that are published quantized: FP8 with blocks of factors, and MXFP4."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_experts import eager_logits
from test_streamed_model import (
    assert_same,
    change_tensors,
    one_by_one,
    rewrite_config,
    streamed_logits,
)
from tiny_models import save_tiny, tiny_rows
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from exl3 import parallel
from exl3.errors import UserError
from exl3.model.checkpoint import Checkpoint
from exl3.model.dequantized import Fp8Checkpoint, Mxfp4Checkpoint
from exl3.model.quantized import open_model
from exl3.model.streamed import StreamedModel

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
BLOCK = (32, 48)  # which divides none of the sizes of a tiny model


@pytest.fixture(autouse=True)
def one_thread():
    with parallel.one_thread_per_op():
        yield


def quantize_blocks(
    weight: torch.Tensor, block: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The float8 weight, its factors, and what both are worth, block by block."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    worth = torch.empty(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            scales[i, j] = weight[part].abs().max() / 448
            codes[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
            worth[part] = codes[part].float() * scales[i, j]
    return codes, scales, worth


def to_fp8(folder: Path, plain: Path, block: tuple[int, int] = BLOCK) -> int:
    """Turns the tiny model of `folder` into FP8, and writes what that is worth to `plain`."""
    tensors = load_file(folder / "model.safetensors")
    quantized, worth = {}, {}
    for key, tensor in tensors.items():
        leaf = key.split(".")[-2]
        if tensor.dim() == 2 and leaf not in ("gate", "embed_tokens", "lm_head"):
            scale = f"{key}_scale_inv"
            quantized[key], quantized[scale], worth[key] = quantize_blocks(tensor, block)
        else:
            quantized[key] = worth[key] = tensor
    plain.mkdir()
    (plain / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(worth, plain / "model.safetensors", {"format": "pt"})
    save_file(quantized, folder / "model.safetensors", {"format": "pt"})
    rewrite_config(folder, quantization_config={**FP8, "weight_block_size": list(block)})
    return len(quantized) - len(tensors)


@pytest.mark.parametrize("kind", ["minimax_m2", "deepseek_v3", "llama"])
def test_an_fp8_model_is_what_its_blocks_are_worth(tmp_path, kind):
    folder, plain = tmp_path / "fp8", tmp_path / "plain"
    save_tiny(kind, folder)
    assert to_fp8(folder, plain) > 20
    rows = [tiny_rows(2, 12)]
    model = StreamedModel(folder)
    assert_same(streamed_logits(model, rows, one_by_one), eager_logits(plain, rows))
    assert model.dropped_keys == []
    assert not any(key.endswith("_scale_inv") for key in model.checkpoint.keys())  # noqa: SIM118
    assert model.checkpoint.fingerprint() == Checkpoint(folder).fingerprint()


def test_an_original_in_fp8_is_evaluated_as_any_other(tmp_path):
    folder, plain = tmp_path / "fp8", tmp_path / "plain"
    save_tiny("minimax_m2", folder)
    to_fp8(folder, plain)
    rows = [tiny_rows(1, 7)]
    ours, theirs = (streamed_logits(open_model(path), rows, one_by_one) for path in (folder, plain))
    assert_same(ours, theirs)


@pytest.mark.parametrize("shape", [(128, 128), (130, 257), (1, 1), (256, 3)])
def test_blocks_at_the_ends_may_be_ragged(tmp_path, shape):
    torch.manual_seed(0)
    codes, scales, worth = quantize_blocks(torch.randn(shape), (128, 128))
    save_file({"x": codes, "x_scale_inv": scales}, tmp_path / "model.safetensors")
    source = Fp8Checkpoint(Checkpoint(tmp_path), (128, 128))
    assert list(source.keys()) == ["x"]
    assert source.dtype("x") == torch.float32
    assert source.shape("x") == shape
    assert source.nbytes("x") == codes.nbytes + scales.nbytes
    assert torch.equal(source.tensor("x"), worth)


def test_a_stack_in_fp8(tmp_path):
    torch.manual_seed(0)
    parts = [quantize_blocks(torch.randn(70, 50), (32, 32)) for _ in range(3)]
    codes, scales, worth = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    save_file({"x": codes, "x_scale_inv": scales}, tmp_path / "model.safetensors")
    source = Fp8Checkpoint(Checkpoint(tmp_path), (32, 32))
    assert torch.equal(source.tensor("x"), worth)
    for e in range(3):
        assert torch.equal(source.matrix("x", e), worth[e])


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_factor_for_a_tensor(tmp_path, shape):
    codes = torch.randn(2, 3, 5).to(torch.float8_e4m3fn)
    tensors = {
        "x.weight": codes,
        "x.weight_scale_inv": torch.full(shape, 0.5),
        "x.activation_scale": torch.ones(()),
        "y.activation_scale": torch.ones(()),  # of a plain tensor: who knows what it is
        "y.weight": torch.ones(3),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    source = Fp8Checkpoint(Checkpoint(tmp_path), None)
    assert set(source.keys()) == {"x.weight", "y.weight", "y.activation_scale"}
    assert torch.equal(source.tensor("x.weight"), codes.float() / 2)
    assert torch.equal(source.matrix("x.weight", 1), codes[1].float() / 2)
    assert torch.equal(source.tensor("y.weight"), torch.ones(3))
    assert source.dtype("y.weight") == torch.float32


@pytest.mark.parametrize(
    ("scales", "block", "message"),
    [
        (None, (32, 32), r"x is float8, but x_scale_inv is in no file"),
        ((2, 3), (32, 32), r"x_scale_inv is \(2, 3\), but .* it is \(2, 2\)"),
        ((2, 2), None, r"x_scale_inv is \(2, 2\), but .* it is one number"),
        ((), (32, 32), r"x_scale_inv is \(\), but .* it is \(2, 2\)"),
    ],
)
def test_factors_that_do_not_fit(tmp_path, scales, block, message):
    tensors = {"x": torch.zeros(64, 64).to(torch.float8_e4m3fn)}
    if scales is not None:
        tensors["x_scale_inv"] = torch.ones(scales)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        Fp8Checkpoint(Checkpoint(tmp_path), block)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**FP8, "weight_block_size": [128]}, r"weight_block_size .* \[128\], not two sizes"),
        ({**FP8, "weight_block_size": [0, 128]}, "not two sizes"),
        ({**FP8, "weight_block_size": "all"}, "not two sizes"),
        ({**FP8, "weight_block_size": [64, 128]}, r"_scale_inv is \(\d, \d\), but by weight_block"),
        ({"quant_method": "awq", "bits": 4}, r"already quantized \(awq\); give the folder"),
        ({"quant_method": "exl3"}, r"already quantized \(exl3\)"),
        ({"bits": 4}, r"already quantized \(None\)"),
    ],
)
def test_what_a_config_may_not_say(tmp_path, values, message):
    folder = save_tiny("minimax_m2", tmp_path / "fp8")
    to_fp8(folder, tmp_path / "plain")
    rewrite_config(folder, quantization_config=values)
    with pytest.raises(UserError, match=message):
        StreamedModel(folder)


def test_a_tensor_of_another_shape_is_named_as_ever(tmp_path):
    folder = save_tiny("minimax_m2", tmp_path / "fp8")
    to_fp8(folder, tmp_path / "plain")
    rewrite_config(folder, intermediate_size=95)
    with pytest.raises(UserError, match=r"is \(\d+, \d+\), but by config\.json it is"):
        StreamedModel(folder)


# -- MXFP4 ---------------------------------------------------------------------------------------


def to_mxfp4(folder: Path, plain: Path) -> None:
    """Gives the tiny gpt-oss of `folder` random experts in MXFP4; what they are worth, by
    transformers, is written to `plain`."""
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(folder / "model.safetensors")
    packed, worth = {}, {}
    for key, tensor in tensors.items():
        if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed[key] = worth[key] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        shape = (experts, outputs, inputs // 32)
        blocks = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(120, 127, shape, dtype=torch.uint8, generator=generator)
        packed |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        worth[key] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    plain.mkdir()
    (plain / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(worth, plain / "model.safetensors", {"format": "pt"})
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    rewrite_config(folder, quantization_config={"quant_method": "mxfp4"})


def test_a_gpt_oss_as_it_is_published(tmp_path):
    folder, plain = tmp_path / "mxfp4", tmp_path / "plain"
    save_tiny("gpt_oss", folder)
    to_mxfp4(folder, plain)
    rows = [tiny_rows(2, 12)]
    model = StreamedModel(folder)
    assert_same(streamed_logits(model, rows, one_by_one), eager_logits(plain, rows))
    worth = load_file(plain / "model.safetensors")
    key = "model.layers.0.mlp.experts"
    for e in range(4):
        weight = model.checkpoint.tensor(f"{key}.{e}.down_proj.weight")
        assert torch.equal(weight.float(), worth[f"{key}.down_proj"][e].T)
    stacks = Mxfp4Checkpoint(Checkpoint(folder))
    for name in ("down_proj", "gate_up_proj"):
        assert torch.equal(stacks.tensor(f"{key}.{name}").float(), worth[f"{key}.{name}"])
        assert stacks.dtype(f"{key}.{name}") == torch.bfloat16
    sizes = (file.stat().st_size for file in folder.glob("*.safetensors"))
    assert 0 < sum(sizes) - sum(map(stacks.nbytes, stacks.keys())) < 20_000  # the header


def test_a_config_that_contradicts_mxfp4(tmp_path):
    folder = save_tiny("gpt_oss", tmp_path / "mxfp4")
    to_mxfp4(folder, tmp_path / "plain")
    stacks = Mxfp4Checkpoint(Checkpoint(folder))
    key = "model.layers.1.mlp.experts.down_proj"
    stacks.expect(key, (4, 96, 64))
    with pytest.raises(UserError, match=rf"{key} is \(4, 96, 64\) once .* it is \(4, 64, 64\)"):
        stacks.expect(key, (4, 64, 64))
    rewrite_config(folder, num_local_experts=3)
    with pytest.raises(UserError, match=r"is \(4, .* but by config\.json it is \(3, "):
        StreamedModel(folder)


def test_damaged_mxfp4(tmp_path):
    folder = save_tiny("gpt_oss", tmp_path / "mxfp4")
    to_mxfp4(folder, tmp_path / "plain")
    key = "model.layers.1.mlp.experts.down_proj_scales"
    change_tensors(folder, lambda tensors: tensors.update({key: tensors[key][:, :-1].clone()}))
    with pytest.raises(UserError, match=r"down_proj_blocks .* are not a weight in MXFP4"):
        StreamedModel(folder)
