"""The one door to the kernels: op schemas, backends, and the Python functions of the same names.

Every op has a plain torch reference (`exl3/reference.py`), which also serves where no kernel is
built, and kernels in `csrc/` that the dispatcher prefers for tensors of their device. Importing
this module loads them (`exl3/build.py`).
"""

import torch

from exl3 import build, parallel, reference
from exl3.format.codebook import CODEBOOKS

SCHEMAS = (
    # Trellis search. `threads`: CPU workers; the result does not depend on it.
    "encode_tiles(Tensor tiles, int bits, str codebook, int threads) -> (Tensor, Tensor)",
    # Packed trellis (in/16, out/16, 16*bits) -> float16 inner matrix (in, out).
    "decode_trellis(Tensor trellis, str codebook, int threads) -> Tensor",
)

_library = torch.library.Library("exl3", "DEF")
for _schema in SCHEMAS:
    _library.define(_schema)
_library.impl("encode_tiles", reference.encode_tiles, "CompositeExplicitAutograd")
_library.impl("decode_trellis", reference.decode_trellis, "CompositeExplicitAutograd")


HAVE_KERNELS = build.load_kernels()


def encode_tiles(
    tiles: torch.Tensor, bits: int, codebook: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds for each tile the legal circle of states whose values are nearest to it.

    Tail-biting Viterbi search over 2^16 states (QTIP, arXiv 2406.11235).

    tiles: float32 (n, 256) in sequence order, finite, in units of the codebook. bits: 1 to 8.
    codebook: "3inst", "mcg" or "mul1". Returns values, float32 (n, 256), the codebook's values of
    the states, and states, int16 (n, 256), unsigned 16-bit patterns. ValueError for bad arguments.
    """
    _check(bits in range(1, 9), f"bits must be 1 to 8, not {bits}")
    _check(codebook in CODEBOOKS, f"unknown codebook {codebook!r}")
    _check(tiles.dim() == 2 and tiles.shape[1] == 256, f"tiles must be (n, 256): {tiles.shape}")
    _check(tiles.dtype == torch.float32, f"tiles must be float32, not {tiles.dtype}")
    return torch.ops.exl3.encode_tiles(tiles.contiguous(), bits, codebook, parallel.threads())


def decode_trellis(trellis: torch.Tensor, codebook: str) -> torch.Tensor:
    """Packed trellis int16 (in/16, out/16, 16*bits) -> W_hat, float16 (in, out), exact."""
    _check(codebook in CODEBOOKS, f"unknown codebook {codebook!r}")
    _check(trellis.dtype == torch.int16 and trellis.dim() == 3, "trellis must be int16, 3D")
    _check(trellis.shape[2] in range(16, 129, 16), f"bad trellis shape {tuple(trellis.shape)}")
    return torch.ops.exl3.decode_trellis(trellis.contiguous(), codebook, parallel.threads())


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
