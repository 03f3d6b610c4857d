"""The splices that a measurement and a budget suggest, and what is predicted of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import floor

from exl3.allocate import TOLERANCE, Options, Solution, ends_first, solution, solve
from exl3.errors import UserError
from exl3.measurement import Measurement
from exl3.predict import Offer, Prediction, predict
from exl3.splice import Quant, Splice

RUNNER_UP = 10  # the runner-up differs from the solution in one group of so many


@dataclass(frozen=True)
class Candidate:
    """A splice that could be the result."""

    name: str
    splice: Splice
    predicted: float  # KLD
    gap: float = 0.0


@dataclass(frozen=True)
class Problem:
    """What there is to choose from."""

    measurement: Measurement
    quants: tuple[Quant, ...]
    head: int  # number of the quant that the head comes from

    @cached_property
    def predictions(self) -> list[Prediction]:
        """For every group, its tensors in every quant."""
        return [
            predict(self.measurement, group, [self._offer(q, group.layers) for q in self.quants])
            for group in self.measurement.groups
        ]

    def _offer(self, quant: Quant, layers: Sequence[str]) -> Offer:
        weights: dict[int, float] = {}
        for name in layers:
            known = next(q.layers[name].weights for q in self.quants if name in q.layers)
            weights[quant.k(name)] = weights.get(quant.k(name), 0) + known
        return Offer(sum(map(quant.module_bits, layers)), weights)

    @property
    def options(self) -> Options:
        return [prediction.options for prediction in self.predictions]

    @property
    def measured_share(self) -> float:
        """Share of the options whose KLD was measured at their own bits."""
        known = [measured for p in self.predictions for measured in p.measured]
        return sum(known) / len(known)

    def plain(self, number: int) -> Candidate:
        """One of the quants as it is, the head apart."""
        picked = [number] * len(self.predictions)
        return self.candidate(str(self.quants[number].folder), solution(self.options, picked))

    def candidates(self, bitrate: float) -> list[Candidate]:
        """The best choice for a bitrate, then runners-up, all of about the same size."""
        weights = self.plain(0).splice.weights
        budget, options = floor(bitrate * weights), self.options
        least = budget - floor(TOLERANCE * weights)
        best = solve(options, budget, least=least)
        if best is None:
            raise UserError(
                f"-b {bitrate:g} is less than the smallest choice takes: "
                f"{sum(min(o.bits for o in own) for own in options) / weights:.3f} bits"
            )
        blocks = [group.block or 0 for group in self.measurement.groups]
        apart = max(1, len(options) // RUNNER_UP)
        found = {
            "the solution": best,
            "without caution": solve(options, budget, least=least, caution=0.0),
            "second best": solve(options, budget, least=least, excluded=[best.picked], apart=apart),
            "ends first": ends_first(options, blocks, budget),
        }
        unique: dict[tuple[int, ...], Candidate] = {}
        for name, choice in found.items():
            if choice is not None and choice.picked not in unique:
                unique[choice.picked] = self.candidate(name, choice)
        return list(unique.values())

    def candidate(self, name: str, choice: Solution) -> Candidate:
        """The splice of a choice."""
        origin = {
            key: number
            for group, number in zip(self.measurement.groups, choice.picked, strict=True)
            for key in group.layers
        }
        head = self.quants[self.head].head() or self.quants[0].head()
        if head is not None:
            origin[head] = self.head
        splice = Splice(self.quants, origin)
        return Candidate(name, splice, self._predicted(choice), choice.gap)

    def _predicted(self, choice: Solution) -> float:
        """KLD of the whole: what its groups do by themselves adds up; swaps start at the base."""
        if self.measurement.method == "isolate":
            return choice.kld
        base = self.measurement.base_kld or self.measurement.base.kld or 0.0
        return base + choice.kld - sum(p.base for p in self.predictions)
