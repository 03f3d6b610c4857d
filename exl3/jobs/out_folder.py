"""The folder that a job writes a model to: put together beside it under another name, checked, and
renamed when it is complete. What others wrote is never touched."""

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from exl3.errors import JobError, UserError
from exl3.files import sync_folder
from exl3.format.directory import read_config
from exl3.format.manifest import file_bytes, write_manifest
from exl3.format.verify import shortened, verify
from exl3.jobs.settings import partial_folder
from exl3.progress import Progress

MARK = ".exl3-partial"  # in the folder of an output that is not complete yet
NO_LIMIT = 1 << 62  # bytes of a shard


def refuse_strangers(out_dir: str | Path) -> None:
    """UserError if the output folder cannot be made, or holds what no job of ours wrote."""
    folder, partial = Path(out_dir), partial_folder(str(out_dir))
    if folder.exists():
        if not folder.is_dir():
            raise UserError(f"-o {folder} is a file; give a folder that does not exist yet")
        if os.path.ismount(folder):
            raise UserError(f"-o {folder} is a mount point; give a folder inside it")
        if any(folder.iterdir()):
            if _job_of(folder) is None:
                raise UserError(f"-o {folder} is not empty; give a new folder, or empty this one")
            return
    _refuse_unwritable(folder.parent)
    if partial.exists() and not _is_ours(partial):
        raise UserError(
            f"{partial}, where the output would be put together, holds something else; move it away"
        )


def _is_ours(partial: Path) -> bool:
    """Whether a folder is what a killed run of ours left; anything else must stay."""
    return partial.is_dir() and ((partial / MARK).is_file() or not any(partial.iterdir()))


def _refuse_unwritable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"-o: {folder} cannot be written to ({error.strerror}); choose another place"
        ) from None


def refuse_overlap(out_dir: Path, inputs: Iterable[Path]) -> None:
    """UserError if the output folder would touch one that it is made of."""
    for out in (out_dir.resolve(), partial_folder(str(out_dir)).resolve()):
        for path in inputs:
            if out.is_relative_to(path.resolve()) or path.resolve().is_relative_to(out):
                raise UserError(f"-o {out_dir} and {path} overlap; give folders apart")


def is_complete(out_dir: str | Path, job_id: str) -> bool:
    """Whether the output is there already; UserError if it is that of another job."""
    found = _job_of(Path(out_dir))
    if found not in (None, job_id):
        raise UserError(f"-o {out_dir} holds the result of another job; give a new folder")
    return found == job_id


def _job_of(folder: Path) -> str | None:
    """The job that wrote a model folder, None if it was not one of ours."""
    if not (folder / "config.json").is_file():
        return None
    quantization = read_config(folder).get("quantization_config")
    producer = quantization.get("producer") if isinstance(quantization, dict) else None
    return producer.get("job") if isinstance(producer, dict) else None


def shard_bytes(megabytes: int) -> int:
    """The limit of a shard that `-ss` asks for; 0: none."""
    return (megabytes << 20) or NO_LIMIT


def begin(out_dir: str | Path, job_id: str) -> Path:
    """An empty folder, marked as ours, in which the output is put together."""
    folder = partial_folder(str(out_dir))
    if folder.exists():
        refuse_strangers(out_dir)
        shutil.rmtree(folder)  # of a run that was killed
    folder.mkdir(parents=True)
    (folder / MARK).write_text(job_id)
    return folder


def finish(folder: Path, out_dir: str | Path) -> None:
    """Checks and hashes what was put together and gives it its name.

    JobError if it is not what a reader must find.
    """
    target = Path(out_dir)
    if problems := verify(folder, hashes=False).problems:
        raise JobError(
            f"what was written is not a sound EXL3 model; it stays in {folder} and did not become "
            f"{target}:\n{shortened(problems)}"
        )
    with Progress(file_bytes(folder), "Hashing") as progress:
        progress.doing("all files")
        write_manifest(folder, progress.advance)  # last of the files: it lists all others
    (folder / MARK).unlink()
    if target.exists():
        target.rmdir()  # empty: `refuse_strangers` has looked
    folder.rename(target)
    sync_folder(target.parent)
