"""Whether rows of tokens fit a model."""

from pathlib import Path

import torch

from exl3.errors import UserError


def check_tokens(source: str | Path, rows: torch.Tensor, vocab: int, model: str | Path) -> None:
    """UserError if rows of ids (n, length) hold tokens that a model of `vocab` tokens lacks."""
    if rows.max() >= vocab:
        raise UserError(
            f"{source}: the tokenizer gives token {rows.max()}, but {model} has only {vocab}; "
            "use the model's own tokenizer"
        )
