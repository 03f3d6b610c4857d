"""What every step of a conversion needs to know, and how much work there is."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from exl3.devices import CPU
from exl3.format.layer import padded
from exl3.jobs.boundaries import Boundaries
from exl3.jobs.plan import Plan
from exl3.jobs.settings import Settings
from exl3.jobs.source import Source
from exl3.jobs.thrift import Thrift
from exl3.jobs.workdir import WorkDir
from exl3.progress import Progress

# Rough costs, to tell how much is left: only their ratios matter. A weight's search takes about
# as long as its part in the forwards of 20,000 tokens.
ENCODE = 1.0
TOKEN = 1 / 20_000


@dataclass
class Job:
    """A conversion under way."""

    settings: Settings
    work: WorkDir
    source: Source
    plan: Plan
    progress: Progress
    thrift: Thrift
    boundaries: Boundaries | None = None  # of the original's gradients, if they are wanted
    saved: float = 0.0  # when the states were saved last
    devices: Sequence[torch.device] = (CPU,)  # the first runs the model, all share its linears

    @property
    def corrects(self) -> bool:
        """Whether layers are corrected for the errors before them."""
        return not self.settings.no_correction

    def forward_cost(self, i: int) -> float:
        """Of block i's forwards."""
        weights = sum(m.weights for m in self.plan.modules if m.block == i)
        return forwards_cost(self.settings, self.source, weights)

    def block_cost(self, i: int) -> float:
        """Of all work on block i."""
        weights = sum(m.weights for m in self.plan.modules if m.block == i)
        return self.forward_cost(i) + ENCODE * weights


def encode_cost(linear: nn.Linear) -> float:
    """Of the search for a linear's codes."""
    return ENCODE * padded(linear.in_features) * padded(linear.out_features)


def forwards_cost(settings: Settings, source: Source, weights: int) -> float:
    """Of the calibration rows on their way through so many weights, in all streams."""
    streams = 1 if settings.no_correction else 2
    return streams * TOKEN * source.rows.numel() * weights


def total_cost(settings: Settings, source: Source, plan: Plan) -> float:
    """Of the whole conversion."""
    key, head = source.model.head()
    last = encode_cost(head) if key in plan.bits else 0
    return ENCODE * plan.weights + forwards_cost(settings, source, plan.weights) + last
