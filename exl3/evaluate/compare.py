"""Runs models over evaluation rows, block by block, and scores them against the first of them."""

from collections.abc import Sequence
from pathlib import Path

import torch

from exl3.evaluate.metrics import Scores
from exl3.evaluate.stream import stream_logits, stream_work
from exl3.model.quantized import open_model
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
    models = [open_model(folder, packed=True, **loading) for folder in (reference, *quants)]
    scores = [Scores() for _ in models]
    work = sum(stream_work(model, rows) for model in models)
    with Progress(work, title, quiet) as progress:
        streams = [stream_logits(model, rows, progress=progress) for model in models]
        for found in zip(*streams, strict=True):
            row, expected = found[0]
            for score, (_, logits) in zip(scores, found, strict=True):
                score.add(expected, logits, rows[row : row + 1])
    return scores
