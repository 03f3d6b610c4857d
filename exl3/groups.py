"""What a linear is for, by its name, and the groups of linears that get their bits together."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

ATTENTION_OR_MLP = 1
EVERY_TENSOR = 4
LEVELS = (0, ATTENTION_OR_MLP, 2, 3, EVERY_TENSOR)

SHARED = {"shared_expert", "shared_experts", "share_expert", "shared_mlp"}
EXPERTS = {"experts", "local_experts"}
# Parts of a path that tell the half of a block; the last of them in a path counts.
ATTENTION = re.compile(r"attn|attention|mixer|mamba|conv|temporal_block")
MLP = re.compile(r"mlp|feed_forward|ffn|moe|expert")

# The last part of a path, by its half of the block: fused linears have kinds of their own.
ATTENTION_KINDS = {
    "q": ("q_proj", "q_a_proj", "q_b_proj", "wq", "wq_a", "wq_b", "query", "q_lin"),
    "k": ("k_proj", "wk", "key", "k_lin"),
    "v": ("v_proj", "wv", "value", "v_lin"),
    "kv": ("kv_a_proj_with_mqa", "kv_a_proj", "kv_b_proj", "kv_proj", "wkv_a", "wkv_b"),
    "qkv": (
        *("qkv_proj", "qkv", "query_key_value", "c_attn", "Wqkv", "W_pack"),
        *("in_proj_qkvz", "in_proj_qkv"),
    ),
    "o": ("o_proj", "wo", "out_proj", "dense", "c_proj", "out_lin"),
}
MLP_KINDS = {
    "gate": ("gate_proj", "w1"),
    "up": (
        *("up_proj", "w3", "fc1", "c_fc", "fc_in", "dense_h_to_4h", "lin1"),
        *("linear_fc1",),
    ),
    "gate_up": ("gate_up_proj", "input_linear", "Wi"),
    "down": (
        *("down_proj", "w2", "fc2", "c_proj", "fc_out", "dense_4h_to_h", "lin2"),
        *("linear_fc2", "output_linear", "Wo"),
    ),
}
TOGETHER = {"k": "k+v", "v": "k+v", "kv": "k+v", "gate": "gate+up", "up": "gate+up"} | {
    "gate_up": "gate+up"
}  # at level 3


@dataclass(frozen=True)
class Group:
    """Linears of one block that are chosen together; keys without `.weight`."""

    block: int
    name: str  # unique in its block: "attn", "q", "experts.down", ...
    keys: tuple[str, ...]


def kind(key: str) -> str:
    """What a linear is for, by its key without `.weight`.

    "q", "k", "v", "o", "gate", "up", "down"; "kv", "qkv", "gate_up" where they are one linear;
    "experts." or "shared." before those of experts; "attn.other", "mlp.other", "experts.NAME",
    "shared.other" for names not known here.
    """
    *path, leaf = key.split(".")
    half = _half(path, leaf)
    role = _role(half, leaf)
    if EXPERTS & set(path):
        return f"experts.{role or leaf}"  # never "other": one kind has one K
    if SHARED & set(path):
        return f"shared.{role or 'other'}"
    return role or f"{half}.other"


def group(keys_by_block: Sequence[Sequence[str]], level: int) -> list[Group]:
    """Groups of the linears of every block, in the order of their first linears.

    level: 0 a whole block; 1 attention | MLP with all its experts; 2 the same with shared experts
    apart; 3 q | k and v | o | gate and up | down, experts of one kind together, shared ones apart;
    4 every linear, but experts of one kind together. At every level the experts of a kind are in
    one group, for they have one K; at 3 and 4 a linear whose name is not known is in one of its
    own. ValueError for any other level.
    """
    if level not in LEVELS:
        raise ValueError(f"level must be 0 to 4, not {level}")
    groups = []
    for block, keys in enumerate(keys_by_block):
        named: dict[str, list[str]] = {}
        for key in keys:
            named.setdefault(_name(key, keys, level), []).append(key)
        groups += [Group(block, name, tuple(members)) for name, members in named.items()]
    return groups


def _name(key: str, keys: Sequence[str], level: int) -> str:
    """The name of the group of a linear; keys: of its block."""
    if level == 0:
        return "block"
    family, _, role = kind(key).rpartition(".")
    if level in (1, 2):
        if family == "shared" and level == 2:
            return "shared"
        *path, leaf = key.split(".")
        return _half(path, leaf)
    if level == 3 and role != "other":
        role = TOGETHER.get(role, role)
    elif family != "experts" and sum(kind(other) == kind(key) for other in keys) > 1:
        return _tail(key, keys)  # such as the two of a low rank
    return f"{family}.{role}" if family else role


def _tail(key: str, keys: Sequence[str]) -> str:
    """The shortest end of a key that no other key of its block has."""
    parts = key.split(".")
    for size in range(1, len(parts)):
        tail = ".".join(parts[-size:])
        if not any(other != key and f".{other}".endswith(f".{tail}") for other in keys):
            return tail
    return key


def _half(path: Sequence[str], leaf: str) -> str:
    """ "attn" or "mlp"."""
    for part in reversed(path):
        if MLP.search(part):
            return "mlp"
        if ATTENTION.search(part):
            # A few name every sublayer a mixer, MLPs too.
            return "mlp" if part == "mixer" and _role("mlp", leaf) in ("up", "down") else "attn"
    return "attn" if _role("attn", leaf) else "mlp"


def _role(half: str, leaf: str) -> str | None:
    kinds = ATTENTION_KINDS if half == "attn" else MLP_KINDS
    return next((role for role, leaves in kinds.items() if leaf in leaves), None)
