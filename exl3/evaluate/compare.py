"""Runs models over evaluation rows, block by block, and scores them against the first of them."""

from collections.abc import Sequence
from pathlib import Path

import torch

from exl3 import parallel
from exl3.evaluate.metrics import Scores
from exl3.model.quantized import open_model
from exl3.model.streamed import StreamedModel
from exl3.progress import Progress


def compare(
    reference: str | Path,
    quants: Sequence[str | Path],
    rows: torch.Tensor,
    quiet: bool = True,
    title: str = "Comparing",
    **loading: object,
) -> list[Scores]:
    """Scores of the reference (against itself) and of every quant, on rows of ids (rows, cols).

    Models run in float32, one block in memory at a time. quiet: shows no progress. loading: what
    else `open_model` takes.
    """
    folders = (reference, *quants)
    models = [open_model(folder, **loading) for folder in folders]
    work = sum(model.num_blocks for model in models) + len(rows)
    with parallel.one_thread_per_op(), Progress(work, title, quiet) as progress:
        states = []
        for folder, model in zip(folders, models, strict=True):
            progress.doing(Path(folder).name)
            states.append(last_states(model, rows, progress))
            model.load_tail()
        scores = [Scores() for _ in models]
        progress.doing("scoring")
        for row in range(len(rows)):
            part = slice(row, row + 1)
            logits = [m.run_tail(rows[part], s[part]) for m, s in zip(models, states, strict=True)]
            for score, own in zip(scores, logits, strict=True):
                score.add(logits[0], own, rows[part])
            progress.advance(1)
        return scores


def last_states(model: StreamedModel, rows: torch.Tensor, progress: Progress) -> torch.Tensor:
    """What leaves the last block, (rows, cols, hidden), with one block in memory at a time."""
    model.load_embedding()
    states: list[torch.Tensor] | list[None] = [None] * len(rows)
    for i in range(model.num_blocks):
        model.load_block(i)
        states = parallel.each(
            lambda row, i=i, states=states: model.run_block(i, rows[row : row + 1], states[row]),
            range(len(rows)),
        )
        model.free_block(i)
        progress.advance(1)
    return torch.cat(states)
