"""How the states of a layer are laid out: tile order, circular bit strings, packed words.

A tile is a circular sequence of 256 values in the operand order of the m16n8k16 tensor-core
product. Value i adds K bits to a circular string of 256*K bits; its state is the 16 bits that end
with its own.
"""

from functools import cache

import torch

TILE = 16  # rows and columns of a tile
LENGTH = TILE * TILE  # values of a tile
STATE_BITS = 16


@cache
def tile_order(device: str = "cpu") -> torch.Tensor:
    """int64 (256,): place of sequence value i in its tile, row-major (row * 16 + column)."""
    t, m = torch.arange(32)[:, None], torch.arange(8)[None, :]
    row = 2 * (t % 4) + torch.tensor([0, 1, 8, 9, 0, 1, 8, 9])[m]
    column = t // 4 + torch.tensor([0, 0, 0, 0, 8, 8, 8, 8])[m]
    return (row * TILE + column).reshape(-1).to(device)


@cache
def _inverse_tile_order(device: str) -> torch.Tensor:
    return torch.argsort(tile_order()).to(device)


def matrix_to_tiles(matrix: torch.Tensor) -> torch.Tensor:
    """(rows, columns), multiples of 16 -> (rows/16, columns/16, 256) in sequence order."""
    rows, columns = matrix.shape
    tiles = matrix.reshape(rows // TILE, TILE, columns // TILE, TILE).transpose(1, 2)
    return tiles.reshape(rows // TILE, columns // TILE, LENGTH)[..., tile_order(str(matrix.device))]


def tiles_to_matrix(tiles: torch.Tensor) -> torch.Tensor:
    """(rows/16, columns/16, 256) in sequence order -> (rows, columns)."""
    i, j, _ = tiles.shape
    square = tiles[..., _inverse_tile_order(str(tiles.device))].reshape(i, j, TILE, TILE)
    return square.transpose(1, 2).reshape(i * TILE, j * TILE)


def pack(states: torch.Tensor, bits: int) -> torch.Tensor:
    """States int16 (..., 256), 16-bit patterns of legal circles -> packed int16 (..., 16*bits)."""
    s = states.to(torch.int32) & 0xFFFF
    chunk = torch.arange(LENGTH * bits // STATE_BITS, device=states.device)
    # `last` is the first value whose state reaches the end of the chunk, `over` bits beyond it.
    last = -(-STATE_BITS * (chunk + 1) // bits) - 1
    over = ((last + 1) * bits - STATE_BITS * (chunk + 1)).to(torch.int32)
    own = s[..., last] & ((1 << bits) - 1)
    word = (s[..., last - 1] << bits) | own
    return _swap_halves(_to_int16((word >> over) & 0xFFFF))


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Packed int16 (..., 16*bits) -> states int16 (..., 256), unsigned 16-bit patterns."""
    bits = packed.shape[-1] // STATE_BITS
    chunks = _swap_halves(packed).to(torch.int32) & 0xFFFF
    value = torch.arange(LENGTH, device=packed.device)
    start = ((value + 1) * bits - STATE_BITS) % (LENGTH * bits)
    at, offset = start // STATE_BITS, (start % STATE_BITS).to(torch.int32)
    pair = (chunks[..., at].to(torch.int64) << 16) | chunks[..., (at + 1) % chunks.shape[-1]]
    return _to_int16((pair >> (STATE_BITS - offset)) & 0xFFFF)


def _swap_halves(chunks: torch.Tensor) -> torch.Tensor:
    """Big-endian 16-bit chunks <-> the halves of little-endian 32-bit words."""
    return chunks.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def _to_int16(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x >= 1 << 15, x - (1 << 16), x).to(torch.int16)
