"""Reference logits: model, rows, then row by row: run, write."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from exl3.cli import read_devices
from exl3.devices import pick_device
from exl3.errors import UserError
from exl3.evaluate.dataspec import check_context, load_dataspec
from exl3.evaluate.logits_writer import Planned, logits_writer
from exl3.evaluate.rows import check_tokens
from exl3.evaluate.stream import stream_logits, stream_work
from exl3.files import PARTIAL
from exl3.model.quantized import open_model
from exl3.progress import Progress


@dataclass(frozen=True)
class Request:
    """What to make. rows: at most so many, 0: all of the spec's."""

    model_dir: Path
    dataspec: Path
    out_logits: Path
    rows: int = 10
    rows_per_batch: int | None = None  # None: as many as memory is meant for
    device: str = "0"
    dtype: str = "float16"
    trust_remote_code: bool = False


def write_reference_logits(request: Request) -> None:
    """Writes the file, or what is missing of it. UserError for bad input."""
    _check(request)
    spec = load_dataspec(request.dataspec)
    device, note = pick_device(request.device, "-dev", kernels=False)
    for line in (*spec.notes, *filter(None, [note])):
        print(line)
    model = open_model(request.model_dir, request.trust_remote_code, device=device)
    check_context(spec, model.config)
    every = spec.rows(request.trust_remote_code)
    rows = every[: request.rows or None]
    vocab = model.head()[1].out_features
    check_tokens(f"{request.dataspec}: tokenizer_dir", every, vocab, request.model_dir)
    planned = Planned.of(model.checkpoint.fingerprint(), rows, vocab, request.dtype)
    out = request.out_logits
    if planned.is_complete(out):
        print(f"{out} is complete already")
        return
    _refuse_full_disk(out, planned)
    with logits_writer(out, planned) as writer:
        _introduce(request, planned, len(every), writer.done)
        left = rows[writer.done :]
        with Progress(stream_work(model, rows), "Reference logits") as progress:
            progress.skip(stream_work(model, rows[: writer.done]))
            for _, logits in stream_logits(model, left, request.rows_per_batch, progress=progress):
                if writer.add(logits):
                    progress.say(
                        f"Row {writer.done - 1} has logits beyond what {request.dtype} can hold, "
                        "put to its largest value; --dtype float32 keeps them"
                    )
    print(f"Wrote {out}: {out.stat().st_size / 2**20:,.1f} MiB")


def _check(request: Request) -> None:
    """UserError for flags out of their range."""
    if request.rows < 0:
        raise UserError(f"-r {request.rows}: give a number of rows, or 0 for all")
    if request.rows_per_batch is not None and request.rows_per_batch < 1:
        raise UserError(f"-rpb {request.rows_per_batch}: give at least 1")
    read_devices(request.device, "-dev")
    if request.out_logits.is_dir():
        raise UserError(f"-o {request.out_logits}: this is a folder; give the name of a file")


def _introduce(request: Request, planned: Planned, every: int, done: int) -> None:
    """Tells what will be done."""
    size = planned.rows * planned.row_bytes / 2**30
    print(f"Logits of {request.model_dir} for the rows of {request.dataspec}")
    print(
        f"  {planned.rows} of {every} rows, {planned.length} tokens each, vocabulary "
        f"{planned.vocab}, {planned.dtype}: {size:,.2f} GiB"
    )
    if done:
        print(f"  {done} rows are there already")


def _refuse_full_disk(out: Path, planned: Planned) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + PARTIAL)
    there = partial.stat().st_size if partial.exists() else 0
    needed = planned.rows * planned.row_bytes - there
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise UserError(
            f"{out}: the logits take {needed / 2**30:,.2f} GiB more, but the disk has "
            f"{free / 2**30:,.2f} GiB free; give fewer rows with -r, or another -o"
        )
