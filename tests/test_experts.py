"""Mixture-of-experts models: streamed bit for bit, with a linear for every expert."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_streamed_model import (
    assert_same,
    change_tensors,
    one_by_one,
    rewrite_config,
    stock_model,
    streamed_logits,
)
from tiny_models import BLOCKS, HIDDEN, save_tiny, tiny_rows
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import use_experts_implementation

from exl3 import parallel
from exl3.errors import UserError
from exl3.model.capture import capture_inputs
from exl3.model.checkpoint import Checkpoint
from exl3.model.experts import ExpertCheckpoint, LinearExperts, Stack, find_experts, restack
from exl3.model.streamed import StreamedModel

KINDS = [
    *("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
    *("minimax_m2", "deepseek_v3", "glm4_moe", "gpt_oss", "granitemoe"),
]
ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
LATENT = {f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")}
MLP = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(autouse=True)
def one_thread():
    with parallel.one_thread_per_op():
        yield


def eager_logits(folder: Path, rows: list[torch.Tensor], dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation="eager"
    )
    for parameter in model.parameters():
        # Some lie where they were in their file, and products with one row round by the address.
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        return [model(row, use_cache=False).logits for row in rows]


def experts(prefix: str, count: int, names=MLP) -> set[str]:
    return {f"{prefix}.{e}.{name}" for e in range(count) for name in names}


# -- Streamed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_logits_equal_those_of_eager_experts(tmp_path, kind, tied):
    save_tiny(kind, tmp_path, tied=tied, shard_size="100KB")
    # A row alone, too: an expert with one token takes another way through a product.
    rows = [tiny_rows(1, 16, seed=1), tiny_rows(3, 9, seed=2), tiny_rows(1, 1, seed=3)]
    theirs = eager_logits(tmp_path, rows)
    assert theirs[0].std() > 0.5  # else equality would say little
    model = StreamedModel(tmp_path)
    assert model.tied_head == tied
    assert model.dropped_keys == []
    assert_same(streamed_logits(model, rows, one_by_one), theirs)


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_in_bfloat16_as_well(tmp_path, kind):
    save_tiny(kind, tmp_path, dtype=torch.bfloat16)
    rows = [tiny_rows(2, 12)]
    theirs = eager_logits(tmp_path, rows, dtype=torch.bfloat16)
    assert_same(streamed_logits(StreamedModel(tmp_path), rows, one_by_one), theirs)


def test_threads_may_ask_the_same_experts(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "_THREADS", 4)
    save_tiny("qwen2_moe", tmp_path)
    rows = [tiny_rows(1, 16, seed=seed) for seed in range(12)]
    ours = streamed_logits(StreamedModel(tmp_path), rows, parallel.each)
    assert_same(ours, eager_logits(tmp_path, rows))


# -- Which linears there are ---------------------------------------------------------------------

# block → its linears, as readers of EXL3 look for them
LINEARS = {
    "mixtral": {0: ATTENTION | experts("block_sparse_moe.experts", 5, ("w1", "w2", "w3"))},
    "minimax_m2": {0: ATTENTION | experts("block_sparse_moe.experts", 5, ("w1", "w2", "w3"))},
    "qwen2_moe": {
        0: ATTENTION | experts("mlp.experts", 5) | {f"mlp.shared_expert.{name}" for name in MLP}
    },
    "qwen3_moe": {
        0: ATTENTION | experts("mlp.experts", 5),
        1: ATTENTION | {f"mlp.{name}" for name in MLP},
    },
    "qwen3_next": {
        0: {"linear_attn.in_proj_qkvz", "linear_attn.out_proj"}
        | experts("mlp.experts", 5)
        | {f"mlp.shared_expert.{name}" for name in MLP},
        1: ATTENTION | experts("mlp.experts", 5) | {f"mlp.shared_expert.{name}" for name in MLP},
    },
    "qwen3_5_text": {
        0: {f"linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z", "out_proj")}
        | {f"mlp.{name}" for name in MLP}
    },
    "deepseek_v3": {
        0: LATENT | {f"mlp.{name}" for name in MLP},
        1: LATENT | experts("mlp.experts", 4) | {f"mlp.shared_experts.{name}" for name in MLP},
    },
    "glm4_moe": {
        0: ATTENTION | {f"mlp.{name}" for name in MLP},
        1: ATTENTION | experts("mlp.experts", 4) | {f"mlp.shared_experts.{name}" for name in MLP},
    },
    "gpt_oss": {0: ATTENTION | experts("mlp.experts", 4)},
}


@pytest.mark.parametrize("kind", LINEARS)
def test_linears_are_those_that_readers_want(tmp_path, kind):
    model = StreamedModel(save_tiny(kind, tmp_path))
    for i, names in LINEARS[kind].items():
        assert set(model.block_linears(i)) == {f"model.layers.{i}.{name}" for name in names}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_a_saved_model_has_a_key_for_every_expert(tmp_path, kind):
    """So the models above are what downloads are, and every weight is its tensor."""
    tensors = load_file(save_tiny(kind, tmp_path) / "model.safetensors")
    model = StreamedModel(tmp_path)
    model.load_block(2)
    linears = model.block_linears(2)
    assert sum("experts." in key for key in linears) >= 12
    for key, linear in linears.items():
        assert torch.equal(linear.weight, tensors[f"{key}.weight"])


def test_experts_and_their_linears(tmp_path):
    model = StreamedModel(save_tiny("mixtral", tmp_path))
    ((name, module),) = model.block_experts(1).items()
    assert name == "mlp.experts"
    assert module.num_experts == 5
    linears = model.block_linears(1)
    key = "model.layers.1.block_sparse_moe.experts.3"
    roles = {"gate": "w1", "up": "w3", "down": "w2"}
    assert module.linears(3).keys() == roles.keys()
    for role, leaf in roles.items():
        assert module.linears(3)[role] is linears[f"{key}.{leaf}"]


def test_dense_blocks_have_no_experts(tmp_path):
    model = StreamedModel(save_tiny("deepseek_v3", tmp_path))
    assert [list(model.block_experts(i)) for i in range(BLOCKS)] == [[], *[["mlp.experts"]] * 2]


def test_what_an_expert_is_given_is_captured(tmp_path):
    """Gate and up share their input, and each expert sees its own tokens."""
    model = StreamedModel(save_tiny("qwen3_moe", tmp_path))
    model.load_embedding()
    model.load_block(0)
    ids = tiny_rows(2, 12)
    linears = model.block_linears(0)
    _, groups = capture_inputs(model, 0, linears, ids, None)
    module = model.block_experts(0)["mlp.experts"]
    seen = {group.names: group.inputs for group in groups}
    tokens = 0
    for names, x in seen.items():
        if names[0].endswith("gate_proj"):
            e = int(names[0].split(".")[-2])
            prefix = f"model.layers.0.mlp.experts.{e}"
            assert names == (f"{prefix}.gate_proj", f"{prefix}.up_proj")
            with torch.no_grad():
                assert torch.equal(module.hidden(e, x), seen[(f"{prefix}.down_proj",)])
            tokens += len(x)
    assert tokens == 2 * ids.numel()  # two experts a token


# -- Every kind of experts class -----------------------------------------------------------------


def stacked(
    gate: bool = True,
    bias: bool = False,
    transposed: bool = False,
    concatenated: bool = True,
    norm: bool = False,
    **extra: nn.Module,
) -> nn.Module:
    """Five stock experts of a kind, (hidden 8, intermediate 6), with random weights."""

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = 5
            self.act_fn = nn.SiLU()
            first = "gate_up_proj" if gate else "up_proj"
            for name, sizes in ((first, (12 if gate else 6, 8)), ("down_proj", (8, 6))):
                weight = torch.randn(5, *(sizes[::-1] if transposed else sizes))
                setattr(self, name, nn.Parameter(weight))
                if bias:
                    setattr(self, f"{name}_bias", nn.Parameter(torch.randn(5, sizes[0])))
            for name, module in extra.items():
                setattr(self, name, module)

        def _apply_gate(self, gate_up):
            parts = (gate_up[..., ::2], gate_up[..., 1::2])
            a, b = gate_up.chunk(2, -1) if concatenated else parts
            return self.act_fn(a) * (b + 1)

        def forward(self, x, index, weights):
            raise NotImplementedError

    decorated = use_experts_implementation(
        Experts,
        has_gate=gate,
        has_bias=bias,
        is_transposed=transposed,
        is_concatenated=concatenated,
        has_post_expert_norm=norm,
    )
    config = SimpleNamespace(_experts_implementation="batched_mm")  # transformers' own sum
    return decorated(config).requires_grad_(False)


KINDS_OF_CLASS = [
    {},
    {"gate": False},
    {"gate": False, "bias": True},
    {"bias": True},
    {"transposed": True},
    {"concatenated": False},
    {"transposed": True, "bias": True, "concatenated": False},  # gpt-oss
    {"transposed": True, "bias": True},
    {"transposed": True, "gate": False},
]


@pytest.mark.parametrize("kind", KINDS_OF_CLASS, ids=str)
def test_any_kind_of_experts_class(tmp_path, kind):
    """Cut from stacks in a file, linears compute what the class does by another algorithm."""
    torch.manual_seed(0)
    model = nn.Module()
    model.experts = stacked(**kind)
    x = torch.randn(7, 8)
    index = torch.stack([torch.randperm(5)[:2] for _ in x])
    weights = torch.rand(7, 2)
    theirs = model.experts(x, index, weights)
    stacks = {f"experts.{name}": value.data for name, value in model.experts.named_parameters()}
    save_file(stacks, tmp_path / "model.safetensors")

    assert list(find_experts(model)) == ["experts"]
    names = {"gate": "w1", "up": "w3", "down": "w2"}
    source = split(Checkpoint(tmp_path), model.experts, names)
    module = LinearExperts(model.experts, names)
    module.load_state_dict(
        {key.removeprefix("experts."): source.tensor(key) for key in source.keys()}  # noqa: SIM118
    )
    torch.testing.assert_close(module(x, index, weights), theirs, rtol=1e-5, atol=1e-5)
    assert ("gate" in module.linears(0)) == kind.get("gate", True)
    inner = module.hidden(2, x)
    assert inner.shape == (7, 6)


def split(checkpoint: Checkpoint, module: nn.Module, names: dict[str, str]) -> ExpertCheckpoint:
    from exl3.model.experts import find_stack

    stacks = {
        key: find_stack(module, key.removeprefix("experts."), key, key, names)
        for key in checkpoint.keys()  # noqa: SIM118
    }
    return ExpertCheckpoint(checkpoint, stacks)


def test_numbers_beyond_the_last_expert_stand_for_none():
    torch.manual_seed(0)
    module = LinearExperts(stacked(), {"gate": "g", "up": "u", "down": "d"})
    for parameter in module.parameters():
        parameter.data.normal_()
    x, weights = torch.randn(3, 8), torch.ones(3, 2)
    index = torch.tensor([[0, 1], [0, 5], [5, 5]])
    with torch.no_grad():
        y = module(x, index, weights)
        alone = module(x[:1], torch.tensor([[0]]), weights[:1, :1])
        one = module.linears(0)["down"](module.hidden(0, x[1:2]))
    assert torch.equal(y[2], torch.zeros(8))
    torch.testing.assert_close(y[1:2], one)
    assert not torch.equal(y[0], alone[0])  # expert 1 counts as well


@pytest.mark.parametrize(
    "kind", [{"norm": True, "post_expert_norm": nn.LayerNorm(8)}, {"act_fn": nn.PReLU()}]
)
def test_experts_with_tensors_of_another_kind_are_no_linears(kind):
    model = nn.Module()
    model.experts = stacked(**kind)
    assert find_experts(model) == {}


# -- Stacks in a checkpoint ----------------------------------------------------------------------


def test_the_parts_of_gpt_oss(tmp_path):
    tensors = load_file(save_tiny("gpt_oss", tmp_path) / "model.safetensors")
    model = StreamedModel(tmp_path)
    checkpoint = model.checkpoint
    prefix = "model.layers.1.mlp.experts"
    gate_up, bias = tensors[f"{prefix}.gate_up_proj"], tensors[f"{prefix}.gate_up_proj_bias"]
    for e in range(4):
        for offset, name in enumerate(("gate_proj", "up_proj")):
            key = f"{prefix}.{e}.{name}"
            assert torch.equal(checkpoint.tensor(f"{key}.weight"), gate_up[e, :, offset::2].T)
            assert torch.equal(checkpoint.tensor(f"{key}.bias"), bias[e, offset::2])
            assert checkpoint.shape(f"{key}.weight") == (96, HIDDEN)
            assert checkpoint.shape(f"{key}.bias") == (96,)
        key = f"{prefix}.{e}.down_proj"
        assert torch.equal(checkpoint.tensor(f"{key}.weight"), tensors[f"{prefix}.down_proj"][e].T)
        assert torch.equal(checkpoint.tensor(f"{key}.bias"), tensors[f"{prefix}.down_proj_bias"][e])
    shown = set(checkpoint.keys())
    assert not {f"{prefix}.gate_up_proj", f"{prefix}.down_proj_bias"} & shown
    assert sum(checkpoint.nbytes(key) for key in shown) == sum(t.nbytes for t in tensors.values())
    key = f"{prefix}.0.up_proj.weight"
    checkpoint.tensor(key).zero_()  # the caller's own
    assert checkpoint.tensor(key).any()
    assert checkpoint.file(key) == "model.safetensors"
    assert checkpoint.dtype(key) == torch.float32
    assert checkpoint.fingerprint() == Checkpoint(tmp_path).fingerprint()


@pytest.mark.parametrize("kind", ["gpt_oss", "granitemoe", "qwen3_5_moe_text"])
def test_parts_make_the_stacks_they_were_cut_from(tmp_path, kind):
    save_tiny(kind, tmp_path)
    stock = stock_model(tmp_path)
    checkpoint = StreamedModel(tmp_path).checkpoint
    parts = {key: checkpoint.tensor(key) for key in checkpoint.keys()}  # noqa: SIM118
    stacks = {key: t for key, t in restack(parts, stock).items() if ".experts." in key}
    theirs = {key: t for key, t in stock.state_dict().items() if ".experts." in key}
    assert stacks.keys() == theirs.keys()
    assert all(torch.equal(stacks[key], theirs[key]) for key in theirs)


def stack_experts(folder: Path) -> None:
    """As some models are published: stacks of all experts, under transformers' names."""
    state = stock_model(folder).state_dict()

    def change(tensors):
        for key in [key for key in tensors if ".experts." in key]:
            del tensors[key]
        tensors |= {key: state[key].clone() for key in state if ".experts." in key}

    change_tensors(folder, change)


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen3_5_moe_text"])
def test_stacks_of_a_type_that_is_mostly_published_in_parts(tmp_path, kind):
    save_tiny(kind, tmp_path)
    rows = [tiny_rows(2, 12)]
    theirs = eager_logits(tmp_path, rows)
    stack_experts(tmp_path)
    model = StreamedModel(tmp_path)
    assert "model.layers.2.mlp.experts.gate_up_proj" in Checkpoint(tmp_path).keys()  # noqa: SIM118
    assert "model.layers.2.mlp.experts.4.up_proj" in model.block_linears(2)
    assert_same(streamed_logits(model, rows, one_by_one), theirs)


