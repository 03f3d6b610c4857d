#!/usr/bin/env python3
"""Best scale of unit Gaussian weights for every codebook and K: the table of exl3/quant/scale.py.

    python bench/scale_table.py [--tiles 2048]

Prints the scale with the least error (a parabola through the errors at steps of 4%) and that
error against Shannon's limit 2^-2K.
"""

import argparse

import torch

from exl3 import ops
from exl3.format.codebook import CODEBOOKS
from exl3.quant.scale import GAUSSIAN_SCALE

STEP = 1.04


def error(tiles: torch.Tensor, scale: float, bits: int, codebook: str) -> float:
    values, _ = ops.encode_tiles(tiles * scale, bits, codebook)
    return (values / scale - tiles).double().square().mean().item()


def best_scale(tiles: torch.Tensor, bits: int, codebook: str) -> tuple[float, float]:
    """Walks downhill from the table's scale, then fits a parabola."""
    center = GAUSSIAN_SCALE[codebook][bits - 1]
    while True:
        low, middle, high = (error(tiles, center * STEP**i, bits, codebook) for i in (-1, 0, 1))
        if middle <= min(low, high):
            shift = (low - high) / (2 * (low + high - 2 * middle))
            return center * STEP**shift, middle
        center *= STEP ** (-1 if low < high else 1)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--tiles", type=int, default=2048)
    args = parser.parse_args()
    tiles = torch.randn(args.tiles, 256, generator=torch.Generator().manual_seed(0))
    for codebook in CODEBOOKS:
        for bits in range(1, 9):
            scale, least = best_scale(tiles, bits, codebook)
            print(f"{codebook:<6} K={bits}  scale {scale:.3f}  error {least * 4**bits:.4f} x limit")


if __name__ == "__main__":
    main()
