#!/usr/bin/env python3
"""How fast and how good the trellis search is, next to a plain scalar search.

    python bench/encode_tiles.py [--codebook mcg] [--tiles 64] [--isa avx512,avx2] [--bits 2,3,4]

Prints for each number of bits: thousands of weights per second and core for the scalar search and
for the kernels of each instruction set, how many times faster, and the kernels' mean squared error
relative to the exact two-pass search on the same tiles; last, how it scales to two threads. The
contestants take turns and the best turn counts. One thread's time is CPU time, so a busy machine
disturbs little; the scaling is wall time and needs an idle one.
"""

import argparse
import os
import time
from collections.abc import Callable

import torch

from exl3 import ops, reference
from exl3.format.codebook import CODEBOOKS, codebook_table

# Standard deviation of Gaussian weights, in those of the codebook, at which each number of bits
# encodes them about best.
SCALE = (1.14, 1.02, 0.93, 0.94, 0.91, 0.88, 0.85, 0.80)
ISAS = ("avx512", "avx2", "portable")
SCALAR_TILES = 4  # a turn of the scalar search; it and the portable kernels are slow
SLOW = ("scalar", "portable", "torch")


def main(codebook: str, tiles: int, isas: list[str], bits: list[int], turns: int) -> None:
    if not ops.HAVE_KERNELS:
        raise SystemExit("The C++ extension is not built.")
    torch.set_num_threads(1)
    isas = [isa for isa in isas if supported(isa)]
    columns = [f"{isa:>10} {'ratio':>6}" for isa in isas]
    print(f"{codebook}, {tiles} tiles; thousands of weights per second and core")
    print(f"bits {'scalar':>8} {'torch':>6} {' '.join(columns)}  mse/exact  2 threads")
    for k in bits:
        sigma = SCALE[k - 1] * codebook_table(codebook).float().std().item()
        weights = torch.randn(tiles, 256, generator=torch.Generator().manual_seed(k)) * sigma
        speed = race(weights, k, codebook, isas, turns)
        cells = [f"{speed[isa] / 1e3:10.1f} {speed[isa] / speed['scalar']:5.0f}x" for isa in isas]
        quality = relative_error(weights, k, codebook)
        scaling = thread_scaling(weights, k, codebook, turns)
        print(
            f"{k:4} {speed['scalar'] / 1e3:8.2f} {speed['torch'] / 1e3:6.2f} "
            f"{' '.join(cells)} {quality:10.4f} {scaling:9.2f}x",
            flush=True,
        )


def race(
    weights: torch.Tensor, bits: int, codebook: str, isas: list[str], turns: int
) -> dict[str, float]:
    """Weights per second of CPU time of the scalar search and of each instruction set."""
    best = dict.fromkeys(["scalar", "torch", *isas], 0.0)
    for turn in range(turns):
        for name in best:
            if name in SLOW and turn > 1:
                continue
            some = weights[:SCALAR_TILES] if name in SLOW else weights
            seconds = timed(lambda w=some, n=name: search(w, bits, codebook, n), time.thread_time)
            best[name] = max(best[name], some.numel() / seconds)
    return best


def search(weights: torch.Tensor, bits: int, codebook: str, name: str, threads: int = 1) -> None:
    if name == "scalar":
        torch.ops.exl3_bench.encode_tiles_scalar(weights, bits, codebook)
        return
    if name == "torch":
        reference.encode_tiles(weights, bits, codebook, threads)
        return
    os.environ["EXL3_ISA"] = name
    torch.ops.exl3.encode_tiles(weights, bits, codebook, threads)
    del os.environ["EXL3_ISA"]


def timed(work: Callable[[], None], clock: Callable[[], float]) -> float:
    start = clock()
    work()
    return clock() - start


def supported(isa: str) -> bool:
    try:
        search(torch.zeros(0, 256), 1, "mcg", isa)
    except RuntimeError:
        os.environ.pop("EXL3_ISA")
        return False
    return True


def relative_error(weights: torch.Tensor, bits: int, codebook: str) -> float:
    """Squared error over that of the exact two-pass search (the scalar one), on a few tiles."""
    some = weights[: 4 * SCALAR_TILES]
    states = torch.ops.exl3_bench.encode_tiles_scalar(some, bits, codebook)
    exact = codebook_table(codebook).float()[(states.to(torch.int32) & 0xFFFF).long()]
    values, _ = torch.ops.exl3.encode_tiles(some, bits, codebook, 1)
    errors = [(x - some).double().square().sum().item() for x in (values, exact)]
    return errors[0] / errors[1]


def thread_scaling(weights: torch.Tensor, bits: int, codebook: str, turns: int) -> float:
    """Wall time of one thread over that of two."""
    best = [float("inf")] * 2
    for _ in range(turns):
        for i in range(2):
            seconds = timed(
                lambda n=i + 1: torch.ops.exl3.encode_tiles(weights, bits, codebook, n),
                time.perf_counter,
            )
            best[i] = min(best[i], seconds)
    return best[0] / best[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--codebook", choices=list(CODEBOOKS), default="mcg")
    parser.add_argument("--tiles", type=int, default=64)
    parser.add_argument("--isa", default=",".join(ISAS), help="comma-separated: " + ", ".join(ISAS))
    parser.add_argument("--bits", default="1,2,3,4,5,6,7,8", help="comma-separated")
    parser.add_argument("--turns", type=int, default=8)
    args = parser.parse_args()
    main(
        args.codebook,
        args.tiles,
        args.isa.split(","),
        [int(k) for k in args.bits.split(",")],
        args.turns,
    )
