"""How far W_inner is stretched before the trellis: one factor a layer."""

import torch

from exl3 import ops
from exl3.format.trellis import TILE, matrix_to_tiles

# Best scale of unit Gaussian weights, in units of the codebook, for K = 1..8
# (measured: bench/scale_table.py).
GAUSSIAN_SCALE = {
    "3inst": (1.426, 1.232, 1.165, 1.125, 1.071, 1.008, 0.952, 0.906),
    "mcg": (1.420, 1.231, 1.175, 1.129, 1.074, 1.011, 0.949, 0.900),
    "mul1": (1.122, 0.989, 0.938, 0.908, 0.879, 0.839, 0.797, 0.757),
}
STEP = 1.06  # ratio between the three scales that are tried
MOST_TILES = 64  # a sample's


def sample_columns(columns: int) -> torch.Tensor:
    """Indices of at most 128 columns, in runs of 16 (a tile's width) spread over all of them."""
    runs = torch.linspace(0, columns // TILE - 1, min(columns // TILE, 8)).long()
    return (runs[:, None] * TILE + torch.arange(TILE)).flatten()


def search_scale(sample: torch.Tensor, bits: int, codebook: str) -> tuple[float, float]:
    """The scale g that makes the error of trellis(g W_inner) / g smallest, and that error.

    sample: columns of W_inner, float32 (in, n), about unit variance. A parabola through the errors
    of three scales around the best one for Gaussian weights; its minimum, at most one step beyond.
    """
    tiles = _some_tiles(sample)
    center = GAUSSIAN_SCALE[codebook][bits - 1]
    low, middle, high = (_error(tiles, center * STEP**i, bits, codebook) for i in (-1, 0, 1))
    curvature = low + high - 2 * middle
    if curvature <= 0:
        return center * STEP ** (-1 if low < high else 1), min(low, high)
    shift = min(max((low - high) / (2 * curvature), -2.0), 2.0)
    return center * STEP**shift, min(low, middle, high)


def _error(tiles: torch.Tensor, scale: float, bits: int, codebook: str) -> float:
    values, _ = ops.encode_tiles(tiles * scale, bits, codebook)
    return (values / scale - tiles).double().square().mean().item()


def _some_tiles(sample: torch.Tensor) -> torch.Tensor:
    tiles = matrix_to_tiles(sample).flatten(0, 1)
    wanted = min(MOST_TILES, tiles.shape[0])
    return tiles[torch.linspace(0, tiles.shape[0] - 1, wanted).long()].contiguous()
