"""Hidden states of all rows on their way through the model, block by block."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from exl3 import parallel
from exl3.memory import Spill
from exl3.model.streamed import StreamedModel

BATCH_TOKENS = 2048  # of one forward; part of the result's definition
SAMPLE_ROWS = 16  # rows on which a block's error is measured


@dataclass
class Streams:
    """What enters a block: in the quantized model, and in the original where that is followed too.

    rows: ids (rows, cols). States are float32 (rows, cols, hidden), None before the first block.
    """

    rows: torch.Tensor
    paired: bool  # the original's states travel side by side
    quantized: torch.Tensor | None = None
    original: torch.Tensor | None = None
    spill: Spill | None = None  # where states go that memory has no room for

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Room for as much as all states take, in memory or in a file."""
        make = torch.empty if self.spill is None else self.spill.empty
        return make(*shape, dtype=dtype)

    def batches(self) -> list[slice]:
        """Slices of rows for one forward each."""
        return batches(self.rows)

    def waves(self) -> Iterator[list[slice]]:
        """Batches that run at the same time: few, for what they capture stays in memory."""
        return waves(self.rows)


def waves(rows: torch.Tensor) -> Iterator[list[slice]]:
    """Batches of rows that run at the same time."""
    parts, size = batches(rows), parallel.threads()
    return (parts[a : a + size] for a in range(0, len(parts), size))


def batches(rows: torch.Tensor) -> list[slice]:
    """Slices of rows (rows, cols) for one forward each."""
    size = max(1, BATCH_TOKENS // rows.shape[1])
    return [slice(a, min(a + size, len(rows))) for a in range(0, len(rows), size)]


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
    """Block i's output for all rows, (rows, cols, hidden). `out` may be `states` itself."""
    if out is None:
        hidden = model.config.get_text_config(decoder=True).hidden_size
        out = torch.empty(*rows.shape, hidden, dtype=model.dtype)

    def run(part: slice) -> None:
        out[part] = model.run_block(i, rows[part], enter(states, part))

    parallel.each(run, batches(rows))
    return out
