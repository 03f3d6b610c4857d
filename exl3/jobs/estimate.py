"""What a conversion will make and take, told before it begins: sizes, memory, time."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from exl3 import ops, parallel
from exl3.errors import UserError
from exl3.format.directory import small_files
from exl3.jobs.boundaries import boundary_bytes
from exl3.jobs.plan import Plan
from exl3.jobs.settings import Settings, partial_folder
from exl3.jobs.stored import stored_modules
from exl3.jobs.thrift import (
    Thrift,
    choose_thrift,
    peak_bytes,
    resident_bytes,
    spilled_bytes,
    states_bytes,
)
from exl3.jobs.tune_plan import STEP_TOKENS, tuned_bytes, whole_tuning_bytes
from exl3.model.streamed import StreamedModel

GIB = 2**30
JOB_FILES = ("layers/*", "calibration.safetensors", "states.safetensors", "gradients/*")
ENTRY = 400  # bytes of configs, index and headers for every tensor


@dataclass
class Estimate:
    """Bytes and seconds of a conversion."""

    average: float  # bits a weight of the codes
    weights: int
    output: int
    work: int  # of the work folder at its largest
    memory: int  # at its peak, everything included
    seconds: float

    def text(self) -> str:
        return "\n".join(
            (
                f"{self.average:.3f} bits per weight, {self.weights:,} weights",
                f"output   {_size(self.output)}",
                f"work     {_size(self.work)} (may be deleted afterwards)",
                f"memory   {_size(self.memory)} at the peak",
                f"time     about {_duration(self.seconds)} on this machine, "
                f"{parallel.threads()} threads",
            )
        )


def estimate(settings: Settings, model: StreamedModel, plan: Plan) -> Estimate:
    """Estimates a conversion from shapes, and from a short try of this machine's speed."""
    thrift = choose_thrift(settings, model, plan, settings.cal_rows)
    return Estimate(
        plan.average,
        plan.weights,
        output_bytes(settings, model, plan),
        work_bytes(settings, model, plan, settings.cal_rows, thrift),
        max(
            resident_bytes() + peak_bytes(settings, model, plan, settings.cal_rows, thrift),
            whole_tuning_bytes(settings, model, plan, thrift) or 0,
        ),
        _seconds(settings, model, plan),
    )


def output_bytes(settings: Settings, model: StreamedModel, plan: Plan) -> int:
    """Of the output folder."""
    stored = list(stored_modules(settings, model, plan, _nothing))
    entries = ENTRY * sum(len(module.tensors) for module in stored)
    small = sum(path.stat().st_size for path in small_files(Path(settings.in_dir)))
    return sum(module.nbytes for module in stored) + entries + small


def work_bytes(
    settings: Settings, model: StreamedModel, plan: Plan, rows: int, thrift: Thrift
) -> int:
    """Of the work folder at its largest: finished layers, rows, states old and new, gradients, and
    what memory has no room for."""
    stored = stored_modules(settings, model, plan, _nothing)
    layers = sum(module.nbytes + ENTRY for module in stored if module.bits is not None)
    streams = 1 if settings.no_correction else 2
    states = 2 * streams * states_bytes(settings, model, rows)  # old and new
    if settings.hessian == "kron":
        states += boundary_bytes(model, min(rows, settings.hessian_rows), settings.cal_cols)
    states += spilled_bytes(settings, model, rows, thrift)
    return layers + rows * settings.cal_cols * 8 + states + tuned_bytes(settings, model)


def refuse_full_disks(
    settings: Settings, model: StreamedModel, plan: Plan, rows: int, thrift: Thrift
) -> None:
    """UserError if a disk has too little room for what the job will write to it."""
    needs: dict[int, list[tuple[Path, int]]] = {}
    partial, work = partial_folder(settings.out_dir), Path(settings.work_dir)
    for folder, need in (
        (partial, output_bytes(settings, model, plan) - _present(partial, "*")),
        (work, work_bytes(settings, model, plan, rows, thrift) - _present(work, *JOB_FILES)),
    ):
        place = _existing(folder.parent)
        needs.setdefault(place.stat().st_dev, []).append((place, max(0, need)))
    for together in needs.values():
        need = sum(n for _, n in together)
        free = shutil.disk_usage(together[0][0]).free
        if need > free:
            places = " and ".join(str(place) for place, _ in together)
            raise UserError(
                f"the disk of {places} has {_size(free)} free, the job needs {_size(need)}; "
                "make room, or choose another disk for -o or -w"
            )


def _seconds(settings: Settings, model: StreamedModel, plan: Plan) -> float:
    """From the speed of a few tiles and of one product on one thread."""
    torch.manual_seed(0)
    tiles = torch.randn(64 * parallel.threads(), 256)
    ops.encode_tiles(tiles, 2, "mul1")  # the first call makes tables
    began = time.monotonic()
    ops.encode_tiles(tiles, 2, "mul1")
    a_weight = (time.monotonic() - began) / tiles.numel()
    matrix = torch.randn(1024, 1024)
    matrix @ matrix
    began = time.monotonic()
    matrix @ matrix
    a_product = (time.monotonic() - began) / 1024**3 / parallel.threads()
    key, head = model.head()
    searched = plan.weights + (head.weight.numel() if key in plan.bits else 0)
    return searched * a_weight * 1.2 + plan.weights * _passes(settings) * a_product


def _passes(settings: Settings) -> float:
    """How many tokens every weight meets, in forwards or in products that take about as long."""
    # Two forwards and a Hessian; with two streams there are parts of forwards for every stage.
    tokens = settings.cal_rows * (3.0 if settings.no_correction else 8.0)
    if settings.hessian == "kron":
        # Two forwards and backwards, and the Hessian of the outputs.
        tokens += 8.0 * min(settings.hessian_rows, settings.cal_rows)
    return tokens * settings.cal_cols + 4.0 * settings.tune * STEP_TOKENS


def _existing(path: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    while not path.exists():
        path = path.parent
    return path


def _present(folder: Path, *patterns: str) -> int:
    """Bytes of files that are there already and will be used or replaced."""
    files = (path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    return sum(path.stat().st_size for path in files)


def _nothing(key: str) -> dict[str, torch.Tensor]:
    raise AssertionError(f"{key} is wanted while only sizes are")


def _size(nbytes: float) -> str:
    return f"{nbytes / GIB:,.2f} GiB" if nbytes >= GIB else f"{nbytes / 2**20:,.1f} MiB"


def _duration(seconds: float) -> str:
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else f"{max(1, round(seconds))} s"
