"""How many bits each tensor gets under an average."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, gcd

MAX_BITS = 8


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
    total = sum(m.weights for m in modules)
    budget = floor((bits - low) * total + 1e-6)
    if low < MAX_BITS and budget:
        last = max(m.block for m in modules)
        order = sorted(modules, key=lambda m: (_from_the_ends(m.block, last), -m.weights))
        raised = _fill_in_order(order, budget)
        if budget - sum(m.weights for m in raised) > TOLERANCE * total:
            raised = _fill_exactly(order, budget)
        for module in raised:
            chosen[module.key] += 1
    return chosen


TOLERANCE = 0.01  # bits: what filling in order may leave unused
MOST_EXACT = 2000  # tensors; where there are more, each is a small part of the whole


def average_bits(modules: Sequence[Module], chosen: dict[str, int]) -> float:
    """Bits a weight of the codes alone: sum of K n over sum of n."""
    total = sum(m.weights for m in modules)
    return sum(chosen[m.key] * m.weights for m in modules) / total


def _fill_in_order(order: Sequence[Module], budget: int) -> list[Module]:
    """Takes each module in turn that still fits."""
    taken = []
    for module in order:
        if module.weights <= budget:
            taken.append(module)
            budget -= module.weights
    return taken


def _fill_exactly(order: Sequence[Module], budget: int) -> list[Module]:
    """The modules whose weights come nearest to the budget; of equal sets the first in order.

    A subset sum by sets of reachable sums, each the bits of one large integer.
    """
    unit = gcd(*(m.weights for m in order))
    sizes = [m.weights // unit for m in order]
    room = budget // unit
    if len(order) > MOST_EXACT:
        return _fill_in_order(order, budget)
    reachable = [1]  # by the last i modules
    for size in reversed(sizes):
        reachable.append((reachable[-1] | reachable[-1] << size) & ((1 << (room + 1)) - 1))
    left = reachable[-1].bit_length() - 1
    taken = []
    for i, module in enumerate(order):
        rest = reachable[len(order) - 1 - i]
        if sizes[i] <= left and rest >> (left - sizes[i]) & 1:
            taken.append(module)
            left -= sizes[i]
    return taken


def _from_the_ends(block: int, last: int) -> int:
    """0 for the first block, 1 for the last, 2 for the second, 3 for the last but one, ..."""
    return 2 * block if block <= last - block else 2 * (last - block) + 1
