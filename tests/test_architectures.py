"""Every supported kind of model: streamed bit for bit, converted, and read back."""

import json
from pathlib import Path

import pytest
import torch
from jobs_helpers import flags, run
from safetensors.torch import load_file, save_file
from test_streamed_model import (
    assert_same,
    change_tensors,
    one_by_one,
    stock_logits,
    streamed_logits,
)
from tiny_models import (
    VOCAB,
    save_tiny,
    save_tiny_gemma3_with_vision,
    save_tokenizer,
    tiny_rows,
)

from exl3 import parallel
from exl3.errors import UserError
from exl3.format.layer import padded
from exl3.model import skeleton, streamed
from exl3.model.capture import capture_inputs
from exl3.model.checkpoint import Checkpoint
from exl3.model.fused import SplitCheckpoint
from exl3.model.quantized import open_model
from exl3.model.streamed import StreamedModel

FUSED = ["phi3", "glm", "glm4"]
KINDS = [
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "cohere", "cohere2"),
    *("olmo", "olmo2", "olmo3", "granite", "smollm3", *FUSED),
]
TIED = {"gemma2", "gemma3_text", "cohere", "cohere2", "granite", "smollm3"}  # as they are published
TWO_BLOCKS = {"gemma2", "gemma3_text", "cohere2", "olmo3", "smollm3"}  # two kinds of blocks
# What differs from those that stay is tested as it is streamed.
SLOW = {
    "qwen2",
    "mistral",
    "gemma3_text",
    "cohere2",
    "olmo",
    "olmo2",
    "olmo3",
    "granite",
    "smollm3",
}
SIZES = {"hidden_size": 128, "intermediate_size": 128, "vocab_size": 300}


@pytest.fixture(autouse=True)
def one_thread():
    with parallel.one_thread_per_op():
        yield


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


# -- Streamed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_logits_equal_the_stock_models(tmp_path, monkeypatch, kind, tied):
    """Fused linears are left whole here: parts of a product may round in another way."""
    monkeypatch.setattr(streamed, "split_linears", lambda *_: {})
    save_tiny(kind, tmp_path, tied=tied)
    rows = [tiny_rows(1, 16, seed=1), tiny_rows(2, 9, seed=2)]
    theirs = stock_logits(tmp_path, rows)
    assert theirs[0].std() > 0.5  # else equality would say little
    model = StreamedModel(tmp_path)
    assert model.tied_head == tied
    assert model.head()[0] == "lm_head"
    assert_same(streamed_logits(model, rows, one_by_one), theirs)


@pytest.mark.parametrize("kind", FUSED)
def test_split_linears_compute_what_the_fused_ones_do(tmp_path, kind):
    save_tiny(kind, tmp_path, shard_size="60KB")
    rows = [tiny_rows(2, 12)]
    (theirs,) = stock_logits(tmp_path, rows)
    (ours,) = streamed_logits(StreamedModel(tmp_path), rows, one_by_one)
    assert apart(ours, theirs) < 1e-6


def test_the_text_part_of_a_multimodal_gemma3(tmp_path):
    save_tiny_gemma3_with_vision(tmp_path)
    rows = [tiny_rows(2, 12) % (VOCAB - 3)]  # no image tokens
    model = StreamedModel(tmp_path)
    assert_same(streamed_logits(model, rows, one_by_one), stock_logits(tmp_path, rows))
    assert model.head()[0] == "language_model.lm_head"  # beside language_model.model
    assert "language_model.model.layers.1.mlp.up_proj" in model.block_linears(1)


# -- Fused linears -------------------------------------------------------------------------------


def test_parts_of_fused_linears_share_what_enters_them(tmp_path):
    model = StreamedModel(save_tiny("phi3", tmp_path))
    model.load_embedding()
    model.load_block(0)
    _, groups = capture_inputs(model, 0, model.block_linears(0), tiny_rows(2, 5), None)
    leaves = [[name.rpartition(".")[2] for name in group.names] for group in groups]
    attention, mlp = [["q_proj", "k_proj", "v_proj"], ["o_proj"]], [["gate_proj", "up_proj"]]
    assert leaves == [*attention, *mlp, ["down_proj"]]


