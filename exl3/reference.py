"""Plain torch versions of the ops: what the kernels are tested against, and their fallback."""

import torch

from exl3.format.codebook import STATES, codebook_table
from exl3.format.hadamard import hadamard_columns, hadamard_rows
from exl3.format.trellis import LENGTH, TILE, tiles_to_matrix, unpack

GROUP = 4  # tiles searched at a time: bounds the memory of the back pointers
PANEL_WEIGHTS = 1 << 26  # of W_hat that are decoded at a time
# Whether torch multiplies float16 into float32 on a GPU (2.8 and newer).
OUT_DTYPE = hasattr(torch.ops.aten.mm, "dtype")


def decode_trellis(trellis: torch.Tensor, codebook: str, threads: int) -> torch.Tensor:
    """See `exl3.ops.decode_trellis`."""
    states = unpack(trellis).to(torch.int32) & 0xFFFF
    return tiles_to_matrix(codebook_table(codebook).to(trellis.device)[states])


def hadamard_128(
    x: torch.Tensor, before: torch.Tensor | None, after: torch.Tensor | None, threads: int
) -> torch.Tensor:
    """See `exl3.ops.hadamard_128`."""
    y = hadamard_rows(x.float() if before is None else x.float() * before.float())
    return (y if after is None else y * after.float()).to(x.dtype)


def decode_weight(
    trellis: torch.Tensor,
    suh: torch.Tensor,
    svh: torch.Tensor,
    codebook: str,
    dtype: torch.dtype,
    threads: int,
) -> torch.Tensor:
    """See `exl3.ops.decode_weight`."""
    inner = torch.ops.exl3.decode_trellis(trellis, codebook, threads).float()
    weight = hadamard_rows(hadamard_columns(inner)) * suh.float()[:, None] * svh.float()
    return weight.to(dtype)


def fused_linear(
    x: torch.Tensor,
    trellis: torch.Tensor,
    suh: torch.Tensor,
    svh: torch.Tensor,
    bias: torch.Tensor | None,
    codebook: str,
    threads: int,
) -> torch.Tensor:
    """See `exl3.ops.linear`; what it is made of are ops, so this is fast for many rows."""
    rows = torch.ops.exl3.hadamard_128(x, suh, None, threads)
    y = torch.empty(len(x), len(svh), device=x.device)
    columns = max(1, PANEL_WEIGHTS // (len(suh) * TILE))  # of tiles
    for at in range(0, trellis.shape[1], columns):
        part = trellis[:, at : at + columns].contiguous()
        inner = torch.ops.exl3.decode_trellis(part, codebook, threads)
        y[:, at * TILE : (at + columns) * TILE] = _product(rows, inner)
    y = torch.ops.exl3.hadamard_128(y, None, svh, threads)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _product(x: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """x W_hat in float32: sums over the inputs may leave float16's range."""
    if x.is_cuda and x.dtype == torch.float16 and OUT_DTYPE:
        return torch.mm(x, inner, out_dtype=torch.float32)
    return x.float() @ inner.float()


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
