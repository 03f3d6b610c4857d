"""Where the work runs: GPUs by their numbers, or the CPU."""

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from exl3 import ops, parallel
from exl3.cli import read_devices
from exl3.errors import UserError

T = TypeVar("T")
CPU = torch.device("cpu")
SHORT = "the GPU's memory is too short for it"  # for notes


def pick_devices(
    wanted: str, flag: str = "-d", kernels: bool = True
) -> tuple[list[torch.device], str | None]:
    """The devices that a flag asks for, the first of which runs the model; and a line to tell the
    user. The CPU where no GPU can be used; UserError for a GPU that is not there among others.
    kernels: whether exl3's own are needed there, and not only torch."""
    numbers = read_devices(wanted, flag)
    if not numbers:
        return [CPU], None
    if reason := _unusable(kernels):
        return [CPU], f"{flag} {wanted}: {reason}; running on the CPU"
    count = torch.cuda.device_count()
    if missing := [n for n in numbers if n >= count]:
        there = "GPU 0" if count == 1 else f"GPUs 0 to {count - 1}"
        raise UserError(f"{flag} {wanted}: there is no GPU {missing[0]} here, only {there}")
    _settle_arithmetic()
    devices = [torch.device("cuda", n) for n in numbers]
    for device in devices:  # the first call loads a library, which threads must not do at once
        torch.linalg.cholesky(torch.eye(1, device=device))
    names = ", ".join(f"{device} ({torch.cuda.get_device_name(device)})" for device in devices)
    return devices, f"Running on {names}, in float32 without TF32"


def pick_device(
    wanted: str, flag: str = "-d", kernels: bool = True
) -> tuple[torch.device, str | None]:
    """`pick_devices` for work that one device does: the first, and a line about the others."""
    devices, note = pick_devices(wanted, flag, kernels)
    if len(devices) > 1:
        note = f"{note}; only {devices[0]} is of use here"
    return devices[0], note


def _unusable(kernels: bool) -> str | None:
    """Why no GPU can be used, None if one can."""
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return "no GPU is available here" if built else "this torch is built without CUDA"
    if kernels and not _kernels_built():
        return "exl3's kernels are built without CUDA (docs/kernels.md tells how to build them)"
    return None


def _kernels_built() -> bool:
    return ops.HAVE_GPU_KERNELS


def backend(device: torch.device) -> str:
    """What finds a job's codes, as its work folder remembers it: codes of another are as good, and
    not the same."""
    if device.type == "cuda":
        return "GPU"
    return "kernels" if ops.HAVE_KERNELS else "plain torch"


def _settle_arithmetic() -> None:
    """Float32 that is float32, and the same bits every time."""
    torch.set_float32_matmul_precision("highest")  # not TF32: Hessians need all bits
    torch.backends.cudnn.allow_tf32 = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    # Of ops that know no other way (a sum in parallel over a long row); what is left is told here.
    warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
    # Autograd's own thread begins without a context, and torch makes one.
    warnings.filterwarnings("ignore", message="Attempting to run cuBLAS, but there was no current")


def attention_for_gradients(device: torch.device) -> AbstractContextManager:
    """Attention whose gradients are the same every time: on a GPU its own kernels add them up in no
    fixed order, products of matrices do."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()


# -- Memory ----------------------------------------------------------------------------------------


def free_bytes(device: torch.device) -> int:
    """Memory of a card that this process may take: what is free, and what torch holds already."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def where_it_fits(
    device: torch.device, work: Callable[[torch.device], T]
) -> tuple[T, torch.device]:
    """`work(device)`, or `work` on the CPU where the card's memory is too short for that; and
    where it was done. The result stays there."""
    try:
        return work(device), device
    except torch.OutOfMemoryError:
        if device.type == "cpu":
            raise
    torch.cuda.empty_cache()  # here, where the exception no longer keeps what was computed
    with parallel.work_on(CPU):
        return work(CPU), CPU
