"""What the benchmarks of kernels share: a timer, the card's bandwidth, random layers."""

import time
from collections.abc import Callable
from statistics import median

import torch

TURNS = 20
FLUSHED = 256 << 20  # bytes written between turns: more than any card's cache


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median of some turns, of which a GPU starts every one with a cold cache."""
    work()
    if device.type == "cpu":
        return median(_wall(work) for _ in range(3))
    flush = torch.empty(FLUSHED, dtype=torch.uint8, device=device)
    marks = []
    for _ in range(TURNS):
        # While the card is busy with this the turn is queued, so that only its own time counts.
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        marks.append((begin, end))
    torch.cuda.synchronize(device)
    return median(begin.elapsed_time(end) / 1e3 for begin, end in marks)


def _wall(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of torch's own copy."""
    size = (1 << 30) if device.type == "cuda" else (1 << 24)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device)


def random_layer(
    inputs: int, outputs: int, bits: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """trellis, suh, svh: any bits are a legal trellis."""
    generator = torch.Generator(device).manual_seed(bits)
    shape = (inputs // 16, outputs // 16, 16 * bits)
    trellis = torch.randint(
        -(1 << 15), 1 << 15, shape, dtype=torch.int16, generator=generator, device=device
    )
    ones = (torch.ones(n, dtype=torch.float16, device=device) for n in (inputs, outputs))
    return trellis, *ones
