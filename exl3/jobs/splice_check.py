"""How near splices are to the original model, on rows that no measurement has seen.

What was measured is kept in OUT.exl3-verified until the output is there, a line at a time, so that
a killed job measures nothing twice.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from exl3.data.rows import evaluation_rows, rows_hash
from exl3.data.texts import read_texts
from exl3.data.tokenizer import load_tokenizer
from exl3.devices import CPU
from exl3.errors import UserError
from exl3.evaluate.metrics import mean_and_error, row_kld
from exl3.evaluate.rows import check_tokens
from exl3.evaluate.stream import stream_logits, stream_work
from exl3.files import take_lock
from exl3.jobs.perplexity import held_out_texts
from exl3.model.quantized import OTHER_ROPE, QuantizedCheckpoint, like_quant, open_model
from exl3.model.spliced import SplicedCheckpoint
from exl3.model.streamed import StreamedModel
from exl3.progress import Progress
from exl3.splice import Splice

LENGTH = 512  # tokens of a row
TOGETHER = 3  # splices in one pass over the original: each has a block of its own in memory
HEADER = {"format": "exl3-verified", "version": 1}


@dataclass(frozen=True)
class Measured:
    """KL divergence of a splice from the original, mean per token, in nats."""

    kld: float
    error: float  # standard error over the rows


class Notes:
    """What has been measured so far; the file is also the lock of the output."""

    def __init__(self, file: IO[str], known: dict[str, Measured]) -> None:
        self.file, self.known = file, known

    def add(self, key: str, found: Measured) -> None:
        self.known[key] = found
        line = {"key": key, "kld": found.kld, "error": found.error}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())


@contextlib.contextmanager
def notes_of(out_dir: Path) -> Iterator[Notes]:
    """The notes beside an output, which no other process may write meanwhile.

    They are removed when the context ends well, and stay otherwise.
    """
    path = out_dir.with_name(out_dir.name + ".exl3-verified")
    with open(path, "a+", encoding="utf-8") as file:
        if not take_lock(file):
            raise UserError(f"another process is working on {out_dir}; wait for it to end")
        file.seek(0)
        content = file.read()
        header, *lines = content.splitlines() or [json.dumps(HEADER)]
        if header != json.dumps(HEADER):
            raise UserError(f"{path}, where notes would be kept, is something else; move it away")
        if not content:
            file.write(header)
        if not content.endswith("\n"):  # of a new file, or of a line cut short by a kill
            file.write("\n")
        notes = Notes(file, dict(_read(lines)))
        yield notes
    path.unlink(missing_ok=True)


def _read(lines: Sequence[str]) -> Iterator[tuple[str, Measured]]:
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # cut short by a kill
            told = json.loads(line)
            yield str(told["key"]), Measured(float(told["kld"]), float(told["error"]))


def held_out_rows(
    original: Path, rows: int, text: Path | None, trust_remote_code: bool
) -> torch.Tensor:
    """Rows (rows, cols) of built-in text that is never part of a measurement, or of a file."""
    config = open_model(original, trust_remote_code).config.get_text_config(decoder=True)
    length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)
    texts = read_texts(text) if text else held_out_texts()
    tokenizer = load_tokenizer(original, trust_remote_code)
    found = evaluation_rows(tokenizer, "\n\n".join(texts), length, rows)
    check_tokens(text or "the built-in text", found, config.vocab_size, original)
    return found


def measure(
    original: Path,
    splices: Sequence[Splice],
    rows: torch.Tensor,
    notes: Notes,
    trust_remote_code: bool = False,
    quiet: bool = False,
    device: torch.device = CPU,
    kept: list[torch.Tensor] | None = None,
) -> list[Measured]:
    """Measures every splice on rows of ids (rows, cols), without writing it; all of one model.

    kept: the same list for all calls about the same rows spares those after the first the
    original's blocks.
    """
    reference, quant = (
        open_model(folder, trust_remote_code, device=device)
        for folder in (original, splices[0].quants[0].folder)
    )
    reference = like_quant(reference, quant, trust_remote_code)
    base = [reference.checkpoint.fingerprint(), rows_hash(rows)]
    if reference.rope_parameters:
        base.append(reference.rope_parameters)
        if not quiet:
            print(f"Note: {OTHER_ROPE}")
    kept = [] if kept is None else kept
    keys = [_key(splice, base) for splice in splices]
    missing = {k: s for k, s in zip(keys, splices, strict=True) if k not in notes.known}
    parts = [list(missing)[i : i + TOGETHER] for i in range(0, len(missing), TOGETHER)]
    work = stream_work(reference, rows) * (len(missing) + len(parts))
    with Progress(work, "Measuring", quiet) as progress:
        for part in parts:
            models = [_open(missing[key], trust_remote_code, device) for key in part]
            found = _measure(reference, models, rows, progress, kept)
            for key, measured in zip(part, found, strict=True):
                notes.add(key, measured)
    return [notes.known[key] for key in keys]


def _key(splice: Splice, base: Sequence[Any]) -> str:
    """What a measurement depends on."""
    quants = [quant.fingerprint for quant in splice.quants]
    text = json.dumps([*base, quants, splice.origin], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _open(splice: Splice, trust_remote_code: bool, device: torch.device) -> StreamedModel:
    quants = [QuantizedCheckpoint(quant.folder) for quant in splice.quants]
    return StreamedModel(
        splice.quants[0].folder,
        checkpoint=SplicedCheckpoint(quants, splice.origin),
        device=device,
        dtype=torch.float32,
        trust_remote_code=trust_remote_code,
    )


def _measure(
    reference: StreamedModel,
    models: Sequence[StreamedModel],
    rows: torch.Tensor,
    progress: Progress,
    kept: list[torch.Tensor],
) -> list[Measured]:
    """kept: the original's last states."""
    klds: list[list[torch.Tensor]] = [[] for _ in models]
    streams = [stream_logits(model, rows, progress=progress) for model in models]
    streams.insert(0, stream_logits(reference, rows, progress=progress, kept=kept))
    for (_, expected), *others in zip(*streams, strict=True):
        for own, (_, logits) in zip(klds, others, strict=True):
            own.append(row_kld(logits, expected))
    return [Measured(*mean_and_error(own)[:2]) for own in klds]
