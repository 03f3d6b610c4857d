"""Rounding with feedback in both directions: rows and columns answer for the errors behind them."""

import torch

from exl3 import ops, parallel
from exl3.format.trellis import LENGTH, TILE, matrix_to_tiles, tiles_to_matrix

SIDE = 8  # tiles a side of a square
SQUARE = SIDE * TILE
NEAR = 2 * SIDE - 1  # tiles whose feedback a tile asks for by itself, at most
TOGETHER = 64  # independent panels that are encoded together: more would only take memory


def two_sided_ldlq(
    inner: torch.Tensor,
    factor_in: torch.Tensor,
    factor_out: torch.Tensor,
    bits: int,
    codebook: str,
) -> torch.Tensor:
    """Encodes inner so that tr(H_out E^T H_in E) becomes small, with H = L D L^T for both sides.

    From the last tile to the first: target_ij = W_ij + G_ij + sum over i' > i of
    L_in[i', i]^T F_i'j, with G_ij = sum over j' > j of E_ij' L_out[j', j] and F = E + G
    (YAQA, arXiv 2505.22988). Tiles on one anti-diagonal do not depend on each other and are
    encoded together.

    inner: float32 (in, out), multiples of 128, becomes the error E. factor_in: L_in, float32
    (in, in); factor_out: L_out, float32 (out, out); both unit lower block triangular. Or, where
    H_out is block diagonal (a head's), its blocks of 128 outputs alone, (out/128, 128, 128).
    Takes two more matrices like inner, or like 8,192 of its columns where blocks are independent.
    Returns the states, int16 (in/16, out/16, 256).
    """
    rows, columns = inner.shape
    shape = (rows // TILE, columns // TILE, LENGTH)
    states = torch.empty(shape, dtype=torch.int16, device=inner.device)
    panels = factor_out[None] if factor_out.dim() == 2 else factor_out
    width = panels.shape[-1]
    near_in = _near(factor_in[None])
    for n in range(0, len(panels), TOGETHER):
        own = slice(n * width, (n + TOGETHER) * width)
        among = slice(own.start // TILE, own.stop // TILE)
        panel = _Panels(inner[:, own], factor_in, near_in, panels[n : n + TOGETHER])
        panel.encode(bits, codebook, states[:, among])
        inner[:, own] = panel.error
    return states


class _Panels:
    """Panels of columns, all of the same width, whose errors do not reach each other.

    Tile (i, j) of a panel is encoded in turn s = i + j, the last turn first. What comes to it from
    squares of 8 x 8 tiles that are two or more away is there before the first tile of its square
    has its turn, so a product for the whole square gives that (`_reach`); what is nearer, each
    tile asks for by itself. Shapes: t tiles of a turn, one a row of tiles; p panels.
    """

    def __init__(
        self,
        inner: torch.Tensor,
        factor_in: torch.Tensor,
        near_in: torch.Tensor,
        factors_out: torch.Tensor,
    ) -> None:
        rows, columns = inner.shape
        self.factor_in, self.factors_out = factor_in, factors_out
        self.panels, self.width = len(factors_out), factors_out.shape[-1]
        self.down, self.across = rows // TILE, self.width // TILE  # tiles
        self.near_in = near_in.mT  # (i, 1, 16, near)
        self.near_out = _near(factors_out).flip(0)  # (j, p, near, 16), the last j first
        # What a tile near the edge reads beyond it, it multiplies by 0: it must be a number.
        spare = NEAR * TILE
        self.error = inner.new_zeros(rows * columns + spare)[:-spare].view(rows, columns)
        self.error.copy_(inner)  # what is not encoded yet is the weight
        self.fed_back = inner.new_zeros(rows + spare, columns)  # F
        # From afar, across and down, for tile i in turn s at [.., s % 16, i].
        far = (2, 2 * SIDE, self.down, self.panels, TILE, TILE)
        self.far = inner.new_zeros(far)
        steps = torch.arange(SIDE, device=inner.device)
        self.turns = steps[:, None] + steps

    def encode(self, bits: int, codebook: str, states: torch.Tensor) -> None:
        """Encodes all tiles; states: int16 (i, panels * j, 256), a view to put theirs in."""
        for s in reversed(range(self.down + self.across - 1)):
            if s >= NEAR - 1 and (s - (NEAR - 1)) % SIDE == 0:
                self._reach((s - (NEAR - 1)) // SIDE)
            first, last = max(0, s - self.across + 1), min(self.down - 1, s)
            rows, outs = slice(first, last + 1), self.across - 1 - s
            near_out = self.near_out[outs + first : outs + last + 1]
            after, below = self._behind(s, rows)
            far_across, far_down = self.far[:, s % (2 * SIDE), rows]
            weight = self._tiles(self.error, s, rows)
            across = far_across + after @ near_out
            down = far_down + self.near_in[rows] @ below
            values, found = _encoded(weight + across + down, bits, codebook)
            error = weight - values
            weight.copy_(error)
            self._tiles(self.fed_back, s, rows).copy_(error + across)
            self._turn(states, s, rows, 1, states[0, 0]).copy_(found)

    def _reach(self, s: int) -> None:
        """What reaches the squares (i, j) with i + j = s from those at least two away."""
        first, last = max(0, s - self.across // SIDE + 1), min(self.down // SIDE - 1, s)

        def square(i: int) -> tuple[torch.Tensor, torch.Tensor]:
            a, c = i * SQUARE, (s - i) * SQUARE
            b, d = a + 2 * SQUARE, c + 2 * SQUARE
            own = slice(a, a + SQUARE), slice(c, c + self.panels * SQUARE)
            if self.panels == 1:
                across = self.error[own[0], d:] @ self.factors_out[0, d:, own[1]]
            else:  # panels are a square wide
                across = torch.zeros_like(self.error[own])
            below = self.fed_back[b : len(self.error), own[1]]
            return across, parallel.matmul(self.factor_in[b:, own[0]].T, below)

        found = [torch.stack(pair) for pair in parallel.each(square, range(first, last + 1))]
        tiles = torch.stack(found, 1).unflatten(-1, (self.panels, SIDE, TILE))
        tiles = tiles.unflatten(2, (SIDE, TILE)).permute(0, 1, 2, 5, 4, 3, 6)
        rows = torch.arange(first * SIDE, (last + 1) * SIDE, device=tiles.device)
        turns = (self.turns + s * SIDE) % (2 * SIDE)
        self.far[:, turns, rows.view(-1, SIDE, 1)] = tiles

    def _behind(self, s: int, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Errors right of the tiles of a turn (t, p, 16, near), and F below them
        (t, p, near, 16), as views."""
        near, errors, fed_back = NEAR * TILE, self.error[:, TILE:], self.fed_back[TILE:]
        after = errors.as_strided((TILE, near), errors.stride())
        below = fed_back.as_strided((near, TILE), fed_back.stride())
        return (
            self._turn(errors, s, rows, TILE, after),
            self._turn(fed_back, s, rows, TILE, below),
        )

    def _tiles(self, matrix: torch.Tensor, s: int, rows: slice) -> torch.Tensor:
        """The tiles of a turn (t, p, 16, 16), as a view."""
        return self._turn(matrix, s, rows, TILE, matrix[:TILE, :TILE])

    def _turn(
        self, x: torch.Tensor, s: int, rows: slice, cell: int, like: torch.Tensor
    ) -> torch.Tensor:
        """What x (down * cell, panels * across * cell, ...) has for the tiles of a turn, as a view
        (t, p, *like.shape): indices would be sent to a GPU each time, which waits for them. like:
        that of tile (0, 0)."""
        down, across = (cell * stride for stride in x.stride()[:2])
        size = (rows.stop - rows.start, self.panels, *like.shape)
        stride = (down - across, self.across * across, *like.stride())
        begin = x.storage_offset() + rows.start * down + (s - rows.start) * across
        return x.as_strided(size, stride, begin)


def _near(factors: torch.Tensor) -> torch.Tensor:
    """Of unit lower block triangular factors (p, n, n) what each column of tiles has below its
    diagonal tile, in its own square and the next, zeros below that: (n/16, p, near, 16)."""
    panels, size, _ = factors.shape
    squares = size // SQUARE
    own = factors.new_zeros(squares, panels, 2 * SQUARE, SQUARE)
    for q, a in enumerate(range(0, size, SQUARE)):
        part = factors[:, a : a + 2 * SQUARE, a : a + SQUARE]
        own[q, :, : part.shape[1]] = part
    near = factors.new_zeros(squares, SIDE, panels, NEAR * TILE, TILE)
    for i, a in enumerate(range(0, SQUARE, TILE)):
        near[:, i, :, : (NEAR - i) * TILE] = own[:, :, a + TILE :, a : a + TILE]
    return near.flatten(0, 1)


def _encoded(tiles: torch.Tensor, bits: int, codebook: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (..., 16, 16) and states (..., 256) of tiles (..., 16, 16)."""
    in_order = matrix_to_tiles(tiles.flatten(0, -2))
    values, states = ops.encode_tiles(in_order.flatten(0, 1), bits, codebook)
    square = tiles_to_matrix(values.reshape(in_order.shape)).reshape(tiles.shape)
    return square, states.reshape(*tiles.shape[:-2], LENGTH)
