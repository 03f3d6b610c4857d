#!/usr/bin/env python3
"""How fast trellises are decoded and transforms made, next to the card's copy bandwidth.

python bench/gpu/decode.py
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from timing import copy_bandwidth, random_layer, seconds

from exl3 import ops
from exl3.format.codebook import CODEBOOKS

SIZE, CPU_SIZE = 8192, 512  # rows and columns of the layer


def measure(device: torch.device | str) -> list[dict]:
    """A row for each op, codebook and number of bits: GB/s, read and written, and the share of
    what a copy reaches in the same run."""
    device = torch.device(device)
    copy = copy_bandwidth(device)
    size = SIZE if device.type == "cuda" else CPU_SIZE
    rows = [{"op": "copy", "GB/s": round(copy / 1e9, 1), "of copy": 1.0}]

    def add(name: dict, work: Callable[[], object], moved: int) -> None:
        rate = moved / seconds(work, device)
        rows.append({**name, "GB/s": round(rate / 1e9, 1), "of copy": round(rate / copy, 3)})

    for codebook in CODEBOOKS:
        for bits in range(1, 9):
            trellis, suh, svh = random_layer(size, size, bits, device)
            name = {"codebook": codebook, "bits": bits}
            moved = trellis.nbytes + 2 * size * size
            add(
                {"op": "decode_trellis", **name},
                lambda t=trellis, c=codebook: ops.decode_trellis(t, c),
                moved,
            )
            add(
                {"op": "decode_weight", **name},
                lambda t=trellis, a=suh, b=svh, c=codebook: ops.decode_weight(
                    t, a, b, c, torch.float16
                ),
                moved,
            )
    for dtype in (torch.float32, torch.float16):
        x = torch.randn(size, size, device=device).to(dtype)
        name = {"op": f"hadamard_128 {str(dtype).removeprefix('torch.')}"}
        add(name, lambda x=x: ops.hadamard_128(x), 2 * x.nbytes)
    return rows


def main() -> None:
    for row in measure("cuda" if torch.cuda.is_available() else "cpu"):
        print(row, flush=True)


if __name__ == "__main__":
    main()
