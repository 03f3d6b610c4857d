"""How much memory there is, and tensors that do without it."""

import contextlib
import ctypes
import os
import sys
from pathlib import Path

import psutil
import torch

GIB = 2**30
MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD
LARGE = 4 * 2**20  # bytes: from here on a tensor has pages of its own
# What a container may use and uses, by version of the kernel's control groups.
GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def available_bytes() -> int:
    """Memory that is free for this process, in its container too."""
    free = psutil.virtual_memory().available
    for limit, used in GROUPS:
        try:
            room = int(Path(limit).read_text()) - int(Path(used).read_text())
        except (OSError, ValueError):  # no such group, or no limit ("max")
            continue
        free = min(free, max(0, room))
    return free


def resident_now() -> int:
    """Memory that this process holds."""
    return psutil.Process().memory_info().rss


def return_large() -> None:
    """Lets freed tensors' memory go back to the system at once.

    Left to itself, glibc soon keeps it, with gaps between tensors that stay: half a block of
    experts and more, while they are loaded and replaced one by one.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, LARGE)


class Spill:
    """A folder for tensors that live in files: the system keeps of them in memory what fits."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._made = 0

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor of zeros in a file of its own, which has no name any more."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{os.getpid()}.{self._made}.spilled"
        self._made += 1
        size = torch.Size(shape).numel()
        try:
            return torch.from_file(str(path), shared=True, size=size, dtype=dtype).reshape(shape)
        finally:
            path.unlink(missing_ok=True)  # the memory map keeps what is in it
