"""Roles of linears by the names of many architectures, and their groups at every level."""

import pytest

from exl3.groups import Group, group, kind

NAMES = {
    "model.layers.0.self_attn.q_proj": "q",
    "model.layers.0.self_attn.k_proj": "k",
    "model.layers.0.self_attn.v_proj": "v",
    "model.layers.0.self_attn.o_proj": "o",
    "model.layers.0.mlp.gate_proj": "gate",
    "model.layers.0.mlp.up_proj": "up",
    "model.layers.0.mlp.down_proj": "down",
    "language_model.model.layers.7.mlp.down_proj": "down",
    # experts: Mixtral and MiniMax, Qwen, DeepSeek, Llama 4, Jamba
    "model.layers.0.block_sparse_moe.experts.11.w1": "experts.gate",
    "model.layers.0.block_sparse_moe.experts.0.w3": "experts.up",
    "model.layers.0.block_sparse_moe.experts.0.w2": "experts.down",
    "model.layers.0.mlp.experts.3.gate_proj": "experts.gate",
    "model.layers.0.mlp.experts.3.down_proj": "experts.down",
    "model.layers.0.mlp.shared_expert.up_proj": "shared.up",
    "model.layers.0.mlp.shared_experts.down_proj": "shared.down",
    "model.layers.0.feed_forward.shared_expert.gate_proj": "shared.gate",
    "model.layers.0.feed_forward.experts.2.up_proj": "experts.up",
    "model.layers.0.block_sparse_moe.experts.4.fancy": "experts.fancy",
    "model.layers.0.mlp.shared_expert.fancy": "shared.other",
    # DeepSeek's latent attention
    "model.layers.0.self_attn.q_a_proj": "q",
    "model.layers.0.self_attn.q_b_proj": "q",
    "model.layers.0.self_attn.kv_a_proj_with_mqa": "kv",
    "model.layers.0.self_attn.kv_b_proj": "kv",
    # Qwen3-Next, Qwen3.5, Mamba, LFM2, Nemotron-H
    "model.layers.0.linear_attn.in_proj_qkvz": "qkv",
    "model.layers.0.linear_attn.in_proj_ba": "attn.other",
    "model.layers.0.linear_attn.in_proj_z": "attn.other",
    "model.layers.0.linear_attn.out_proj": "o",
    "backbone.layers.0.mixer.in_proj": "attn.other",
    "backbone.layers.0.mixer.out_proj": "o",
    "backbone.layers.0.mixer.up_proj": "up",
    "backbone.layers.0.mixer.q_proj": "q",
    "model.layers.0.conv.in_proj": "attn.other",
    # GPT-2, NeoX, Falcon and Bloom, Phi, MPT, GPT-J, OPT
    "transformer.h.0.attn.c_attn": "qkv",
    "transformer.h.0.attn.c_proj": "o",
    "transformer.h.0.mlp.c_fc": "up",
    "transformer.h.0.mlp.c_proj": "down",
    "gpt_neox.layers.0.attention.query_key_value": "qkv",
    "gpt_neox.layers.0.attention.dense": "o",
    "gpt_neox.layers.0.mlp.dense_h_to_4h": "up",
    "gpt_neox.layers.0.mlp.dense_4h_to_h": "down",
    "transformer.h.0.self_attention.dense": "o",
    "model.layers.0.self_attn.dense": "o",
    "model.layers.0.mlp.fc1": "up",
    "model.layers.0.mlp.fc2": "down",
    "transformer.blocks.0.attn.Wqkv": "qkv",
    "transformer.blocks.0.ffn.down_proj": "down",
    "transformer.h.0.mlp.fc_in": "up",
    "model.decoder.layers.0.self_attn.out_proj": "o",
    "model.decoder.layers.0.fc1": "up",
    # Phi-3 before its split, InternLM
    "model.layers.0.mlp.gate_up_proj": "gate_up",
    "model.layers.0.attention.wo": "o",
    "model.layers.0.feed_forward.w2": "down",
    "model.layers.0.mlp.odd": "mlp.other",
}


@pytest.mark.parametrize(("key", "expected"), NAMES.items())
def test_kinds_by_name(key, expected):
    assert kind(key) == expected


def keys_of(i, *names):
    return [f"model.layers.{i}.{name}" for name in names]


ATTENTION = [f"self_attn.{x}_proj" for x in "qkvo"]
DENSE = [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
MOE = [f"mlp.experts.{n}.{x}_proj" for n in range(3) for x in ("gate", "up", "down")]
SHARED = [f"mlp.shared_expert.{x}_proj" for x in ("gate", "up", "down")]
MLA = ["self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_b_proj", "self_attn.o_proj"]

EXPECTED = {
    0: (["block"], ["block"]),
    1: (["attn", "mlp"], ["attn", "mlp"]),
    2: (["attn", "mlp"], ["attn", "mlp", "shared"]),
    3: (
        ["q", "k+v", "o", "gate+up", "down"],
        ["q", "k+v", "o", "experts.gate+up", "experts.down", "shared.gate+up", "shared.down"],
    ),
    4: (
        ["q", "k", "v", "o", "gate", "up", "down"],
        ["q_a_proj", "q_b_proj", "kv", "o"]
        + [f"{a}.{b}" for a in ("experts", "shared") for b in ("gate", "up", "down")],
    ),
}


@pytest.mark.parametrize("level", EXPECTED)
def test_levels(level):
    blocks = [keys_of(0, *ATTENTION, *DENSE), keys_of(1, *MLA, *MOE, *SHARED)]
    groups = group(blocks, level)
    for i, names in enumerate(EXPECTED[level]):
        assert [g.name for g in groups if g.block == i] == names
        together = [key for g in groups if g.block == i for key in g.keys]
        assert sorted(together) == sorted(blocks[i])
    for g in groups:  # a kind of experts is never divided
        for role in ("gate", "up", "down"):
            count = sum(kind(key) == f"experts.{role}" for key in g.keys)
            assert count in (0, 3)


def test_a_name_is_unique_in_its_block():
    twins = keys_of(0, "mlp.a.gate_proj", "mlp.b.gate_proj", "mlp.up_proj")
    assert [g.name for g in group([twins], 4)] == ["a.gate_proj", "b.gate_proj", "up"]
    assert group([twins], 3) == [Group(0, "gate+up", tuple(twins))]


def test_other_levels_are_refused():
    with pytest.raises(ValueError, match="0 to 4, not 5"):
        group([[]], 5)
