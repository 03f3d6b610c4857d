"""Rows of token ids: to calibrate with and to evaluate on."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from exl3.data.builtin import builtin_texts
from exl3.data.texts import read_dataset, read_texts
from exl3.errors import UserError

# Percent of the rows of the built-in mix. Random tokens reach inputs that text never does.
MIX = {"prose": 55, "code": 35, "random": 10}


@dataclass(frozen=True)
class TextSource:
    """Where the user's calibration text comes from.

    place: a file or folder, or a dataset's name. split, column: of a dataset. stride: tokens from
    row to row; None spreads the rows evenly over the text.
    """

    place: str
    split: str = "train"
    column: str | None = None
    stride: int | None = None

    def texts(self) -> list[str]:
        if Path(self.place).is_file():
            return read_texts(self.place)
        return read_dataset(self.place, self.split, self.column)


def calibration_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: int = 250,
    cols: int = 2048,
    source: TextSource | str | Path | None = None,
    seed: int = 0,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """Token ids (rows, cols), int64, from the user's text or from the built-in mix.

    Of a longer text an even sample comes back, of a shorter one all the rows it holds: fewer
    than asked. `seed` draws the random rows of the mix. `vocab_size` is the model's number of
    embeddings, by default the tokenizer's of tokens. Raises UserError for a text of less than a
    row, and for tokens that the model lacks.
    """
    limit = vocab_size or len(tokenizer)
    if source is None:
        ids = builtin_rows(tokenizer, rows, cols, seed, limit)
    else:
        source = source if isinstance(source, TextSource) else TextSource(str(source))
        ids = text_source_rows(tokenizer, source, rows, cols)
    if ids.max() >= limit:
        raise UserError(
            f"{tokenizer.name_or_path or 'tokenizer'}: it gives token {ids.max()}, but there are "
            f"only {limit} embeddings; use the tokenizer that belongs to the model."
        )
    return ids


def evaluation_rows(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    length: int,
    rows: int | None = None,
    stride: int | None = None,
) -> torch.Tensor:
    """Windows (rows, length) of a text's tokens, one each `stride` (default: `length`) tokens.

    `rows` limits their number. Raises UserError if the text is not longer than one window.
    """
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    starts = range(0, len(tokens) - length, stride or length)[:rows]
    if not starts:
        raise UserError(
            f"The evaluation text holds {len(tokens)} tokens, too few for rows of {length}; "
            "give a longer text or shorter rows."
        )
    return torch.stack([tokens[start : start + length] for start in starts])


def rows_hash(rows: torch.Tensor) -> str:
    """SHA-256 of the shape and of the ids as little-endian int64."""
    shape = ",".join(map(str, rows.shape))
    return hashlib.sha256(shape.encode() + b":" + rows.numpy().astype("<i8").tobytes()).hexdigest()


def text_source_rows(
    tokenizer: PreTrainedTokenizerBase, source: TextSource, rows: int, cols: int
) -> torch.Tensor:
    """At most `rows` rows (n, cols) of consecutive tokens."""
    tokens = np.fromiter(token_stream(tokenizer, source.texts()), dtype=np.int64)
    if len(tokens) < cols:
        raise UserError(
            f"{source.place}: the text holds {len(tokens)} tokens, less than one row of {cols}; "
            "give a longer one or shorter rows."
        )
    starts = np.arange(0, len(tokens) - cols + 1, source.stride or cols)
    used = min(rows, len(starts))
    picks = np.arange(used) if source.stride else np.arange(used) * len(starts) // used
    return torch.from_numpy(tokens[starts[picks][:, None] + np.arange(cols)])


def builtin_rows(
    tokenizer: PreTrainedTokenizerBase, rows: int, cols: int, seed: int, limit: int
) -> torch.Tensor:
    """Rows (rows, cols) of prose, code and random ids below `limit`, in the proportions of MIX."""
    sources = {
        "prose": text_rows(tokenizer, "prose", cols),
        "code": text_rows(tokenizer, "code", cols),
        "random": random_rows(tokenizer, cols, seed, limit),
    }
    return torch.stack([next(sources[kind]) for kind in row_kinds(rows)])


def row_kinds(rows: int) -> Iterator[str]:
    """The kind of each row: whichever is furthest behind its share of the rows so far."""
    done = dict.fromkeys(MIX, 0)
    for row in range(1, rows + 1):
        behind = {kind: percent * row - 100 * done[kind] for kind, percent in MIX.items()}
        kind = max(behind, key=behind.__getitem__)
        done[kind] += 1
        yield kind


def text_rows(tokenizer: PreTrainedTokenizerBase, kind: str, cols: int) -> Iterator[torch.Tensor]:
    """Rows (cols,) of built-in text without end, tokenized as far as they are taken."""
    ids = endless_ids(tokenizer, kind)
    while True:
        yield torch.tensor(list(islice(ids, cols)))


def endless_ids(tokenizer: PreTrainedTokenizerBase, kind: str) -> Iterator[int]:
    """Tokens of the built-in text of a kind, over and over.

    Each turn leaves out one more token at its start, so that no two turns are cut into the same
    rows.
    """
    for turn in count():
        texts = (text for _, text in builtin_texts(kind))
        ids = islice(token_stream(tokenizer, texts), turn, None)
        first = next(ids, None)
        if first is None:
            raise UserError("The tokenizer finds no tokens in text; check its files.")
        yield first
        yield from ids


def random_rows(
    tokenizer: PreTrainedTokenizerBase, cols: int, seed: int, limit: int
) -> Iterator[torch.Tensor]:
    """Rows (cols,) of ordinary tokens below `limit` without end, each as likely as any other."""
    added = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    ordinary = set(tokenizer.get_vocab().values()) - added
    ids = torch.tensor(sorted(token for token in ordinary if token < limit))
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield ids[torch.randint(len(ids), (cols,), generator=generator)]


def token_stream(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[int]:
    """Tokens of documents: BOS before each, EOS between them, where the tokenizer has those."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    before = [bos]
    for text in texts:
        yield from (token for token in before if token is not None)
        yield from tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        before = [eos] if bos == eos else [eos, bos]  # some use one token as both
