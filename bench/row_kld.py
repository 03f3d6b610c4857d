#!/usr/bin/env python3
"""What the KLD of a row takes when nothing else is wanted: its CPU time over all metrics'."""

import time
from collections.abc import Callable
from timeit import repeat

import torch

from exl3.evaluate.metrics import row_kld, row_metrics

LENGTH = 512


def fastest(work: Callable[[], object]) -> float:
    """CPU seconds of the fastest of a few runs."""
    return min(repeat(work, timer=time.process_time, number=1))


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    for vocab in (4096, 32768, 131072):
        a, b = torch.randn(2, 1, LENGTH, vocab, generator=generator)
        ids = torch.randint(0, vocab, (1, LENGTH), generator=generator)
        whole = fastest(lambda a=a, b=b, ids=ids: row_metrics(a, ids, b))
        alone = fastest(lambda a=a, b=b: row_kld(a, b))
        print(f"{vocab} tokens: time {alone / whole:.2f} ({whole:.3f} s)", flush=True)


if __name__ == "__main__":
    main()
