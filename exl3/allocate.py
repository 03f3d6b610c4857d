"""Which option every group takes, so that all together do least harm within a budget of bits.

A multiple-choice knapsack, solved exactly (Kellerer, Pferschy, Pisinger: Knapsack Problems, 2004,
chapter 11) as an integer program by HiGHS. Nothing here knows what a group is.

Measured gains have errors, and of many unsure gains the best are the luckiest. So a gain counts
only as far as it is sure: at `caution` standard errors below what was measured, never below 0, and
never below that of a cheaper option. Bits that no sure gain wants go to the unsure ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

MAX_BITS = 8
ALL_BITS = range(1, MAX_BITS + 1)
TOLERANCE = 0.02  # bits a weight: what may be left of a budget where the groups allow more
CAUTION = 1.0  # standard errors that a gain must stand out
NODES = 20_000  # of the search tree: a limit that, unlike time, gives the same result everywhere
TIE = 1e-6  # of the greatest gain: what being an earlier group is worth between equals
SIZE = 1e3  # of the greatest gain as the solver sees it, whose tolerances are absolute
FILL = 1e-4  # of the greatest gain: what all bits are worth where no gain is left


@dataclass(frozen=True)
class Option:
    """What a group may be given."""

    bits: int  # all it takes, in bits (of the model, not per weight)
    kld: float  # predicted harm; only differences between a group's options count
    error: float = 0.0  # standard error of the difference to the group's cheapest option


@dataclass(frozen=True)
class Solution:
    """What every group takes."""

    picked: tuple[int, ...]  # the option's index, by group
    bits: int
    kld: float  # predicted: sum over the groups
    gap: float  # relative, between the sure gains found and what no choice can exceed


Options = Sequence[Sequence[Option]]  # of every group, in any order


def solve(
    groups: Options,
    budget: int,
    *,
    least: int = 0,
    caution: float = CAUTION,
    excluded: Sequence[tuple[int, ...]] = (),
    apart: int = 1,
) -> Solution | None:
    """The choice with the greatest sure gain that takes at most `budget` bits.

    least: bits it should take at least, where the options allow that. excluded: choices from which
    at least `apart` groups must differ. None if no choice fits.
    """
    problem = _Problem(groups, excluded, apart)
    gains = sure_gains(groups, caution)
    found = problem.best(gains, least, budget) or problem.best(gains, 0, budget)
    if found is None:
        return None
    picked, gap = found
    return solution(groups, _fill(groups, picked, budget, excluded, apart), gap)


def solution(groups: Options, picked: Sequence[int], gap: float = 0.0) -> Solution:
    """A choice with its bits and its predicted harm."""
    chosen = [options[i] for options, i in zip(groups, picked, strict=True)]
    bits, kld = sum(option.bits for option in chosen), sum(option.kld for option in chosen)
    return Solution(tuple(picked), bits, kld, gap)


def sure_gains(groups: Options, caution: float) -> list[list[float]]:
    """How much less harm every option does than its group's cheapest, as far as that is sure."""
    gains = []
    for options in groups:
        order = _by_bits(options)
        cheapest = options[order[0]]
        own, best = [0.0] * len(options), 0.0
        for i in order[1:]:
            best = max(best, cheapest.kld - options[i].kld - caution * options[i].error)
            own[i] = best
        gains.append(own)
    return gains


def ends_first(groups: Options, blocks: Sequence[int], budget: int) -> Solution | None:
    """A plain rule to compare with: blocks at the ends of the stack get the next option first.

    blocks: of every group; of a block the largest groups come first. None if nothing fits.
    """
    ladders = [_by_bits(options) for options in groups]
    steps = [0] * len(groups)
    room = budget - sum(options[o[0]].bits for options, o in zip(groups, ladders, strict=True))
    if room < 0:
        return None
    last = max(blocks)
    order = sorted(
        range(len(groups)),
        key=lambda g: (_from_the_ends(blocks[g], last), -groups[g][ladders[g][0]].bits),
    )
    for step in range(1, max(map(len, groups))):
        for g in order:
            if steps[g] != step - 1 or step == len(ladders[g]):
                continue
            more = groups[g][ladders[g][step]].bits - groups[g][ladders[g][step - 1]].bits
            if more <= room:
                room -= more
                steps[g] = step
    return solution(groups, [o[s] for o, s in zip(ladders, steps, strict=True)])


