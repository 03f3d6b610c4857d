"""Work on all cores whose result does not depend on how many there are.

Libraries split one product or one factorization differently for every number of threads, and the
last bits change with the split. So inside our jobs every torch op runs on one thread
(`one_thread_per_op`), and cores are filled by whole pieces of work of a fixed size. A GPU is filled
by one piece: there they run one after another (`work_on`).
"""

import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from exl3.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


# Read before any `one_thread_per_op`: respects OMP_NUM_THREADS and the process's CPU affinity.
def _wanted_threads() -> int:
    text = os.environ.get("EXL3_THREADS", "")
    if text and not (text.isdigit() and 1 <= int(text) <= 1024):
        raise UserError(f"EXL3_THREADS={text}: give a number of threads, 1 to 1024")
    return int(text or torch.get_num_threads())


_THREADS = _wanted_threads()

PANEL = 256  # columns of one piece of a product; part of the result's definition


class _Local(threading.local):
    on_gpu = False  # what this thread works on


_local = _Local()


def threads() -> int:
    """Number of worker threads (EXL3_THREADS, else OMP_NUM_THREADS, else the cores); 1 for work
    on a GPU."""
    return 1 if _local.on_gpu else _THREADS


@contextmanager
def work_on(device: torch.device) -> Iterator[None]:
    """What this thread does inside is done on `device`."""
    before, _local.on_gpu = _local.on_gpu, device.type != "cpu"
    try:
        yield
    finally:
        _local.on_gpu = before


@contextmanager
def one_thread_per_op() -> Iterator[None]:
    """Torch runs every op on one thread inside this context."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def each(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """`[work(item) for item in items]`, on all cores; results in the order of the items."""
    items = list(items)
    if threads() == 1 or len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads()) as pool:
        return list(pool.map(work, items))


def spread(
    devices: Sequence[torch.device], work: Callable[[torch.device, T], R], items: Sequence[T]
) -> Iterator[R]:
    """`work(device, item)` for all items, each on the next device that is free; results in the
    order of the items, which must not depend on the device.

    With one device, each item's turn comes when its result is asked for.
    """
    if len(devices) == 1 or len(items) < 2:
        yield from (work(devices[0], item) for item in items)
        return
    free: queue.SimpleQueue[torch.device] = queue.SimpleQueue()
    for device in devices:
        free.put(device)

    def one(item: T) -> R:
        device = free.get()
        try:
            with work_on(device):
                return work(device, item)
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(devices)) as pool:
        yield from pool.map(one, items)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` for a (m, k) and b (k, n), bit for bit the same for any number of threads."""
    n = b.shape[1]
    if a.is_cuda or n <= PANEL:
        return a @ b
    out = torch.empty(a.shape[0], n, dtype=a.dtype, device=a.device)
    each(
        lambda j: torch.matmul(a, b[:, j : j + PANEL], out=out[:, j : j + PANEL]),
        range(0, n, PANEL),
    )
    return out
