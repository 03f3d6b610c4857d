"""Mixture-of-experts models, converted and read back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_architectures import check_layers, convert_at_eight_bits, logits_apart
from test_experts import experts
from test_fp8 import to_fp8, to_mxfp4
from test_verify import edit_json
from tiny_models import save_tiny, tiny_rows

from exl3.format.manifest import MANIFEST
from exl3.format.verify import verify
from exl3.model.quantized import open_model
from exl3.model.streamed import StreamedModel

SIZES = {"hidden_size": 128, "intermediate_size": 128, "vocab_size": 300}
TWO = {"num_hidden_layers": 2}
LINEAR = {**TWO, "layer_types": ["linear_attention", "full_attention"]}
# type → its number of experts, and blocks of both kinds where it has two. Every expert is asked by
# every token: where a choice is close, rounding anything turns it, and outputs are far apart.
KINDS = {
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 3},
    "qwen2_moe": {"num_experts": 3, "num_experts_per_tok": 3},
    "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 3},
    "minimax_m2": {"num_local_experts": 3, "num_experts_per_tok": 3},
    "deepseek_v3": {
        **{"n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 2, "topk_group": 2, **TWO}
    },
    "glm4_moe": {"n_routed_experts": 3, "num_experts_per_tok": 3, **TWO},
    "gpt_oss": {"num_local_experts": 3, "num_experts_per_tok": 3},
    "qwen3_next": {"num_experts": 2, "num_experts_per_tok": 2, **LINEAR},
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": {"num_experts": 2, "num_experts_per_tok": 2, **LINEAR},
}
DTYPES = {"qwen3_next": torch.bfloat16}  # the others: float32


def save_small(kind: str, folder: Path, **sizes: object) -> Path:
    return save_tiny(kind, folder, **{"num_hidden_layers": 1, **SIZES, **KINDS[kind], **sizes})


def layer_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """The layers of a quant: name → (in, out)."""
    model = StreamedModel(folder)
    linears = dict([model.head()])
    for i in range(model.num_blocks):
        linears |= model.block_linears(i)
    return {name: (linear.in_features, linear.out_features) for name, linear in linears.items()}


def plain_keys(folder: Path, layers: dict[str, tuple[int, int]]) -> set[str]:
    """The tensors of the model that belong to no layer."""
    keys = StreamedModel(folder).checkpoint.keys()
    return {key for key in keys if key.rpartition(".")[0] not in layers}


# Much like the others, or long.
SLOW = {"qwen2_moe", "qwen3_moe", "glm4_moe", "deepseek_v3"}
SLOW |= {"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A small model of a type and its quant at 8 bits, made once: never to be touched."""
    made: dict[str, tuple[Path, Path]] = {}

    def convert(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            base = tmp_path_factory.mktemp(kind)
            made[kind] = base / "model", base / "quant"
            save_small(kind, base / "model", dtype=DTYPES.get(kind, torch.float32))
            convert_at_eight_bits(*made[kind])
        return made[kind]

    return convert


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] * (k in SLOW)) for k in KINDS]
)
def test_a_quant_of_eight_bits_is_nearly_the_model(converted, all_tiles, kind):
    folder, quant = converted(kind)
    layers = layer_shapes(folder)
    plain = plain_keys(folder, layers)
    if kind == "minimax_m2":
        plain.add("model.layers.0.block_sparse_moe.gate.e_score_correction_bias")
    check_layers(quant, layers, plain)
    assert logits_apart(folder, quant, tiny_rows(2, 12)) < 0.05
    assert verify(quant).problems == []


def test_the_layers_of_gpt_oss_are_named_as_readers_want_them(converted):
    _, quant = converted("gpt_oss")
    stored = set(load_file(quant / "model.safetensors"))
    for name in experts("model.layers.0.mlp.experts", 3):
        leaves = {key.removeprefix(f"{name}.") for key in stored if key.startswith(f"{name}.")}
        assert leaves == {"trellis", "suh", "svh", "mul1", "bias"}
    assert not any(key.endswith(("gate_up_proj", "gate_up_proj_bias")) for key in stored)
    assert {"model.layers.0.mlp.router.weight", "model.layers.0.self_attn.sinks"} <= stored


# -- Tensors that stay ---------------------------------------------------------------------------


@pytest.mark.slow
def test_dtypes_of_what_is_not_quantized(converted):
    _, quant = converted("qwen3_next")
    tensors = load_file(quant / "model.safetensors")
    half = ["mlp.gate.weight", "mlp.shared_expert_gate.weight", "linear_attn.in_proj_ba.weight"]
    half += ["linear_attn.conv1d.weight", "linear_attn.A_log", "linear_attn.dt_bias"]
    for leaf in half:
        assert tensors[f"model.layers.0.{leaf}"].dtype == torch.float16
    for leaf in ("input_layernorm.weight", "linear_attn.norm.weight"):
        assert tensors[f"model.layers.0.{leaf}"].dtype == torch.bfloat16


def save_biased(folder: Path) -> torch.Tensor:
    """A tiny MiniMax-M2 whose choice of experts is biased; returns the bias of its block."""
    save_small("minimax_m2", folder, num_local_experts=5, num_experts_per_tok=2)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    bias = torch.tensor([3.0, -2.0, 0.25, 1.5, 0.0])
    tensors["model.layers.0.block_sparse_moe.e_score_correction_bias"] = bias
    save_file(tensors, path, {"format": "pt"})
    return bias


