"""Runs models over evaluation rows, block by block, and scores them against the first of them."""

from collections.abc import Callable
from pathlib import Path

import torch

from exl3 import parallel
from exl3.evaluate.metrics import Scores
from exl3.model.quantized import open_model
from exl3.model.streamed import StreamedModel


def compare(
    reference: str | Path,
    quants: list[str | Path],
    rows: torch.Tensor,
    doing: Callable[[str], None] = lambda step: None,
) -> list[Scores]:
    """Scores of the reference (against itself) and of every quant, on rows of ids (rows, cols).

    Models run in float32, one block in memory at a time. `doing` hears what is under way.
    """
    with parallel.one_thread_per_op():
        models, states = [], []
        for folder in (reference, *quants):
            doing(f"running {Path(folder).name}")
            model = open_model(folder)
            models.append(model)
            states.append(last_states(model, rows))
        for model in models:
            model.load_tail()
        scores = [Scores() for _ in models]
        for row in range(len(rows)):
            doing(f"scoring row {row + 1} of {len(rows)}")
            part = slice(row, row + 1)
            logits = parallel.each(
                lambda ms, part=part: ms[0].run_tail(rows[part], ms[1][part]),
                zip(models, states, strict=True),
            )
            for score, own in zip(scores, logits, strict=True):
                score.add(logits[0], own, rows[part])
        return scores


def last_states(model: StreamedModel, rows: torch.Tensor) -> torch.Tensor:
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
    return torch.cat(states)
