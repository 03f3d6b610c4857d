"""Plain torch versions of the ops: what the kernels are tested against, and their fallback."""

import torch

from exl3.format.codebook import STATES, codebook_table
from exl3.format.trellis import LENGTH, tiles_to_matrix, unpack

GROUP = 4  # tiles searched at a time: bounds the memory of the back pointers


def decode_trellis(trellis: torch.Tensor, codebook: str, threads: int) -> torch.Tensor:
    """See `exl3.ops.decode_trellis`."""
    states = unpack(trellis).to(torch.int32) & 0xFFFF
    return tiles_to_matrix(codebook_table(codebook)[states])


def encode_tiles(
    tiles: torch.Tensor, bits: int, codebook: str, threads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `exl3.ops.encode_tiles`: an exact search in float32, in two passes.

    A free pass that starts half way round finds the node at the seam (between the last value and
    the first); a second pass from the seam is held to it at both ends.
    """
    values = codebook_table(codebook).float()
    half = LENGTH // 2
    states = torch.empty(tiles.shape, dtype=torch.int64)
    for group, out in zip(tiles.split(GROUP), states.split(GROUP), strict=True):
        cost, back = _forward(group.roll(half, 1), values, bits, start=None)
        seam = _trace(back, cost.argmin(1), bits)[:, half - 1] & (_nodes(bits) - 1)
        _, back = _forward(group, values, bits, start=seam)
        out.copy_(_trace(back, seam, bits))
    unsigned = torch.where(states >= STATES // 2, states - STATES, states)
    return values[states], unsigned.to(torch.int16)


def _nodes(bits: int) -> int:
    """A node is what two neighbouring states share: 16 - bits bits."""
    return STATES >> bits


def _forward(
    tiles: torch.Tensor, values: torch.Tensor, bits: int, start: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cheapest way to every node after the 256 values of each tile.

    tiles (n, 256); start (n,): the node all paths leave from, None = any.
    Returns cost (n, nodes), and back uint8 (256, n, nodes): the high `bits` bits of the state
    that leads to each node on its cheapest path.
    """
    n, nodes, branches = tiles.shape[0], _nodes(bits), 1 << bits
    # State = high * nodes + low leads from node state >> bits to node low = state % nodes.
    table = values.reshape(branches, nodes)
    cost = torch.zeros(n, nodes)
    if start is not None:
        cost = torch.full((n, nodes), torch.inf).scatter_(1, start[:, None], 0)
    back = torch.empty(LENGTH, n, nodes, dtype=torch.uint8)
    for i in range(LENGTH):
        step = (table[None] - tiles[:, i, None, None]).square_()
        step += cost.repeat_interleave(branches, 1).reshape(n, branches, nodes)
        cost, chosen = step.min(1)
        back[i] = chosen.to(torch.uint8)
    return cost, back


def _trace(back: torch.Tensor, node: torch.Tensor, bits: int) -> torch.Tensor:
    """Follows the cheapest paths back from node (n,). Returns the states, int64 (n, 256)."""
    n, nodes = back.shape[1], _nodes(bits)
    states = torch.empty(n, LENGTH, dtype=torch.int64)
    for i in reversed(range(LENGTH)):
        high = back[i].gather(1, node[:, None])[:, 0].long()
        states[:, i] = high * nodes + node
        node = states[:, i] >> bits
    return states
