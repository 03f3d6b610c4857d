"""Hidden states of all rows on their way through the model, block by block."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from exl3 import parallel
from exl3.devices import CPU
from exl3.memory import Spill
from exl3.model.streamed import StreamedModel

BATCH_TOKENS = 2048  # of one forward; part of the result's definition
TAIL_TOKENS = 64  # of one piece of a row in norm and head; likewise
SAMPLE_ROWS = 16  # rows on which a block's error is measured

Part = TypeVar("Part")


@dataclass
class Streams:
    """What enters a block: in the original, and in the quantized model where that is followed too.

    rows: ids (rows, cols). States are float32 (rows, cols, hidden), None before the first block.
    """

    rows: torch.Tensor
    paired: bool  # the quantized model's states travel side by side
    quantized: torch.Tensor | None = None
    original: torch.Tensor | None = None
    spill: Spill | None = None  # where states go that memory has no room for
    device: torch.device = CPU  # else: where states lie, which may be a GPU's memory

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Room for as much as all states take, in memory or in a file."""
        if self.spill is not None:
            return self.spill.empty(*shape, dtype=dtype)
        return torch.empty(*shape, dtype=dtype, device=self.device)

    def batches(self) -> list[slice]:
        """Slices of rows for one forward each."""
        return batches(self.rows)

    def waves(self) -> Iterator[list[slice]]:
        """Batches that run at the same time."""
        return waves(self.batches())


def waves(parts: list[Part]) -> Iterator[list[Part]]:
    """Parts that run at the same time: few, for what they capture stays in memory."""
    size = parallel.threads()
    return (parts[a : a + size] for a in range(0, len(parts), size))


def batches(rows: torch.Tensor) -> list[slice]:
    """Slices of rows (rows, cols) for one forward each."""
    size = max(1, BATCH_TOKENS // rows.shape[1])
    return [slice(a, min(a + size, len(rows))) for a in range(0, len(rows), size)]


def spread(rows: torch.Tensor, wanted: int) -> torch.Tensor:
    """Indices of so many rows (of all, if there are fewer), evenly spread."""
    return torch.linspace(0, len(rows) - 1, min(wanted, len(rows))).long()


def enter(states: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    """The states of some rows, None before the first block."""
    return None if states is None else states[part]


def run_block(
    model: StreamedModel,
    i: int,
    rows: torch.Tensor,
    states: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Block i's output for all rows, (rows, cols, hidden), on the model's device unless in `out`,
    which may be `states` itself."""
    if out is None:
        hidden = model.config.get_text_config(decoder=True).hidden_size
        out = torch.empty(*rows.shape, hidden, dtype=model.dtype, device=model.device)

    def run(part: slice) -> None:
        out[part] = model.run_block(i, rows[part], enter(states, part))

    parallel.each(run, batches(rows))
    return out
