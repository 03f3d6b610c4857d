"""How many bits each tensor gets under an average."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

MIN_BITS, MAX_BITS = 1, 8


@dataclass(frozen=True)
class Module:
    """A linear layer that competes for bits."""

    key: str
    block: int
    weights: int  # padded, as bits are counted


def allocate(modules: Sequence[Module], bits: float) -> dict[str, int]:
    """Whole bits for every tensor, on average at most `bits` (1 to 8) and as near as they allow.

    Every tensor gets the whole part of `bits`; what is left raises tensors by one bit, blocks at
    the ends of the stack first (their errors are the dearest), and within a block the largest
    first, so that small ones are left to fill the rest.
    """
    low = min(floor(bits), MAX_BITS)
    chosen = {m.key: low for m in modules}
    left = (bits - low) * sum(m.weights for m in modules)
    if low < MAX_BITS:
        last = max(m.block for m in modules)
        for module in sorted(modules, key=lambda m: (_from_the_ends(m.block, last), -m.weights)):
            if module.weights <= left + 1e-6:
                chosen[module.key] += 1
                left -= module.weights
    return chosen


def average_bits(modules: Sequence[Module], chosen: dict[str, int]) -> float:
    """Bits a weight of the codes alone: sum of K n over sum of n."""
    total = sum(m.weights for m in modules)
    return sum(chosen[m.key] * m.weights for m in modules) / total


def _from_the_ends(block: int, last: int) -> int:
    """0 for the first block, 1 for the last, 2 for the second, 3 for the last but one, ..."""
    return 2 * block if block <= last - block else 2 * (last - block) + 1
