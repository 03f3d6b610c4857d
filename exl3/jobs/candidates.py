"""The splices that a measurement and a budget suggest, and what is predicted of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import floor

from exl3.allocate import TOLERANCE, Options, Solution, ends_first, solution, solve
from exl3.divide import divided, undivided
from exl3.errors import UserError
from exl3.measurement import MeasuredGroup, Measurement
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
    def groups(self) -> tuple[MeasuredGroup, ...]:
        """What is chosen: the measured groups, or where gradients tell, their tensors."""
        return divided(self.measurement).groups

    @cached_property
    def predictions(self) -> list[Prediction]:
        """For every group, its tensors in every quant."""
        return [
            predict(self.measurement, group, [self._offer(q, group.layers) for q in self.quants])
            for group in self.groups
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
        found = self._choices(bitrate)
        if any(group.parts for group in self.measurement.groups):
            whole = replace(self, measurement=undivided(self.measurement))
            if choice := solve(whole.options, **self._limits(bitrate)):
                found.append(whole.candidate("whole groups", choice))
        unique: list[Candidate] = []
        for candidate in found:
            if all(candidate.splice.origin != other.splice.origin for other in unique):
                unique.append(candidate)
        return unique

    def _choices(self, bitrate: float) -> list[Candidate]:
        limits, options = self._limits(bitrate), self.options
        best = solve(options, **limits)
        if best is None:
            smallest = sum(min(o.bits for o in own) for own in options) / self._weights
            raise UserError(
                f"-b {bitrate:g} is less than the smallest choice takes: {smallest:.3f} bits"
            )
        blocks = [group.block or 0 for group in self.groups]
        apart = max(1, len(options) // RUNNER_UP)
        found = {
            "the solution": best,
            "without caution": solve(options, **limits, caution=0.0),
            "second best": solve(options, **limits, excluded=[best.picked], apart=apart),
            "ends first": ends_first(options, blocks, limits["budget"]),
        }
        return [self.candidate(name, choice) for name, choice in found.items() if choice]

    @cached_property
    def _weights(self) -> int:
        """Of the decoder."""
        return self.plain(0).splice.weights

    def _limits(self, bitrate: float) -> dict[str, int]:
        """Bits that a choice may take, and should if it can."""
        budget = floor(bitrate * self._weights)
        return {"budget": budget, "least": budget - floor(TOLERANCE * self._weights)}

    def candidate(self, name: str, choice: Solution) -> Candidate:
        """The splice of a choice."""
        origin = {
            key: number
            for group, number in zip(self.groups, choice.picked, strict=True)
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
