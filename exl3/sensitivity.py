"""What bits are worth where nothing was measured: a guess by kind and place of a layer.

A group's KLD is taken as proportional to its weights, the relative error of its layers (so 4^-K,
about) and a sensitivity per weight. Twice the sensitivity is worth half a bit, so only factors
matter, and only coarsely; what they can do to a model is limited by the options that
`exl3.jobs.plan` offers.
"""

# Geometric means over the inner blocks of a small Llama, each linear alone at 2 bits in the
# original, relative to `down` (docs/benchmarks.md), rounded towards 1. Why they differ: k and v
# have few outputs that several heads read; up and gate are softened by each other's product.
KINDS = {
    "q": 1.5,
    "k": 3.0,
    "v": 2.0,
    "kv": 2.5,
    "qkv": 2.0,
    "o": 0.7,
    "gate": 0.8,
    "up": 0.5,
    "gate_up": 0.65,
    "down": 1.0,
}
# Errors of the first block run through all others, those of the last meet the head at once; there
# 15 (of its MLP) and 3 were measured.
FIRST, LAST = 8.0, 3.0


def sensitivity(kind: str, block: int, blocks: int, used: float) -> float:
    """KLD per weight and relative error, in arbitrary units.

    kind: as `exl3.groups.kind` has it; used: the share of tokens that meet a routed expert, by
    which an expert's errors count less.
    """
    family, _, role = kind.rpartition(".")
    value = KINDS.get(role, 1.0) * (used if family == "experts" else 1.0)
    if blocks > 2:
        value *= FIRST if block == 0 else LAST if block == blocks - 1 else 1.0
    return value


def share_of_tokens(config: object) -> float:
    """Which part of all tokens an expert of a model gets, by its text config; 1 without experts."""
    used = getattr(config, "num_experts_per_tok", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((n for name in names if (n := getattr(config, name, None))), None)
    if not (isinstance(used, int) and isinstance(experts, int) and 0 < used <= experts):
        return 1.0
    return used / experts