def _from_the_ends(block: int, last: int) -> int:
    """0 for the first block, 1 for the last, 2 for the second, 3 for the last but one, ..."""
    return 2 * block if block <= last - block else 2 * (last - block) + 1


def _by_bits(options: Sequence[Option]) -> list[int]:
    """Indices of the options, cheapest first."""
    return sorted(range(len(options)), key=lambda i: (options[i].bits, options[i].kld, i))


def _fill(
    groups: Options,
    picked: Sequence[int],
    budget: int,
    excluded: Sequence[tuple[int, ...]],
    apart: int,
) -> tuple[int, ...]:
    """What is left of the budget: to gains that are not sure, and then to any bits at all."""
    most = sum(max(option.bits for option in options) for options in groups)
    values = []
    for options, i in zip(groups, picked, strict=True):
        own, best = [-np.inf] * len(options), 0.0
        for j in _by_bits(options):
            if options[j].bits >= options[i].bits:
                best = max(best, options[i].kld - options[j].kld)
                own[j] = best
        values.append(own)
    # A bit more is never worse, whatever a noisy measurement says.
    any_bits = FILL * max((gain for own in values for gain in own), default=0) or 1.0
    for own, options in zip(values, groups, strict=True):
        own[:] = [v + any_bits * o.bits / most for v, o in zip(own, options, strict=True)]
    found = _Problem(groups, excluded, apart).best(values, 0, budget)
    return found[0] if found else tuple(picked)


class _Problem:
    """The integer program: one 0/1 variable for every option of every group."""

    def __init__(self, groups: Options, excluded: Sequence[tuple[int, ...]], apart: int) -> None:
        if not all(groups):
            raise ValueError("a group without options")
        self.groups = groups
        sizes = np.array([len(options) for options in groups])
        self.first = np.cumsum(sizes) - sizes  # every group's first variable
        self.owner = np.repeat(np.arange(len(groups)), sizes)  # every variable's group
        variables = np.arange(len(self.owner))
        self.rank = variables - self.first[self.owner]
        # Bits beyond the cheapest options', in the largest unit that all share, so that the
        # numbers the solver sees are small.
        bits = [option.bits for options in groups for option in options]
        floors = np.array([min(option.bits for option in options) for options in groups])
        self.unit = gcd(*(b - int(f) for b, f in zip(bits, floors[self.owner], strict=True))) or 1
        self.cheapest = int(floors.sum())
        self.extra = (np.array(bits) - floors[self.owner]) // self.unit
        each_one = csr_array((np.ones(len(variables)), (self.owner, variables)))
        self.rules = [LinearConstraint(each_one, 1, 1)]
        for choice in excluded:
            same = np.zeros(len(variables))
            same[self.first + np.array(choice)] = 1
            self.rules.append(LinearConstraint(csr_array(same[None]), 0, len(groups) - apart))

    def best(
        self, gains: Sequence[Sequence[float]], least: int, budget: int
    ) -> tuple[tuple[int, ...], float] | None:
        """The choice with the greatest sum of gains, and the relative gap; a gain of -inf forbids
        an option. None if nothing fits between `least` and `budget`."""
        room = (budget - self.cheapest) // self.unit
        need = max(0, -(-(least - self.cheapest) // self.unit))
        within = room
        while within >= need:
            found = self._search(gains, need, within)
            if found is None:
                return None
            excess = self.extra[self.first + np.array(found[0])].sum() - room
            if excess <= 0:
                return found
            within -= int(excess)  # the solver's tolerance let it through: not so again
        return None

    def _search(
        self, gains: Sequence[Sequence[float]], need: int, room: int
    ) -> tuple[tuple[int, ...], float] | None:
        value = np.array([gain for own in gains for gain in own], dtype=float)
        allowed = np.isfinite(value)
        value[~allowed] = 0
        value *= SIZE / max(np.abs(value).max(), 1e-300)
        value += SIZE * TIE * (value > 0) * (1 - self.owner / len(self.groups)) / (1 + self.rank)
        wide = max(room, 1)
        bits = LinearConstraint(csr_array(self.extra[None] / wide), need / wide, room / wide)
        result = milp(
            -value,
            integrality=np.ones(len(value)),
            bounds=Bounds(0, allowed.astype(float)),
            constraints=[*self.rules, bits],
            options={"mip_rel_gap": 0.0, "node_limit": NODES},
        )
        if result.x is None:
            return None
        parts = np.split(result.x, self.first[1:])
        return tuple(int(part.argmax()) for part in parts), float(result.mip_gap or 0)
