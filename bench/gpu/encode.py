#!/usr/bin/env python3
"""How fast a device's trellis search is, how far from its floor, and how good next to the CPU's.

    python bench/gpu/encode.py

The floor (docs/kernels.md) counts the instructions of the branches alone, at the chip's highest
clock.
"""

import subprocess
import time

import torch

from exl3 import ops
from exl3.format.codebook import CODEBOOKS, codebook_table

LEADS = (96, 96, 80, 96, 96, 64, 64, 64)  # steps before a tile's 256, for each number of bits
# Clocks that a quarter of a multiprocessor spends on the branch pairs of a warp (docs/kernels.md).
PAIR_CLOCKS = {(8, 0): 3.0, (8, 6): 4.0, (8, 9): 4.0, (9, 0): 4.0, (12, 0): 4.0}
# Gaussian weights, in standard deviations of the codebook, as a conversion scales them.
SCALE = (1.14, 1.02, 0.93, 0.94, 0.91, 0.88, 0.85, 0.80)
MANY, FEW = 4096, 256  # tiles: of a large matrix, and of 16 rows of 4096 columns, as LDLQ asks
COMPARED = 64  # tiles that the CPU searches as well
TURNS = 5
TOLERANCE = 1e-3  # of the mean squared error


def measure(device: torch.device | str) -> list[dict]:
    """A row for each codebook and number of bits: weights/s of many and of few tiles, the share of
    the floor, and the mean squared error over the CPU kernel's on the same tiles."""
    device = torch.device(device)
    if device.type == "cpu":
        tiles = {"many": 2 * COMPARED, "few": COMPARED}
    else:
        tiles = {"many": MANY, "few": FEW}
    return [_row(device, name, bits, tiles) for name in CODEBOOKS for bits in range(1, 9)]


def _row(device: torch.device, codebook: str, bits: int, tiles: dict[str, int]) -> dict:
    sigma = SCALE[bits - 1] * codebook_table(codebook).float().std()
    generator = torch.Generator().manual_seed(bits)
    weights = torch.randn(tiles["many"], 256, generator=generator) * sigma
    there = weights.to(device)
    rates = {
        name: count * 256 / _seconds(there[:count], bits, codebook) for name, count in tiles.items()
    }
    row = {
        "codebook": codebook,
        "bits": bits,
        "Mweights/s": round(rates["many"] / 1e6, 2),
        f"Mweights/s, {tiles['few']} tiles": round(rates["few"] / 1e6, 2),
    }
    if floor := _floor(device, bits):
        row["of the floor"] = round(rates["many"] / floor, 3)
    ratio = _error(there[:COMPARED], bits, codebook) / _error(weights[:COMPARED], bits, codebook)
    return row | {"error over CPU's": round(ratio, 5), "as good": ratio <= 1 + TOLERANCE}


def _seconds(tiles: torch.Tensor, bits: int, codebook: str) -> float:
    """The best of a few turns, after one that does not count."""
    best = float("inf")
    for turn in range(1 + TURNS):
        _wait(tiles.device)
        start = time.perf_counter()
        ops.encode_tiles(tiles, bits, codebook)
        _wait(tiles.device)
        if turn > 0:
            best = min(best, time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _error(tiles: torch.Tensor, bits: int, codebook: str) -> float:
    values, _ = ops.encode_tiles(tiles, bits, codebook)
    return (values - tiles).double().square().mean().item()


def _floor(device: torch.device, bits: int) -> float | None:
    """Weights per second if nothing but branches took time; None where that is not known.

    A step is 65,536 branches: 256 pairs for each of the 4 * 32 lanes, and a tile has 256 weights.
    """
    if device.type != "cuda":
        return None
    clocks = PAIR_CLOCKS.get(torch.cuda.get_device_capability(device))
    clock = _highest_clock(device)
    if clocks is None or clock is None:
        return None
    fine = 0 if bits < 8 else 2 if clocks == 4.0 else 1  # 8 bits subtract twice
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return processors * clock / ((LEADS[bits - 1] + 256) * (clocks + fine))


def _highest_clock(device: torch.device) -> float | None:
    """Of the multiprocessors, in Hz, as the driver's tool tells it."""
    identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = ["nvidia-smi", "-i", identity, "--query-gpu=clocks.max.sm"]
    try:
        told = subprocess.run(
            [*query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=10
        )
        return float(told.stdout) * 1e6
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def main() -> None:
    for row in measure("cuda" if torch.cuda.is_available() else "cpu"):
        print(row, flush=True)


if __name__ == "__main__":
    main()
