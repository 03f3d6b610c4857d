"""The splices that a measurement and a budget suggest, and what is predicted of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import floor

from exl3.allocate import CAUTION, TOLERANCE, Options, Solution, ends_first, solution, solve
from exl3.divide import divided, undivided
from exl3.errors import UserError
from exl3.foretold import foretold
from exl3.groups import ATTENTION_OR_MLP
from exl3.groups import group as group_linears
from exl3.learned import learned
from exl3.measurement import MeasuredGroup, Measurement
from exl3.predict import Offer, Prediction, predict
from exl3.splice import Quant, Splice

APART = 30  # what is tried next differs from all tried before in one group of so many
BETWEEN = 0.5  # the weight of gradients: a geometric mean of them and what was measured


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
        """The best choice for a bitrate, then others, all of about the same size."""
        best = self._chosen("the solution", self.measurement, bitrate)
        if best is None:
            smallest = sum(min(o.bits for o in own) for own in self.options) / self._weights
            raise UserError(
                f"-b {bitrate:g} is less than the smallest choice takes: {smallest:.3f} bits"
            )
        fine = divided(self.measurement)
        found = [
            best,
            self._chosen("without caution", self.measurement, bitrate, caution=0.0),
            self._chosen("between", foretold(fine, BETWEEN), bitrate),
            self._chosen("by gradients", foretold(fine, 1.0), bitrate),
            self._chosen("whole groups", undivided(self.measurement), bitrate),
        ]
        blocks = [group.block or 0 for group in self.groups]
        if plain_rule := ends_first(self.options, blocks, self._limits(bitrate)["budget"]):
            found.append(self.candidate("ends first", plain_rule))
        unique: list[Candidate] = []
        for candidate in filter(None, found):
            if all(candidate.splice.origin != other.splice.origin for other in unique):
                unique.append(candidate)
        return unique

    def taught(
        self, trials: Sequence[tuple[Candidate, float]], bitrate: float, names: Sequence[str]
    ) -> list[Candidate]:
        """The best choices by what measured KLDs of splices teach of their parts: one for every
        name, as far as there are any. Each is unlike all that were tried, and unlike the others."""
        numbers = foretold(divided(self.measurement), BETWEEN) or self.measurement
        predictions = replace(self, measurement=numbers).options
        before = [[option.kld for option in own] for own in predictions]
        picks = [self._picked(candidate) for candidate, _ in trials]
        klds = learned(before, self._families, picks, [kld for _, kld in trials])
        options = [
            [replace(option, kld=kld, error=0.0) for option, kld in zip(*group, strict=True)]
            for group in zip(self.options, klds, strict=True)
        ]
        apart = max(1, len(options) // APART)
        found: list[Candidate] = []
        for name in names:
            choice = solve(options, **self._limits(bitrate), excluded=picks, apart=apart)
            if choice is None:
                break
            picks.append(choice.picked)
            found.append(self.candidate(name, solution(self.options, choice.picked, choice.gap)))
        return found

    def _chosen(
        self, name: str, numbers: Measurement | None, bitrate: float, caution: float = CAUTION
    ) -> Candidate | None:
        """The best choice by some numbers, with the KLD that this measurement predicts of it. None
        without numbers, or if nothing fits."""
        if numbers is None:
            return None
        view = replace(self, measurement=numbers)
        choice = solve(view.options, **self._limits(bitrate), caution=caution)
        if choice is None:
            return None
        picked = self._picked(view.candidate(name, choice))
        return self.candidate(name, solution(self.options, picked, choice.gap))

    def _picked(self, candidate: Candidate) -> tuple[int, ...]:
        """The quant that every group is from; the first layer's, where they differ."""
        return tuple(candidate.splice.origin[group.layers[0]] for group in self.groups)

    @cached_property
    def _families(self) -> list[tuple]:
        """Of every group: its block and the halves it has linears of, attention or MLP."""
        halves = [group_linears([own.layers], ATTENTION_OR_MLP) for own in self.groups]
        return [
            (own.block, *(half.name for half in found))
            for own, found in zip(self.groups, halves, strict=True)
        ]

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
