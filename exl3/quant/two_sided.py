"""Rounding with feedback in both directions: rows and columns answer for the errors behind them."""

from collections.abc import Iterator

import torch

from exl3 import ops, parallel
from exl3.format.trellis import LENGTH, TILE, matrix_to_tiles, tiles_to_matrix

SIDE = 8  # tiles a side of a square, whose feedback from outside is two products
SQUARE = SIDE * TILE
TOGETHER = 64  # squares of a row that are encoded together: more would only take memory


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
    (YAQA, arXiv 2505.22988). Tiles on one anti-diagonal do not depend on each other; so squares of
    8 x 8 tiles are taken by anti-diagonals, and within all of them their tiles.

    inner: float32 (in, out), multiples of 128, becomes the error E. factor_in: L_in, float32
    (in, in); factor_out: L_out, float32 (out, out); both unit lower block triangular. Or, where
    H_out is block diagonal (a head's), its blocks of 128 outputs alone, (out/128, 128, 128).
    Takes one more matrix like inner. Returns the states, int16 (in/16, out/16, 256).
    """
    rows, columns = inner.shape
    shape = (rows // TILE, columns // TILE, LENGTH)
    states = torch.empty(shape, dtype=torch.int16, device=inner.device)
    fed_back = torch.empty_like(inner)  # F
    independent = factor_out.dim() == 3
    for corners in (_rows if independent else _anti_diagonals)(rows, columns):
        squares = _Squares(inner, fed_back, factor_in, factor_out, corners)
        squares.encode(bits, codebook)
        squares.store(inner, fed_back, states)
    return states


def _anti_diagonals(rows: int, columns: int) -> Iterator[list[tuple[int, int]]]:
    """Corners (row, column) of the squares that are encoded together, the last ones first."""
    down, across = rows // SQUARE, columns // SQUARE
    for s in reversed(range(down + across - 1)):
        first, last = max(0, s - across + 1), min(down - 1, s)
        yield [(i * SQUARE, (s - i) * SQUARE) for i in range(first, last + 1)]


def _rows(rows: int, columns: int) -> Iterator[list[tuple[int, int]]]:
    """The same where squares of different columns do not depend on each other."""
    for a in reversed(range(0, rows, SQUARE)):
        across = range(0, columns, SQUARE)
        for n in range(0, len(across), TOGETHER):
            yield [(a, c) for c in across[n : n + TOGETHER]]


class _Squares:
    """The n squares of one anti-diagonal, tile by tile: (8, 8, n, 16, 16).

    Errors lie in rows of tiles (8, n, 16, 128) and F in columns of tiles (8, n, 128, 16), so that
    the feedback of all tiles that are encoded together is one batched product. What is not encoded
    yet counts as zero. Columns of tiles stand from the last to the first: then those of one
    anti-diagonal are a slice, as the rows are, and nothing is copied.
    """

    def __init__(
        self,
        inner: torch.Tensor,
        fed_back: torch.Tensor,
        factor_in: torch.Tensor,
        factor_out: torch.Tensor,
        corners: list[tuple[int, int]],
    ) -> None:
        def from_outside(corner: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
            (a, c), b, d = corner, corner[0] + SQUARE, corner[1] + SQUARE
            if factor_out.dim() == 3:
                across = inner.new_zeros(SQUARE, SQUARE)
            else:
                across = inner[a:b, d:] @ factor_out[d:, c:d]
            return across, factor_in[b:, a:b].T @ fed_back[b:, c:d]

        across, down = zip(*parallel.each(from_outside, corners), strict=True)
        self.corners = corners
        self.weight = _tiles([inner[_square(corner)] for corner in corners])
        self.across, self.down = _tiles(across), _tiles(down)
        ins, outs = zip(*corners, strict=True)
        self.factor_in = _columns([factor_in[_square((a, a))] for a in ins]).mT
        if factor_out.dim() == 3:
            own = [factor_out[c // SQUARE] for c in outs]
        else:
            own = [factor_out[_square((c, c))] for c in outs]
        self.factor_out = _columns(own).flip(0)
        n = len(corners)
        self.error = inner.new_zeros(SIDE, n, TILE, SQUARE)
        self.fed_back = inner.new_zeros(SIDE, n, SQUARE, TILE)
        self.states = inner.new_empty(SIDE, SIDE, n, LENGTH, dtype=torch.int16)

    def encode(self, bits: int, codebook: str) -> None:
        """Encodes all tiles, those of one anti-diagonal of every square together."""
        errors = self.error.unflatten(3, (SIDE, TILE)).permute(0, 3, 1, 2, 4)
        fed_back = self.fed_back.unflatten(2, (SIDE, TILE)).permute(2, 0, 1, 3, 4)
        for s in reversed(range(2 * SIDE - 1)):
            first, last = max(0, s - SIDE + 1), min(SIDE - 1, s)
            rows = slice(first, last + 1)
            columns = slice(SIDE - 1 - s + first, SIDE - s + last)
            weight = _anti_diagonal(self.weight, s)
            across = _anti_diagonal(self.across, s) + self.error[rows] @ self.factor_out[columns]
            down = _anti_diagonal(self.down, s) + self.factor_in[rows] @ self.fed_back[columns]
            values, states = _encoded(weight + across + down, bits, codebook)
            _anti_diagonal(self.states, s).copy_(states)
            _anti_diagonal(errors, s).copy_(weight - values)
            # Columns of tiles stand in reverse there.
            fed_back.diagonal(SIDE - 1 - s).movedim(-1, 0).copy_(weight - values + across)

    def store(self, inner: torch.Tensor, fed_back: torch.Tensor, states: torch.Tensor) -> None:
        """Puts errors in inner's place, F in fed_back's, and states."""
        own = self.fed_back.flip(0)
        for n, corner in enumerate(self.corners):
            inner[_square(corner)] = self.error[:, n].flatten(0, 1)
            fed_back[_square(corner)] = own[:, n].transpose(0, 1).flatten(1)
            i, j = corner[0] // TILE, corner[1] // TILE
            states[i : i + SIDE, j : j + SIDE] = self.states[:, :, n]


def _anti_diagonal(x: torch.Tensor, s: int) -> torch.Tensor:
    """x[i, s - i] for all i of x (8, 8, ...), as a view: indices would be sent to a GPU each time,
    which waits for them."""
    first, last = max(0, s - SIDE + 1), min(SIDE - 1, s)
    down, across, *rest = x.stride()
    begin = x.storage_offset() + first * down + (s - first) * across
    return x.as_strided((last - first + 1, *x.shape[2:]), (down - across, *rest), begin)


def _square(corner: tuple[int, int]) -> tuple[slice, slice]:
    return tuple(slice(a, a + SQUARE) for a in corner)


def _tiles(squares: list[torch.Tensor]) -> torch.Tensor:
    """n squares (128, 128) -> (8, 8, n, 16, 16)."""
    tiles = torch.stack(squares).unflatten(2, (SIDE, TILE)).unflatten(1, (SIDE, TILE))
    return tiles.permute(1, 3, 0, 2, 4)


def _columns(squares: list[torch.Tensor]) -> torch.Tensor:
    """n squares (128, 128) -> their columns of tiles, (8, n, 128, 16)."""
    return torch.stack(squares).unflatten(2, (SIDE, TILE)).permute(2, 0, 1, 3).contiguous()


def _encoded(tiles: torch.Tensor, bits: int, codebook: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (..., 16, 16) and states (..., 256) of tiles (..., 16, 16)."""
    in_order = matrix_to_tiles(tiles.flatten(0, -2))
    values, states = ops.encode_tiles(in_order.flatten(0, 1), bits, codebook)
    square = tiles_to_matrix(values.reshape(in_order.shape)).reshape(tiles.shape)
    return square, states.reshape(*tiles.shape[:-2], LENGTH)
