"""How far W_inner is stretched before the trellis: one factor a layer."""

import torch

from exl3 import ops
from exl3.format.trellis import matrix_to_tiles

# Best scale of unit Gaussian weights, in units of the codebook, for K = 1..8
# (measured: bench/scale_table.py).
GAUSSIAN_SCALE = {
    "3inst": (1.41, 1.26, 1.13, 1.12, 1.12, 1.08, 1.03, 0.97),
    "mcg": (1.42, 1.25, 1.17, 1.17, 1.11, 1.09, 1.02, 0.97),
    "mul1": (1.13, 1.03, 0.91, 0.94, 0.93, 0.91, 0.88, 0.82),
}
STEP = 1.06  # ratio between the three scales that are tried
SAMPLE = (16, 256)  # tiles: at least, at most
SAMPLE_SHARE = 32  # one tile in so many, between these bounds


def search_scale(inner: torch.Tensor, bits: int, codebook: str) -> float:
    """The scale g that makes the error of trellis(g W_inner) / g smallest on a sample of tiles.

    inner: float32 (in, out), about unit variance. A parabola through the errors of three scales
    around the best one for Gaussian weights; its minimum, at most one step beyond them.
    """
    sample = _sample_tiles(inner)
    center = GAUSSIAN_SCALE[codebook][bits - 1]
    low, middle, high = (_error(sample, center * STEP**i, bits, codebook) for i in (-1, 0, 1))
    curvature = low + high - 2 * middle
    if curvature <= 0:
        return center * STEP ** (-1 if low < high else 1)
    shift = (low - high) / (2 * curvature)
    return center * STEP ** min(max(shift, -2.0), 2.0)


def _error(sample: torch.Tensor, scale: float, bits: int, codebook: str) -> float:
    values, _ = ops.encode_tiles(sample * scale, bits, codebook)
    return (values / scale - sample).double().square().mean().item()


def _sample_tiles(inner: torch.Tensor) -> torch.Tensor:
    tiles = matrix_to_tiles(inner).flatten(0, 1)
    low, high = SAMPLE
    wanted = min(max(tiles.shape[0] // SAMPLE_SHARE, low), high, tiles.shape[0])
    return tiles[torch.linspace(0, tiles.shape[0] - 1, wanted).long()].contiguous()
