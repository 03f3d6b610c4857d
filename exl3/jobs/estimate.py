"""What a conversion will make and take, told before it begins: sizes, memory, time."""

import resource
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from exl3 import ops, parallel
from exl3.errors import UserError
from exl3.format.directory import small_files
from exl3.format.layer import padded
from exl3.jobs.blocks import BATCH_TOKENS
from exl3.jobs.plan import Plan
from exl3.jobs.settings import Settings, partial_folder
from exl3.jobs.stored import stored_modules
from exl3.model.streamed import StreamedModel

GIB = 2**30
JOB_FILES = ("layers/*", "calibration.safetensors", "states.safetensors")
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
    tokens = settings.cal_rows * settings.cal_cols
    return Estimate(
        plan.average,
        plan.weights,
        output_bytes(settings, model, plan),
        work_bytes(settings, model, plan, settings.cal_rows),
        resident_bytes() + _peak(settings, model, plan),
        _seconds(model, plan, tokens),
    )


def output_bytes(settings: Settings, model: StreamedModel, plan: Plan) -> int:
    """Of the output folder."""
    stored = list(stored_modules(settings, model, plan, _nothing))
    entries = ENTRY * sum(len(module.tensors) for module in stored)
    small = sum(path.stat().st_size for path in small_files(Path(settings.in_dir)))
    return sum(module.nbytes for module in stored) + entries + small


def work_bytes(settings: Settings, model: StreamedModel, plan: Plan, rows: int) -> int:
    """Of the work folder at its largest: finished layers, rows, states old and new."""
    stored = stored_modules(settings, model, plan, _nothing)
    layers = sum(module.nbytes + ENTRY for module in stored if module.bits is not None)
    return layers + rows * settings.cal_cols * 8 + 2 * _states(settings, model, rows)


def refuse_full_disks(settings: Settings, model: StreamedModel, plan: Plan, rows: int) -> None:
    """UserError if a disk has too little room for what the job will write to it."""
    needs: dict[int, list[tuple[Path, int]]] = {}
    partial, work = partial_folder(settings.out_dir), Path(settings.work_dir)
    for folder, need in (
        (partial, output_bytes(settings, model, plan) - _present(partial, "*")),
        (work, work_bytes(settings, model, plan, rows) - _present(work, *JOB_FILES)),
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


def resident_bytes() -> int:
    """The memory this process has taken at its peak so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _peak(settings: Settings, model: StreamedModel, plan: Plan) -> int:
    """Bytes on top of the program itself: the larger of the largest block and the head."""
    always = _bytes(model, model.embedding_keys()) + _states(settings, model, settings.cal_rows)
    return always + max(max(_block_peaks(settings, model)), _head_peak(settings, model, plan))


def _block_peaks(settings: Settings, model: StreamedModel) -> Iterator[int]:
    """A block, its Hessians and its largest linear; or a block and what runs through it."""
    batch = max(BATCH_TOKENS, settings.cal_cols) * parallel.threads()
    for i in range(model.num_blocks):
        linears = list(model.block_linears(i).values())
        block = _bytes(model, model.block_keys(i))
        inputs = {
            (linear.in_features, linear.out_features > linear.in_features) for linear in linears
        }
        hessians = 4 * sum(features**2 for features, _ in inputs)
        running = 4 * batch * sum(linear.in_features + linear.out_features for linear in linears)
        yield block + hessians + max(running, max(map(_linear_peak, linears)))


def _head_peak(settings: Settings, model: StreamedModel, plan: Plan) -> int:
    key, head = model.head()
    if key not in plan.bits:
        return 0
    own = 0 if model.tied_head else 4 * head.weight.numel()
    return own + 4 * head.in_features**2 + _linear_peak(head)


def _linear_peak(linear: torch.nn.Linear) -> int:
    """Of quantize_linear: three and a half copies of the weight, six of a float64 Hessian."""
    rows, columns = padded(linear.in_features), padded(linear.out_features)
    return int(3.5 * 4 * rows * columns) + 6 * 8 * rows**2


def _states(settings: Settings, model: StreamedModel, rows: int) -> int:
    hidden = model.config.get_text_config(decoder=True).hidden_size
    return 4 * rows * settings.cal_cols * hidden


def _bytes(model: StreamedModel, keys: list[str]) -> int:
    """Of checkpoint tensors in the dtype they are loaded in."""
    size = model.dtype.itemsize
    return sum(size * torch.Size(model.checkpoint.shape(key)).numel() for key in keys)


def _seconds(model: StreamedModel, plan: Plan, tokens: int) -> float:
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
    # Two forwards and a Hessian, which takes about as long as one.
    return searched * a_weight * 1.2 + 3 * plan.weights * tokens * a_product


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
