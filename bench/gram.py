#!/usr/bin/env python3
"""What computing x^T x on and below the diagonal alone saves: its time over the full product's."""

import time
from collections.abc import Callable

import torch

from exl3 import parallel
from exl3.quant.hessian import Hessian

TOKENS = 2048
REPEATS = 5


def fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs."""
    times = []
    for _ in range(REPEATS):
        began = time.monotonic()
        work()
        times.append(time.monotonic() - began)
    return min(times)


def main() -> None:
    with parallel.one_thread_per_op():
        for features in (1024, 2048, 4096, 8192):
            x = torch.randn(TOKENS, features, generator=torch.Generator().manual_seed(0))
            total, hessian = torch.zeros(features, features), Hessian(features)
            full = fastest(lambda x=x, total=total: total.add_(parallel.matmul(x.T, x)))
            half = fastest(lambda x=x, hessian=hessian: hessian.add(x))
            print(f"{features} features: time {half / full:.2f} ({full:.2f} s)", flush=True)


if __name__ == "__main__":
    main()
