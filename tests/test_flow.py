"""The order of data in a block, and where the residual stream is seen before its writers."""

import pytest
import torch
from tiny_models import save_tiny, tiny_rows

from exl3 import parallel
from exl3.jobs.block import Block
from exl3.model.flow import Residual, Stage, find_flow
from exl3.model.streamed import StreamedModel

QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
OUT = "self_attn.o_proj"
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = "mlp.down_proj"
MIDDLE = "post_attention_layernorm"
ENTERING = Residual("", 1.0)  # what enters the block itself
BETWEEN = Residual(MIDDLE, 1.0)  # what enters the norm between attention and MLP


def llama(scale: float = 1.0) -> list[Stage]:
    return [
        Stage(QKV),
        Stage((OUT,), Residual("", scale)),
        Stage(GATE_UP),
        Stage((DOWN,), Residual(MIDDLE, scale)),
    ]


# Whatever else is added where experts' output is: they make up for what the whole block lacks.
EXPERTS = Stage(("mlp.experts",), Residual("", 1.0), experts=True)


def shared(module: str, gated: bool) -> list[Stage]:
    """A block of experts beside shared ones: these write where nothing but a sum is behind them."""
    gate_up = tuple(f"mlp.{module}.{name}_proj" for name in ("gate", "up"))
    return [
        Stage(gate_up),
        Stage((f"mlp.{module}.down_proj",), None if gated else BETWEEN),
        EXPERTS,
    ]


LATENT = [
    Stage(("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")),
    Stage(("self_attn.q_b_proj",)),
    Stage((OUT,), ENTERING),
]
ATTENTION = [Stage(QKV), Stage((OUT,), ENTERING)]
UNSEEN = [Stage(QKV), Stage((OUT,)), Stage(GATE_UP), Stage((DOWN,))]

FLOWS = {
    "llama": llama(),
    "phi3": llama(),  # its fused linears are split
    "granite": llama(0.7),  # its residual_multiplier
    # Norms behind the writers: what they add to the stream is no linear's output.
    "gemma2": UNSEEN,
    "olmo2": UNSEEN,
    "glm4": UNSEEN,
    # Attention and MLP side by side: the later of them takes the blame for both.
    "cohere": [Stage((*QKV, *GATE_UP)), Stage((OUT,)), Stage((DOWN,), ENTERING)],
    "gpt_neox": [
        Stage(("attention.query_key_value",)),
        Stage(("attention.dense",)),
        Stage(("mlp.dense_h_to_4h",)),
        Stage(("mlp.dense_4h_to_h",), ENTERING),
    ],
    # The residual is handed to attention and MLP, and added in there.
    "bloom": [
        Stage(("self_attention.query_key_value",)),
        Stage(("self_attention.dense",), ENTERING),
        Stage(("mlp.dense_h_to_4h",)),
        Stage(("mlp.dense_4h_to_h",), BETWEEN),
    ],
    "mixtral": [*ATTENTION, EXPERTS],
    "gpt_oss": [*ATTENTION, EXPERTS],
    "qwen2_moe": [*ATTENTION, *shared("shared_expert", gated=True)],
    "deepseek_v3": [*LATENT, *shared("shared_experts", gated=False)],
}


@pytest.fixture(autouse=True)
def one_thread():
    with parallel.one_thread_per_op():
        yield


def last_block(kind, folder, **sizes):
    """The last block of a tiny model as it is loaded, ids, and what enters it."""
    save_tiny(kind, folder, **sizes)
    model = StreamedModel(folder, dtype=torch.float32)
    model.load_embedding()
    ids, state = tiny_rows(2, 16), None
    for i in range(model.num_blocks - 1):
        model.load_block(i)
        state = model.run_block(i, ids, state)
        model.free_block(i)
    return Block.load(model, model.num_blocks - 1), ids, state


def flow(block, ids, state):
    """Its stages with names as they are in the block, experts last."""
    plain, experts = block.plain_linears(), block.experts
    stages = find_flow(block.model, block.i, block.module, plain, experts, ids, state)
    named = []
    for stage in sorted(stages, key=lambda stage: stage.experts):
        keys = tuple(key.removeprefix(f"{block.name}.") for key in stage.keys)
        named.append(Stage(keys, stage.residual, stage.experts))
    return named


@pytest.mark.parametrize("kind", FLOWS)
def test_stages_and_residuals(tmp_path, kind):
    assert flow(*last_block(kind, tmp_path, num_hidden_layers=2)) == FLOWS[kind]


def test_the_first_block_is_given_ids(tmp_path):
    assert flow(*last_block("llama", tmp_path, num_hidden_layers=1)) == llama()


def test_a_residual_is_what_the_writer_adds_to(tmp_path):
    """The stream at the place plus scale times the writer's output is the stream behind it."""
    block, ids, state = last_block("granite", tmp_path, num_hidden_layers=2)
    seen = {}
    for name in (MIDDLE, OUT, DOWN):
        module = block.module.get_submodule(name)
        module.register_forward_hook(
            lambda m, args, out, name=name: seen.update({name: (args[0].clone(), out.clone())})
        )
    output = block.model.run_block(block.i, ids, state)
    stages = {stage.keys[0]: stage for stage in flow(block, ids, state)}
    scale = stages[OUT].residual.scale
    assert torch.allclose(state + scale * seen[OUT][1], seen[MIDDLE][0], atol=1e-5)
    assert torch.allclose(seen[MIDDLE][0] + scale * seen[DOWN][1], output, atol=1e-5)


def test_watching_leaves_nothing_behind(tmp_path):
    block, ids, state = last_block("mixtral", tmp_path, num_hidden_layers=1)
    before = block.model.run_block(0, ids, state)
    flow(block, ids, state)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in block.module.modules())
    assert torch.equal(block.model.run_block(0, ids, state), before)
