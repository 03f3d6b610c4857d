"""Tuning by gradient descent of what a quant keeps beside its codes: scales and norm weights.

With fixed codes a layer is W = diag(suh) M diag(svh). Other scales multiply it from both sides:
y = ((x * u) W) * v, with gains u and v that are ones at first. So neither M nor a gradient as large
as W is needed. The gains of everything are one vector 1 + d, which AdamW moves (arXiv 1711.05101);
its weight decay draws them back to the scales that the codes were searched for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

BETAS, EPSILON = (0.9, 0.95), 1e-8  # few steps: the mean square must not lag behind by hundreds
DECAY = 0.01
WARMUP = 5  # steps in which the rate rises; afterwards it falls, to nothing at the end
WATCH_EVERY = 5  # steps


class Gains:
    """Vectors as they are stored, and where each one's gains stand in the vector of all."""

    def __init__(self, stored: Mapping[str, torch.Tensor], used: Mapping[str, int]) -> None:
        """stored: key → vector in the dtype it is stored in; used: key → how many of its first
        entries matter (what follows is padding, which stays as it is)."""
        self.stored = dict(stored)
        self.sizes = [used[key] for key in self.stored]
        self.size = sum(self.sizes)

    def gains(self, moved: torch.Tensor) -> dict[str, torch.Tensor]:
        """key → gains (used,), from their distance to one (size,)."""
        return dict(zip(self.stored, (1 + moved).split(self.sizes), strict=True))

    def tuned(self, moved: torch.Tensor) -> dict[str, torch.Tensor]:
        """key → the vector to store, rounded to its dtype."""
        tuned = {}
        for key, gain in self.gains(moved).items():
            tuned[key] = self.stored[key].clone()
            tuned[key][: len(gain)] = self.stored[key][: len(gain)].float() * gain
        return tuned

    def rounded(self, moved: torch.Tensor) -> dict[str, torch.Tensor]:
        """key → the gains that the stored vectors really have; one where nothing can change."""
        rounded = {}
        for (key, tuned), size in zip(self.tuned(moved).items(), self.sizes, strict=True):
            before, after = self.stored[key][:size].float(), tuned[:size].float()
            rounded[key] = torch.where(before == 0, 1.0, after / before)
        return rounded

    def join(self, gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Gradients by their keys, where there are any, as one vector (size,)."""
        joined = torch.zeros(self.size)
        for key, part in zip(self.stored, joined.split(self.sizes), strict=True):
            if key in gradients:
                part.copy_(gradients[key])
        return joined


@dataclass
class Descent:
    """AdamW under way, and the best it has come across. Vectors are float32 (size,)."""

    moved: torch.Tensor  # d
    mean: torch.Tensor  # of gradients
    square: torch.Tensor  # of gradients, mean
    best: torch.Tensor  # d with the least error
    step: int = 0  # steps done
    best_step: int = 0
    first: float | None = None  # error before the first step
    least: float | None = None

    @classmethod
    def begin(cls, size: int) -> "Descent":
        return cls(*(torch.zeros(size) for _ in range(4)))

    def move(self, gradient: torch.Tensor, rate: float) -> None:
        """One step of AdamW."""
        self.step += 1
        a, b = BETAS
        self.mean.mul_(a).add_(gradient, alpha=1 - a)
        self.square.mul_(b).addcmul_(gradient, gradient, value=1 - b)
        size = (self.square / (1 - b**self.step)).sqrt_().add_(EPSILON)
        self.moved.mul_(1 - rate * DECAY)
        self.moved.addcdiv_(self.mean, size, value=-rate / (1 - a**self.step))

    def judge(self, error: float) -> None:
        """Takes note of the error here; only one that is less than all before makes a best."""
        if self.least is None:
            self.first = self.least = error
        elif error < self.least:  # never for NaN
            self.least, self.best_step = error, self.step
            self.best.copy_(self.moved)


def rate_at(step: int, steps: int, rate: float) -> float:
    """The learning rate of step 0 to steps - 1."""
    return rate * min((step + 1) / WARMUP, 1 - step / steps)


def descend(
    descent: Descent,
    steps: int,
    rate: float,
    gradient: Callable[[int, torch.Tensor], torch.Tensor],
    error: Callable[[torch.Tensor], float],
    done: Callable[[Descent], None],
) -> None:
    """Goes on with a descent to its last step.

    gradient(step, d): (size,), with respect to gains; error(d): on rows that no gradient sees;
    done(descent) hears of every step. Ends early where a gradient is not finite.
    """
    if descent.first is None:
        descent.judge(error(descent.moved))
    while descent.step < steps:
        g = gradient(descent.step, descent.moved)
        if not torch.isfinite(g).all():
            descent.step = steps  # nothing good can follow
        else:
            descent.move(g, rate_at(descent.step, steps, rate))
            if descent.step % WATCH_EVERY == 0 or descent.step == steps:
                descent.judge(error(descent.moved))
        done(descent)


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> tuple[float, torch.Tensor]:
    """KL(reference || logits), summed over tokens, and its gradient with respect to logits.

    Both are logits (..., vocab); tokens that both exclude (-inf) count nothing.
    """
    expected, got = (x.float().log_softmax(-1) for x in (reference, logits))
    p = expected.exp()
    each = torch.where(p == 0, 0.0, p * (expected - got))
    return float(each.double().sum()), got.exp_().sub_(p)
