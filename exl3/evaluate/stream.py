"""Logits of a streamed model, row by row, in memory that does not grow with the rows.

Rows go through the blocks in chunks, one pass over the model a chunk, so that the hidden states of
a chunk fit the memory meant for them. Every row is a forward of its own and every piece of the tail
has a fixed size: neither chunks nor threads change a bit of the logits.
"""

from collections.abc import Iterator

import torch

from exl3 import parallel
from exl3.model.streamed import StreamedModel
from exl3.progress import Progress

STATES_BYTES = 2 << 30
TAIL_TOKENS = 128  # of one piece of a row in norm and head; part of the result's definition


def stream_logits(
    model: StreamedModel,
    rows: torch.Tensor,
    rows_per_batch: int | None = None,
    states_bytes: int = STATES_BYTES,
    progress: Progress | None = None,
    kept: list[torch.Tensor] | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Pairs of a row's number and its logits, (1, length, vocab), in order; rows: ids (n, length).

    At most `rows_per_batch` rows, and `states_bytes` of hidden states, go through the blocks
    together. progress: is advanced by `stream_work(model, rows)` in all. What is loaded is freed
    when the iterator ends or is closed. kept: takes what leaves the last block, where all rows go
    together, and spares later calls with the same model and rows the blocks.
    """
    size = chunk_rows(model, rows.shape[1], rows_per_batch, states_bytes)
    try:
        model.load_embedding()
        for first in range(0, len(rows), size):
            chunk = rows[first : first + size]
            states = list(kept or ())
            if not states:
                states = _last_states(model, chunk, progress)
                if kept is not None and size >= len(rows):
                    kept.extend(states)
            elif progress is not None:
                progress.advance(len(rows) * model.num_blocks)
            model.load_tail()
            for row in range(len(chunk)):
                logits = row_logits(model, chunk[row : row + 1], states[row])
                states[row] = None
                if progress is not None:
                    progress.advance(1)
                yield first + row, logits
                del logits  # or there are two of them while the next is made
            model.free_tail()
    finally:
        model.free_tail()
        model.free_embedding()


def stream_work(model: StreamedModel, rows: torch.Tensor) -> int:
    """Work in `stream_logits` as its progress counts it: rows through blocks, and the tail."""
    return len(rows) * (model.num_blocks + 1)


def chunk_rows(
    model: StreamedModel, length: int, rows_per_batch: int | None, states_bytes: int
) -> int:
    """How many rows of `length` tokens go through the blocks together."""
    hidden = model.config.get_text_config(decoder=True).hidden_size
    fitting = max(1, states_bytes // (length * hidden * model.dtype.itemsize))
    return min(fitting, rows_per_batch or fitting)


def _last_states(
    model: StreamedModel, rows: torch.Tensor, progress: Progress | None
) -> list[torch.Tensor]:
    """What leaves the last block, (1, length, hidden) a row, with one block in memory at a time."""
    states: list[torch.Tensor | None] = [None] * len(rows)

    def advance(row: int) -> None:
        states[row] = model.run_block(i, rows[row : row + 1], states[row])

    for i in range(model.num_blocks):
        if progress is not None:
            progress.doing(model.block_name(i))
        model.load_block(i)
        try:
            # Only here: a generator that is left halfway must not keep torch on one thread.
            with parallel.one_thread_per_op(), parallel.work_on(model.device):
                parallel.each(advance, range(len(rows)))
        finally:
            model.free_block(i)
        if progress is not None:
            progress.advance(len(rows))
    return states


def row_logits(model: StreamedModel, row: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """Logits (1, length, vocab) of one row, on the model's device; norm and head know no position,
    so it may be cut."""
    vocab = model.head()[1].out_features
    out = torch.empty(*row.shape, vocab, dtype=model.dtype, device=model.device)

    def piece(start: int) -> None:
        part = slice(start, start + TAIL_TOKENS)
        out[:, part] = model.run_tail(row[:, part], state[:, part])

    with parallel.one_thread_per_op(), parallel.work_on(model.device):
        parallel.each(piece, range(0, row.shape[1], TAIL_TOKENS))
    return out
