"""Rounding with feedback: every row answers for the errors of the rows behind it."""

import torch

from exl3 import ops, parallel
from exl3.format.trellis import LENGTH, TILE, matrix_to_tiles, tiles_to_matrix

GROUP = 8 * TILE  # rows whose feedback from all rows behind them is one product


def round_plain(inner: torch.Tensor, bits: int, codebook: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Every tile by itself. inner float32 (in, out). Returns like `ldlq`."""
    tiles = matrix_to_tiles(inner)
    values, states = ops.encode_tiles(tiles.reshape(-1, LENGTH), bits, codebook)
    return tiles_to_matrix(values.reshape(tiles.shape)), states.reshape(tiles.shape)


def ldlq(
    inner: torch.Tensor, factor: torch.Tensor, bits: int, codebook: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes inner so that the error weighted by H = L D L^T becomes small.

    Rows are taken 16 at a time from the last to the first, each with the feedback of the errors
    E behind it: target_i = W_i + sum over i' > i of L[i', i]^T E_i' (QuIP, arXiv 2307.13304;
    with trellis codes QTIP, arXiv 2406.11235).

    inner: float32 (in, out); factor: L, float32 (in, in), unit lower block triangular.
    Returns the values, float32 (in, out), and states, int16 (in/16, out/16, 256).
    """
    rows, columns = inner.shape
    error = torch.zeros_like(inner)
    values = torch.empty_like(inner)
    states = torch.empty(rows // TILE, columns // TILE, LENGTH, dtype=torch.int16)
    for top in reversed(range(0, rows, GROUP)):
        end = min(top + GROUP, rows)
        target = inner[top:end] + parallel.matmul(factor[end:, top:end].T, error[end:])
        for a in reversed(range(top, end, TILE)):
            b = a + TILE
            asked = target[a - top : b - top] + factor[b:end, a:b].T @ error[b:end]
            values[a:b], states[a // TILE : b // TILE] = round_plain(asked, bits, codebook)
            error[a:b] = inner[a:b] - values[a:b]
    return values, states
