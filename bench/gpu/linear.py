#!/usr/bin/env python3
"""A layer's forward from packed weights, next to float16 matmul of decoded ones.

    python bench/gpu/linear.py

Both ways are timed wherever both can go, so that `ops.FUSED_ROWS` can be settled.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from timing import copy_bandwidth, random_layer, seconds

from exl3 import ops, reference

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))  # inputs, outputs
CPU_SHAPES = ((256, 256),)
ROWS = (1, 4, 16, 32, 64, 512)
BITS = (2, 3, 4, 6, 8)
CODEBOOK = "mul1"


def measure(device: torch.device | str) -> list[dict]:
    """A row for each shape, number of bits and of rows: microseconds of matmul, of the kernel that
    decodes where it multiplies and of decoding first; and the share of the bandwidth's bound."""
    device = torch.device(device)
    bandwidth = copy_bandwidth(device)
    results = []
    for inputs, outputs in SHAPES if device.type == "cuda" else CPU_SHAPES:
        weight = torch.randn(inputs, outputs, device=device).half()
        for rows in ROWS:
            x = torch.randn(rows, inputs, device=device).half()
            plain = seconds(lambda x=x, w=weight: x @ w, device)
            for bits in BITS:
                layer = random_layer(inputs, outputs, bits, device)
                row = {"inputs": inputs, "outputs": outputs, "rows": rows, "bits": bits}
                results.append(row | _times(x, layer, plain, bandwidth))
    return results


def _times(
    x: torch.Tensor, layer: tuple[torch.Tensor, ...], plain: float, bandwidth: float
) -> dict[str, float]:
    """Microseconds; the bound is the time that reading x and the layer and writing y takes."""
    arguments = (x, *layer, None, CODEBOOK, 1)
    times = {"matmul": plain}
    if len(x) <= ops.FUSED_ROWS:
        times["fused"] = seconds(lambda: torch.ops.exl3.fused_linear(*arguments), x.device)
    times["decoded first"] = seconds(lambda: reference.fused_linear(*arguments), x.device)
    moved = x.nbytes + sum(t.nbytes for t in layer) + len(x) * len(layer[2]) * 2
    chosen = times.get("fused", times["decoded first"])
    return {f"{name} us": round(t * 1e6, 2) for name, t in times.items()} | {
        "times matmul": round(plain / chosen, 2),
        "of bandwidth": round(moved / bandwidth / chosen, 3),
    }


def main() -> None:
    for row in measure("cuda" if torch.cuda.is_available() else "cpu"):
        print(row, flush=True)


if __name__ == "__main__":
    main()
