"""The finished model's folder: it appears whole or not at all."""

import os
import shutil
import tempfile
from pathlib import Path

from exl3 import __version__
from exl3.errors import JobError, UserError
from exl3.files import sync_folder
from exl3.format.directory import (
    FORMAT_VERSION,
    StoredModule,
    copy_small_files,
    read_config,
    write_configs,
    write_weights,
)
from exl3.format.manifest import file_bytes, write_manifest
from exl3.format.verify import shortened, verify
from exl3.jobs.plan import UNQUANTIZED, Plan
from exl3.jobs.settings import Settings, partial_folder
from exl3.jobs.source import Source
from exl3.jobs.stored import stored_modules
from exl3.jobs.workdir import WorkDir
from exl3.model.rope import with_rope
from exl3.progress import Progress

MARK = ".exl3-partial"  # in the folder of an output that is not complete yet
NO_LIMIT = 1 << 62  # bytes of a shard


def refuse_strangers(settings: Settings) -> None:
    """UserError if the output folder cannot be made, or holds what no job of ours wrote."""
    folder, partial = Path(settings.out_dir), partial_folder(settings.out_dir)
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


def is_complete(settings: Settings, job_id: str) -> bool:
    """Whether the output is there already; UserError if it is that of another job."""
    found = _job_of(Path(settings.out_dir))
    if found not in (None, job_id):
        raise UserError(f"-o {settings.out_dir} holds the result of another job; give a new folder")
    return found == job_id


def _job_of(folder: Path) -> str | None:
    """The job that wrote a model folder, None if it was not one of ours."""
    if not (folder / "config.json").is_file():
        return None
    quantization = read_config(folder).get("quantization_config")
    producer = quantization.get("producer") if isinstance(quantization, dict) else None
    return producer.get("job") if isinstance(producer, dict) else None


def write(settings: Settings, work: WorkDir, source: Source, plan: Plan) -> str:
    """Writes the model folder from the source and the finished layers. Returns what it holds."""
    target, origin = Path(settings.out_dir), Path(settings.in_dir)
    folder = partial_folder(settings.out_dir)
    if folder.exists():
        refuse_strangers(settings)
        shutil.rmtree(folder)  # of a run that was killed
    folder.mkdir(parents=True)
    (folder / MARK).write_text(source.job_id)
    stored = list(stored_modules(settings, source.model, plan, work.load_layer))
    write_weights(folder, stored, (settings.shard_size << 20) or NO_LIMIT)
    config = with_rope(read_config(origin), source.model.rope_parameters)
    write_configs(folder, config, quantization_config(settings, source, plan, stored), stored)
    copy_small_files(origin, folder)
    _refuse_unsound(folder, target)
    _write_sums(folder)
    (folder / MARK).unlink()
    if target.exists():
        target.rmdir()  # empty: `refuse_strangers` has looked
    folder.rename(target)
    sync_folder(target.parent)
    size = sum(module.nbytes for module in stored) / 2**20
    head = "unquantized" if settings.head_bits == UNQUANTIZED else f"{settings.head_bits} bits"
    return (
        f"{size:,.1f} MiB; {plan.average:.3f} bits per weight, "
        f"{stored_bits(plan, stored):.3f} with scales; head {head}"
    )


def _refuse_unsound(folder: Path, target: Path) -> None:
    """JobError if what was written is not what a reader must find."""
    if problems := verify(folder, hashes=False).problems:
        raise JobError(
            f"what was written is not a sound EXL3 model; it stays in {folder} and did not become "
            f"{target}:\n{shortened(problems)}"
        )


def _write_sums(folder: Path) -> None:
    """The last file: hashes of all others."""
    with Progress(file_bytes(folder), "Hashing") as progress:
        progress.doing("all files")
        write_manifest(folder, progress.advance)


def quantization_config(
    settings: Settings, source: Source, plan: Plan, stored: list[StoredModule]
) -> dict:
    """What the configs say about how the quant was made."""
    rows, cols = source.rows.shape
    return {
        "quant_method": "exl3",
        "version": FORMAT_VERSION,
        "bits": round(plan.average, 2),
        "head_bits": settings.head_bits,
        "calibration": {"rows": rows, "cols": cols},
        "out_scales": settings.out_scales,
        "codebook": settings.codebook,
        "producer": {
            "name": "exl3",
            "version": __version__,
            "job": source.job_id,
            "seed": settings.seed,
            "hq": settings.hq,
            "calibration_hash": source.identity["calibration rows"],
            "stored_bits": round(stored_bits(plan, stored), 4),
        },
    }


def stored_bits(plan: Plan, stored: list[StoredModule]) -> float:
    """Bits a weight of the decoder's linears, with everything they are stored as."""
    decoder = {module.key for module in plan.modules}
    return 8 * sum(m.nbytes for m in stored if m.name in decoder) / plan.weights
