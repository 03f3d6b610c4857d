"""What a conversion will make and take, told before it begins: sizes, memory, time."""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from exl3 import ops, parallel
from exl3.errors import UserError
from exl3.format.directory import small_files
from exl3.jobs.boundaries import boundary_bytes
from exl3.jobs.output_hessians import output_hessian_bytes
from exl3.jobs.plan import Plan, gradient_rows, traces_back
from exl3.jobs.settings import Settings, partial_folder
from exl3.jobs.stored import stored_modules
from exl3.jobs.survey import survey_folder
from exl3.jobs.thrift import (
    Thrift,
    choose_thrift,
    computing_bytes,
    peak_bytes,
    sharing_bytes,
    spilled_bytes,
    states_bytes,
)
from exl3.jobs.tune_plan import STEP_TOKENS, tuned_bytes, whole_tuning_bytes
from exl3.memory import GIB, resident_now
from exl3.model.streamed import StreamedModel

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
    card: int = 0  # of the GPU that runs the model
    sharing: int = 0  # of each other GPU

    def text(self) -> str:
        return "\n".join(
            (
                f"{self.average:.3f} bits per weight, {self.weights:,} weights",
                f"output   {_size(self.output)}",
                f"work     {_size(self.work)} (may be deleted afterwards)",
                f"memory   {_size(self.memory)} at the peak",
                *self._cards(),
                f"time     about {_duration(self.seconds)} on this machine, "
                f"{'one GPU' if self.card else f'{parallel.threads()} threads'}",
            )
        )

    def _cards(self) -> list[str]:
        if not self.card:
            return []
        others = f", {_size(self.sharing)} on each other" if self.sharing else ""
        return [f"GPU      {_size(self.card)} at the peak on the first{others}"]


def estimate(
    settings: Settings, model: StreamedModel, plan: Plan, others: Sequence[torch.device] = ()
) -> Estimate:
    """Estimates a conversion from shapes, and from a short try of this machine's speed.

    others: GPUs that share the linears with the one that runs the model.
    """
    thrift = choose_thrift(settings, model, plan, settings.cal_rows, others)
    given = settings, model, plan, settings.cal_rows, thrift
    memory = resident_now() + peak_bytes(*given)
    card, tuning = 0, whole_tuning_bytes(settings, model, plan, thrift) or 0
    if model.device.type == "cpu":
        memory = max(memory, tuning)
    else:
        card = max(computing_bytes(*given), tuning)
    return Estimate(
        plan.average,
        plan.weights,
        output_bytes(settings, model, plan),
        work_bytes(*given),
        memory,
        _seconds(settings, model, plan),
        card,
        sharing_bytes(settings, model) if others else 0,
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
    if traces_back(settings):
        traced = gradient_rows(settings, model, rows)
        states += boundary_bytes(model, traced, settings.cal_cols)
        tokens = traced * settings.cal_cols
        if survey_folder(settings, model, tokens) and not settings.save_hessians:
            states += output_hessian_bytes(model, range(model.num_blocks), tokens)
    states += spilled_bytes(settings, model, rows, thrift)
    return layers + rows * settings.cal_cols * 8 + states + tuned_bytes(settings, model)


def refuse_full_disks(
    settings: Settings, model: StreamedModel, plan: Plan, rows: int, thrift: Thrift
) -> None:
    """UserError if a disk has too little room for what the job will write to it."""
    needs: dict[int, list[tuple[Path, int]]] = {}
    partial, work = partial_folder(settings.out_dir), Path(settings.work_dir)
    places = [
        (partial, output_bytes(settings, model, plan) - _present(partial, "*")),
        (work, work_bytes(settings, model, plan, rows, thrift) - _present(work, *JOB_FILES)),
    ]
    if settings.save_hessians is not None:
        tokens = gradient_rows(settings, model, rows) * settings.cal_cols
        saved = output_hessian_bytes(model, range(model.num_blocks), tokens)
        folder = Path(settings.save_hessians)
        places.append((folder, saved - _present(folder, "*.safetensors")))
    for folder, need in places:
        place = _existing(folder.parent)
        needs.setdefault(place.stat().st_dev, []).append((place, max(0, need)))
    for together in needs.values():
        need = sum(n for _, n in together)
        free = shutil.disk_usage(together[0][0]).free
        if need > free:
            places = " and ".join(str(place) for place, _ in together)
            raise UserError(
                f"the disk of {places} has {_size(free)} free, the job needs {_size(need)}; "
                "make room, or choose other disks (-o, -w, --save_hessians)"
            )


def _seconds(settings: Settings, model: StreamedModel, plan: Plan) -> float:
    """From the speed of a few tiles and of one product, on one thread or the GPU."""
    count, size = (64 * parallel.threads(), 1024) if model.device.type == "cpu" else (8192, 4096)
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randn(count, 256, generator=generator).to(model.device)
    a_weight = _timed(lambda: ops.encode_tiles(tiles, 2, "mul1")[0]) / tiles.numel()
    matrix = torch.randn(size, size, generator=generator).to(model.device)
    a_product = _timed(lambda: matrix @ matrix) / size**3 / parallel.threads()
    key, head = model.head()
    searched = plan.weights + (head.weight.numel() if key in plan.bits else 0)
    return searched * a_weight * 1.2 + plan.weights * _passes(settings, model) * a_product


def _timed(work: Callable[[], torch.Tensor]) -> float:
    """Seconds of its second run: the first makes tables. A number of the result is waited for."""
    for _ in range(2):
        began = time.monotonic()
        work().flatten()[0].item()
    return time.monotonic() - began


def _passes(settings: Settings, model: StreamedModel) -> float:
    """How many tokens every weight meets, in forwards or in products that take about as long."""
    # Two forwards and a Hessian; with two streams there are parts of forwards for every stage.
    tokens = settings.cal_rows * (3.0 if settings.no_correction else 8.0)
    if settings.hessian == "kron":
        # Two forwards and backwards, and the Hessian of the outputs.
        tokens += 8.0 * gradient_rows(settings, model, settings.cal_rows)
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