def test_parts_are_the_rows_of_the_fused_tensor(tmp_path):
    fused = load_file(save_tiny("phi3", tmp_path) / "model.safetensors")
    model = StreamedModel(tmp_path)
    model.load_block(1)
    linears = model.block_linears(1)
    for prefix, name, parts in (
        ("self_attn", "qkv_proj", ("q_proj", "k_proj", "v_proj")),
        ("mlp", "gate_up_proj", ("gate_proj", "up_proj")),
    ):
        found = [linears[f"model.layers.1.{prefix}.{part}"].weight for part in parts]
        assert torch.equal(torch.cat(found), fused[f"model.layers.1.{prefix}.{name}.weight"])


def test_a_split_checkpoint(tmp_path):
    weight, bias = torch.arange(32.0).reshape(8, 4).half(), torch.arange(8.0)
    tensors = {
        "a.qkv_proj.weight": weight,
        "a.qkv_proj.bias": bias,
        "b.norm.weight": bias[:3].clone(),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    whole = Checkpoint(tmp_path)
    split = SplitCheckpoint(whole, {"qkv_proj": {"q_proj": 4, "k_proj": 2, "v_proj": 2}})
    parts = [f"a.{name}_proj" for name in "qkv"]
    assert set(split.keys()) == {
        *(f"{part}.{leaf}" for part in parts for leaf in ("weight", "bias")),
        "b.norm.weight",
    }
    for leaf, tensor in (("weight", weight), ("bias", bias)):
        keys = [f"{part}.{leaf}" for part in parts]
        split.tensor(keys[0]).zero_()  # the caller's own
        assert torch.equal(torch.cat([split.tensor(key) for key in keys]), tensor)
        assert [split.shape(key) for key in keys] == [(n, *tensor.shape[1:]) for n in (4, 2, 2)]
        assert {split.dtype(key) for key in keys} == {tensor.dtype}
        assert sum(split.nbytes(key) for key in keys) == whole.nbytes(f"a.qkv_proj.{leaf}")
    assert torch.equal(split.tensor("b.norm.weight"), bias[:3])
    assert split.file("a.k_proj.weight") == "model.safetensors"
    assert split.fingerprint() == whole.fingerprint()
    with pytest.raises(UserError, match=r"a\.qkv_proj\.weight is \(8, 4\), but .* \(8, 5\)"):
        split.expect("a.k_proj.weight", (2, 5))


def test_a_fused_tensor_of_another_size(tmp_path):
    save_tiny("phi3", tmp_path)
    name = "model.layers.1.mlp.gate_up_proj.weight"
    change_tensors(tmp_path, lambda tensors: tensors.update({name: tensors[name][:-2].clone()}))
    with pytest.raises(UserError, match=r"gate_proj\.weight is in no file"):
        StreamedModel(tmp_path)


def test_a_fused_linear_whose_rows_are_mixed_stays(tmp_path):
    model = StreamedModel(save_tiny("codegen", tmp_path))
    assert "transformer.h.0.attn.qkv_proj" in model.block_linears(0)
    rows = [tiny_rows(2, 12)]
    assert_same(streamed_logits(model, rows, one_by_one), stock_logits(tmp_path, rows))


# -- Converted and read back ---------------------------------------------------------------------


def layer_shapes(config: dict) -> dict[str, tuple[int, int]]:
    """A quant's layers as readers look for them: name → (in, out)."""
    hidden, inner, heads = (
        config[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")
    )
    size = config.get("head_dim") or hidden // heads
    query, key = heads * size, config["num_key_value_heads"] * size
    block = {
        "self_attn.q_proj": (hidden, query),
        "self_attn.k_proj": (hidden, key),
        "self_attn.v_proj": (hidden, key),
        "self_attn.o_proj": (query, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    count = config["num_hidden_layers"]
    layers = {f"model.layers.{i}.{name}": block[name] for i in range(count) for name in block}
    return {**layers, "lm_head": (hidden, config["vocab_size"])}


def check_layers(folder: Path, layers: dict[str, tuple[int, int]], plain: set[str]) -> None:
    """The folder holds these layers at 8 bits, and besides them and their biases `plain`."""
    tensors = load_file(folder / "model.safetensors")
    storage = json.loads((folder / "quantization_config.json").read_text())["tensor_storage"]
    assert {name for name, module in storage.items() if "quant_format" in module} == layers.keys()
    assert {key for module in storage.values() for key in module["stored_tensors"]} == set(tensors)
    for name, (rows, columns) in layers.items():
        rows, columns = padded(rows), padded(columns)
        leaves = {"trellis": (rows // 16, columns // 16, 128), "suh": (rows,), "svh": (columns,)}
        for leaf, shape in leaves.items():
            assert tensors.pop(f"{name}.{leaf}").shape == shape
        assert tensors.pop(f"{name}.mul1").numel() == 1
        if (bias := tensors.pop(f"{name}.bias", None)) is not None:
            assert bias.shape == (columns,)
    assert set(tensors) == plain


def logits_apart(folder: Path, quant: Path, rows: torch.Tensor) -> float:
    theirs, ours = (
        streamed_logits(open_model(path), [rows], one_by_one)[0] for path in (folder, quant)
    )
    return apart(ours, theirs)


def convert_at_eight_bits(folder: Path, quant: Path) -> None:
    save_tokenizer(folder)
    work = folder.with_name("work")
    run(*flags(folder, quant, work, "8", **{"-hb": 8, "-cr": 16, "--check_rows": 0}))


def is_plain(key: str) -> bool:
    """Whether a checkpoint's tensor belongs to no layer that is quantized."""
    return "_proj." not in key and not key.startswith("lm_head.")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in KINDS]
)
def test_a_quant_of_eight_bits_is_nearly_the_model(tmp_path, kind):
    folder, quant = tmp_path / "model", tmp_path / "quant"
    blocks = 2 if kind in TWO_BLOCKS else 1
    save_tiny(kind, folder, tied=kind in TIED, num_hidden_layers=blocks, **SIZES)
    convert_at_eight_bits(folder, quant)
    config = json.loads((folder / "config.json").read_text())
    written = json.loads((quant / "config.json").read_text())
    assert written.pop("quantization_config")["quant_method"] == "exl3"
    assert written == config
    source = load_file(folder / "model.safetensors")
    check_layers(quant, layer_shapes(config), {key for key in source if is_plain(key)})
    assert logits_apart(folder, quant, tiny_rows(2, 12)) < 0.05


def test_a_quant_of_a_multimodal_gemma3(tmp_path):
    folder, quant = tmp_path / "model", tmp_path / "quant"
    save_tiny_gemma3_with_vision(folder, num_hidden_layers=2, **SIZES)
    convert_at_eight_bits(folder, quant)
    config = json.loads((folder / "config.json").read_text())["text_config"]
    layers = {f"language_model.{name}": shape for name, shape in layer_shapes(config).items()}
    source = load_file(folder / "model.safetensors")
    text = "language_model.model.layers."
    plain = {key for key in source if is_plain(key) or not key.startswith(text)}
    check_layers(quant, layers, plain)  # the vision tower is kept as it is
    assert logits_apart(folder, quant, tiny_rows(2, 12)) < 0.05


# -- Refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("jetmoe", r"several matrices in one tensor \(0\.mlp\.input_linear\.weight\)"),
        ("llama4_text", r"several matrices in one tensor \(0\.feed_forward\.experts\.gate_up_proj"),
        ("mamba", "recurrent model"),
        ("rwkv", "recurrent model"),
        ("bamba", "recurrent model"),
        ("gpt2", "no linear layers"),
        ("glm_moe_dsa", r"hand on which tokens to attend to \(indexer_types\)"),
    ],
)
def test_what_is_refused(tmp_path, kind, message):
    save_tiny(kind, tmp_path)
    with pytest.raises(UserError, match=message):
        StreamedModel(tmp_path)


@pytest.mark.parametrize(("name", "shape"), [("many", (2, 4, 4)), ("experts.w1", (8, 4))])
def test_stacks_under_any_name_are_refused(tmp_path, name, shape):
    """DBRX has its experts in two dimensions."""
    model = StreamedModel(save_tiny("llama", tmp_path))
    around, leaf = f"mlp.{name}".rsplit(".", 1)
    blocks = model._blocks
    if around != "mlp":
        blocks[1].mlp.experts = torch.nn.Module()
    blocks[1].get_submodule(around).register_parameter(leaf, torch.nn.Parameter(torch.ones(shape)))
    with pytest.raises(UserError, match=rf"several matrices in one tensor \(1\.mlp\.{name}\)"):
        skeleton.refuse_unsupported(model._model, blocks, tmp_path)