def test_the_bias_of_minimax_is_where_either_reader_looks(tmp_path):
    folder, quant = tmp_path / "model", tmp_path / "quant"
    bias = save_biased(folder)
    convert_at_eight_bits(folder, quant)
    tensors = load_file(quant / "model.safetensors")
    prefix = "model.layers.0.block_sparse_moe"
    for key in ("e_score_correction_bias", "gate.e_score_correction_bias"):
        assert torch.equal(tensors[f"{prefix}.{key}"], bias.half())
    storage = json.loads((quant / "quantization_config.json").read_text())["tensor_storage"]
    assert f"{prefix}.gate.e_score_correction_bias" in storage[f"{prefix}.gate"]["stored_tensors"]
    assert open_model(quant).dropped_keys == [f"{prefix}.gate.e_score_correction_bias"]
    assert verify(quant).problems == []
    # It counts when the quant is read: without it the model is another one.
    apart = logits_apart(folder, quant, tiny_rows(2, 12))
    tensors[f"{prefix}.e_score_correction_bias"].neg_()
    save_file(tensors, quant / "model.safetensors", {"format": "pt"})
    assert logits_apart(folder, quant, tiny_rows(2, 12)) > 3 * apart


# -- Experts without tokens ----------------------------------------------------------------------


def test_an_expert_that_no_token_meets(tmp_path):
    folder, quant = tmp_path / "model", tmp_path / "quant"
    save_biased(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.block_sparse_moe.e_score_correction_bias"][4] = -1000.0
    save_file(tensors, path, {"format": "pt"})
    convert_at_eight_bits(folder, quant)
    assert verify(quant).problems == []
    source, ours = (open_model(place).checkpoint for place in (folder, quant))
    for name in ("w1", "w2", "w3"):
        key = f"model.layers.0.block_sparse_moe.experts.4.{name}.weight"
        weight = source.tensor(key)
        ours.expect(key, tuple(weight.shape))
        assert float((ours.tensor(key) - weight).norm() / weight.norm()) < 0.05


# -- Sources that are quantized ------------------------------------------------------------------


def test_a_quant_of_an_fp8_source(tmp_path):
    folder, quant = tmp_path / "fp8", tmp_path / "quant"
    save_small("minimax_m2", folder)
    to_fp8(folder, tmp_path / "plain")
    before = json.loads((folder / "config.json").read_text())
    convert_at_eight_bits(folder, quant)
    after = json.loads((quant / "config.json").read_text())
    quantization = after.pop("quantization_config")
    assert quantization["quant_method"] == "exl3"
    assert quantization["original_quantization_config"] == before.pop("quantization_config")
    assert after == before
    stored = load_file(quant / "model.safetensors")
    assert not any(key.endswith("_scale_inv") for key in stored)
    assert not any(tensor.dtype == torch.float8_e4m3fn for tensor in stored.values())
    assert verify(quant).problems == []
    assert logits_apart(tmp_path / "plain", quant, tiny_rows(2, 12)) < 0.05


@pytest.mark.slow
def test_a_quant_of_an_mxfp4_source(tmp_path):
    folder, quant = tmp_path / "mxfp4", tmp_path / "quant"
    save_small("gpt_oss", folder)
    to_mxfp4(folder, tmp_path / "plain")
    convert_at_eight_bits(folder, quant)
    assert verify(quant).problems == []
    assert logits_apart(tmp_path / "plain", quant, tiny_rows(2, 12)) < 0.05


# -- Verified ------------------------------------------------------------------------------------


def test_experts_of_one_kind_have_one_k(converted, tmp_path):
    """Readers run them together; shared experts and other kinds may differ."""
    quant = shutil.copytree(converted("qwen2_moe")[1], tmp_path / "quant")
    path = quant / "model.safetensors"
    tensors = load_file(path)
    (quant / MANIFEST).unlink()

    def halve(name: str) -> None:
        trellis = tensors[f"{name}.trellis"]
        tensors[f"{name}.trellis"] = trellis[..., :64].contiguous()
        storage = quant / "quantization_config.json"
        entry = {"shape": [*trellis.shape[:2], 64], "n_bytes": trellis.nbytes // 2}
        entry["dtype"] = "torch.int16"

        def change(config):
            module = config["tensor_storage"][name]
            module["stored_tensors"][f"{name}.trellis"] = entry
            module["bits_per_weight"] = 4

        edit_json(storage, change)
        save_file(tensors, path, {"format": "pt"})

    def found() -> list[str]:
        problems = verify(quant, hashes=False).problems
        return [problem for problem in problems if "bits, but the decoder's" not in problem]

    halve("model.layers.0.mlp.shared_expert.up_proj")
    assert found() == []
    halve("model.layers.0.mlp.experts.2.up_proj")
    (problem,) = found()
    kind, first = "model.layers.0.mlp.experts.*.up_proj", "model.layers.0.mlp.experts.0.up_proj"
    assert problem.startswith(f"the experts {kind} do not have the same bits and codebook ({first}")
    assert "experts.2.up_proj: 4 bits mul1" in problem
