"""Linears of a block that are not quantized."""

# The part of a module's path that tells them, and why.
LEFT_ALONE = {
    "gate": "a router decides by small differences, and readers want it in float16",
    "router": "the same",
    "shared_expert_gate": "one output that scales a whole expert",
    "kv_b_proj": "readers of latent attention fold it into other products, so they need it plain",
    "in_proj_ba": "decay and step of linear attention: few outputs, and exponents of a recurrence",
    "in_proj_a": "the same",
    "in_proj_b": "the same",
    "indexer": "chooses by small differences which tokens are attended to",
}


def is_left_alone(path: str) -> bool:
    """Whether the linear at this path in its block is not to be quantized."""
    return not LEFT_ALONE.keys().isdisjoint(path.split("."))
