#!/usr/bin/env python3
"""Peak memory of quantizing one wide linear layer, in copies of its float32 weight."""

import resource
import time

import torch

import exl3
from exl3 import ops

ROWS, COLUMNS = 1024, 32768


def peak() -> int:
    """Bytes this process has taken at its peak so far (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.02
    ops.encode_tiles(torch.zeros(4, 256), 2, "mul1")  # tables and threads
    before, began = peak(), time.monotonic()
    exl3.quantize_linear(weight, torch.eye(ROWS), 2)
    seconds = time.monotonic() - began
    copies = (peak() - before) / (4 * weight.numel())
    print(f"{copies:.2f} copies of the weight, {weight.numel() / seconds:,.0f} weights/s")


if __name__ == "__main__":
    main()
