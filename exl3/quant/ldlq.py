"""Rounding with feedback: every row answers for the errors of the rows behind it."""

import torch

from exl3 import ops, parallel
from exl3.format.trellis import LENGTH, TILE, matrix_to_tiles, tiles_to_matrix

GROUP = 8 * TILE  # rows whose feedback from all rows behind them is one product


def round_plain(inner: torch.Tensor, bits: int, codebook: str) -> torch.Tensor:
    """Every tile by itself. Takes and returns what `ldlq` does, the factor aside."""
    groups = [_round(group, bits, codebook) for group in inner.split(GROUP)]
    return torch.cat(groups)


def ldlq(inner: torch.Tensor, factor: torch.Tensor, bits: int, codebook: str) -> torch.Tensor:
    """Encodes inner so that the error weighted by H = L D L^T becomes small.

    Rows are taken 16 at a time from the last to the first, each with the feedback of the errors
    E behind it: target_i = W_i + sum over i' > i of L[i', i]^T E_i' (QuIP, arXiv 2307.13304;
    with trellis codes QTIP, arXiv 2406.11235).

    inner: float32 (in, out), becomes the error E: matrices of a head take gigabytes, so there is
    one. factor: L, float32 (in, in), unit lower block triangular.
    Returns the states, int16 (in/16, out/16, 256).
    """
    rows, columns = inner.shape
    shape = (rows // TILE, columns // TILE, LENGTH)
    states = torch.empty(shape, dtype=torch.int16, device=inner.device)
    for top in reversed(range(0, rows, GROUP)):
        end = min(top + GROUP, rows)
        feedback = parallel.matmul(factor[end:, top:end].T, inner[end:])
        for a in reversed(range(top, end, TILE)):
            b = a + TILE
            fed_back = feedback[a - top : b - top] + factor[b:end, a:b].T @ inner[b:end]
            target = inner[a:b] + fed_back
            states[a // TILE : b // TILE] = _round(target, bits, codebook)
            inner[a:b] = target - fed_back  # what is left of the target is the error, fed back
    return states


def _round(inner: torch.Tensor, bits: int, codebook: str) -> torch.Tensor:
    """States of the tiles of a few rows, which become their errors."""
    tiles = matrix_to_tiles(inner)
    values, states = ops.encode_tiles(tiles.reshape(-1, LENGTH), bits, codebook)
    inner -= tiles_to_matrix(values.reshape(tiles.shape))
    return states.reshape(tiles.shape)
