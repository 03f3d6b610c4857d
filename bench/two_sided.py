#!/usr/bin/env python3
"""What feedback by outputs costs and brings, over feedback by inputs alone.

    python bench/two_sided.py [--sizes 1024 2048 4096] [--bits 3] [--scales]

Gaussian weights, correlated Hessians of both sides. `time` of the rounding itself and of the whole
layer; `objective` is tr(H_out E^T H_in E); each as a ratio of two sides to one, in one run.
With --scales: with feedback by both sides, the objective over the best scale's of three ways to
choose one (computed as quantize_linear does; searched with feedback by inputs on 64 columns;
searched without feedback), 512 x 512, K = 1 to 4, three strengths of correlation.
"""

import argparse
import time
from collections.abc import Callable

import torch

from exl3 import parallel, quantize_linear
from exl3.format.trellis import matrix_to_tiles
from exl3.quant.hessian import Hessian, block_ldl, damped
from exl3.quant.ldlq import ldlq
from exl3.quant.linear import WIDENED
from exl3.quant.scale import refine_scale, sample_columns, search_scale, widened_scale
from exl3.quant.two_sided import two_sided_ldlq

CODEBOOK = "mcg"


def correlated_hessian(features: int, seed: int, decades: float = 1.0) -> torch.Tensor:
    """Of inputs whose principal components' sizes fall by so many decades."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator)
    mix *= torch.logspace(0, -decades, features)[:, None]
    hessian = Hessian(features)
    hessian.add(parallel.matmul(torch.randn(2 * features, features, generator=generator), mix))
    return hessian.mean()


def objective(error: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> float:
    """tr(H_out E^T H_in E)"""
    left = parallel.matmul(inputs.float(), error)
    return float((left * parallel.matmul(error, outputs.float())).double().sum())


def seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def compare(size: int, bits: int) -> str:
    """One line of ratios for a layer size x size."""
    hessians = [correlated_hessian(size, seed) for seed in (1, 2)]
    factors = [block_ldl(next(damped(h))[1]).float() for h in hessians]
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(3))
    one, two = weight.clone(), weight.clone()
    rounding = [
        seconds(lambda: ldlq(one, factors[0], bits, CODEBOOK)),
        seconds(lambda: two_sided_ldlq(two, *factors, bits, CODEBOOK)),
    ]
    layer = [
        seconds(lambda o=o: quantize_linear(weight, hessians[0], bits, CODEBOOK, output_hessian=o))
        for o in (None, hessians[1])
    ]
    gain = objective(two, *hessians) / objective(one, *hessians)
    return (
        f"{size} x {size}  K={bits}  rounding: time {rounding[1] / rounding[0]:.2f} "
        f"({rounding[0]:.1f} s)  layer: time {layer[1] / layer[0]:.2f} ({layer[0]:.1f} s)  "
        f"objective {gain:.3f}"
    )


def scale_regrets(bits: int, decades: float, size: int = 512) -> list[float]:
    """Objective over the best scale's: computed, searched for one side, without feedback."""
    hessians = [next(damped(correlated_hessian(size, seed, decades)))[1] for seed in (1, 2)]
    factors = [block_ldl(h).float() for h in hessians]
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(3))

    def at(scale: float) -> float:
        error = weight * scale
        two_sided_ldlq(error, *factors, bits, CODEBOOK)
        return objective(error, *hessians) / scale**2

    tiles = matrix_to_tiles(weight).flatten(0, 1)
    tiles = tiles[torch.linspace(0, len(tiles) - 1, 64).long()]
    plain, error = search_scale(tiles, torch.full((64,), 1 / 64), bits, CODEBOOK)
    sample = weight[:, sample_columns(size, 64)].contiguous()
    one_sided = refine_scale(sample, plain, factors[0], hessians[0].float(), bits, CODEBOOK)
    computed = widened_scale(plain, error, *factors, bits in WIDENED)
    tried = [at(computed), at(one_sided), at(plain)]
    best = min(*tried, *(at(plain * 0.92**i) for i in range(1, 6)))
    return [found / best for found in tried]


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--scales", action="store_true")
    args = parser.parse_args()
    with parallel.one_thread_per_op():
        if args.scales:
            for bits in range(1, 5):
                for decades in (0.3, 1.0, 2.0):
                    regrets = " ".join(f"{r:.3f}" for r in scale_regrets(bits, decades))
                    print(f"K={bits}  {decades} decades  {regrets}", flush=True)
            return
        for size in args.sizes:
            print(compare(size, args.bits), flush=True)


if __name__ == "__main__":
    main()
