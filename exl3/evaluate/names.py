"""What models are called in charts and tables, and what their names tell."""

import re

from exl3.evaluate.result import Result

UNQUANTIZED = {"original", "reference", "unquantized", "fp32", "fp16", "bf16", "f32", "f16"}
UNQUANTIZED_BPW = 15


def shown(label: str) -> str:
    """A label without what stands from `[` on."""
    return label.split("[")[0].strip() or label


def drawn(result: Result) -> str:
    """The label of a point: without its group, which the legend names."""
    label = shown(result.label)
    group = rf"(?<!\S){re.escape(result.group)}(?!\S)"
    return " ".join(re.sub(group, "", label, flags=re.IGNORECASE).split()) or label


def is_unquantized(result: Result) -> bool:
    """Whether a model is what others are compared with, rather than a quant."""
    names = {result.group.casefold(), shown(result.label).casefold()}
    return result.storage.layer_bpw >= UNQUANTIZED_BPW or bool(names & UNQUANTIZED)