def test_a_stack_under_a_name_of_its_own_gets_the_models_name(tmp_path):
    model = StreamedModel(save_tiny("granitemoe", tmp_path))
    assert "model.layers.0.block_sparse_moe.experts.1.down_proj" in model.block_linears(0)


def test_an_odd_stack_is_measured_by_the_model():
    stack = Stack("p", ("gate", "up"), {"gate": "g", "up": "u"}, "weight", (2, 6, 4), False, False)
    assert [key for key, *_ in stack.parts()] == [
        f"p.{e}.{name}.weight" for e in (0, 1) for name in "gu"
    ]
    assert stack.part_shape() == (3, 4)


# -- Contradictions ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("mixtral", {"num_local_experts": 6}, r"gate\.weight is \(5, 64\), but .*\(6, 64\)"),
        ("mixtral", {"num_local_experts": 4}, r"experts\.4\.w\d\.weight belongs to no expert"),
        ("mixtral", {"intermediate_size": 95}, r"is \(96, 64\), but by config\.json .*\(95, 64\)"),
        ("mixtral", {"num_local_experts": 10**9}, "asks for 1000000000 experts"),
        ("gpt_oss", {"num_local_experts": 5}, r"experts\.\w+ is \(4, .* it is \(5, "),
        ("gpt_oss", {"num_local_experts": 10**9}, r"is \(4, .* it is \(1000000000, "),
        ("gpt_oss", {"intermediate_size": 95}, r"is \(4, 96, 64\), but .*\(4, 95, 64\)"),
        ("qwen3_moe", {"moe_intermediate_size": 33}, r"is \(64, 32\), but by .*\(64, 33\)"),
    ],
)
def test_a_config_that_contradicts_the_tensors(tmp_path, kind, values, message):
    rewrite_config(save_tiny(kind, tmp_path), **values)
    with pytest.raises(UserError, match=message):
        StreamedModel(tmp_path)


def test_an_expert_that_is_missing(tmp_path):
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    save_tiny("mixtral", tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.experts\.3\.w2\.weight is in no file"):
        StreamedModel(tmp_path)


def test_an_expert_too_many(tmp_path):
    name = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    save_tiny("mixtral", tmp_path)
    change_tensors(
        tmp_path, lambda tensors: tensors.update({name.format(5): tensors[name.format(4)].clone()})
    )
    with pytest.raises(UserError, match=r"experts\.5\.w2\.weight belongs to no expert"):
        StreamedModel(tmp_path)


def test_experts_of_blocks_that_are_not_the_models_are_left_out(tmp_path):
    """As those of an MTP block behind the last one."""
    save_tiny("glm4_moe", tmp_path)
    key = "model.layers.2.mlp.experts.0.up_proj.weight"
    more = key.replace("layers.2", f"layers.{BLOCKS}")
    change_tensors(tmp_path, lambda tensors: tensors.update({more: tensors[key].clone()}))
    assert StreamedModel(tmp_path).dropped_keys == [more]
