"""The one door to the kernels: op schemas, backends, and the Python functions of the same names.

Every op has a plain torch reference (`exl3/reference.py`), which also serves where no kernel is
built, and kernels in `csrc/` that the dispatcher prefers for tensors of their device. Importing
this module loads them (`exl3/build.py`).
"""

import torch

from exl3 import build, parallel, reference
from exl3.format.codebook import CODEBOOKS
from exl3.format.hadamard import HADAMARD

# Up to so many rows a GPU decodes weights where it multiplies them; for more it decodes them into
# memory first, and cuBLAS multiplies. csrc/cuda/linear.hpp has the number too, as its limit.
FUSED_ROWS = 32

SCHEMAS = (
    # Trellis search. `threads`: CPU workers; the result does not depend on it.
    "encode_tiles(Tensor tiles, int bits, str codebook, int threads) -> (Tensor, Tensor)",
    # Packed trellis (in/16, out/16, 16*bits) -> float16 inner matrix (in, out).
    "decode_trellis(Tensor trellis, str codebook, int threads) -> Tensor",
    # (x * before) B * after, by blocks of 128 of the last dimension.
    "hadamard_128(Tensor x, Tensor? before, Tensor? after, int threads) -> Tensor",
    # Trellis and scales -> W (in, out), float16 or float32.
    "decode_weight(Tensor trellis, Tensor suh, Tensor svh, str codebook, ScalarType dtype,"
    " int threads) -> Tensor",
    # The forward of a layer for up to FUSED_ROWS rows of float16.
    "fused_linear(Tensor x, Tensor trellis, Tensor suh, Tensor svh, Tensor? bias, str codebook,"
    " int threads) -> Tensor",
)

_library = torch.library.Library("exl3", "DEF")
for _schema in SCHEMAS:
    _library.define(_schema)
    _name = _schema.partition("(")[0]
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


HAVE_KERNELS = build.load_kernels()
HAVE_GPU_KERNELS = torch._C._dispatch_has_kernel_for_dispatch_key("exl3::decode_trellis", "CUDA")


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
    _check_trellis(trellis, codebook)
    return torch.ops.exl3.decode_trellis(trellis.contiguous(), codebook, parallel.threads())


def hadamard_128(
    x: torch.Tensor, before: torch.Tensor | None = None, after: torch.Tensor | None = None
) -> torch.Tensor:
    """(x * before) B(n) * after, for x (..., n), n a multiple of 128: `exl3.format.hadamard`'s B.

    x: float32, or float16, which is float32 inside and rounded once. before, after: float16 (n,),
    None for ones. Returns x's shape and dtype. ValueError for bad arguments.
    """
    _check(x.dtype in (torch.float32, torch.float16), f"x must be float32 or 16, not {x.dtype}")
    _check(x.dim() >= 1 and x.shape[-1] % HADAMARD == 0, f"bad shape {tuple(x.shape)}")
    for scale in (before, after):
        _check_scale(scale, x.shape[-1])
    return torch.ops.exl3.hadamard_128(x.contiguous(), before, after, parallel.threads())


def decode_weight(
    trellis: torch.Tensor,
    suh: torch.Tensor,
    svh: torch.Tensor,
    codebook: str,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """W = diag(suh) B(in) W_hat B(out) diag(svh), (in, out), float32 inside.

    trellis: int16 (in/16, out/16, 16*bits), in and out multiples of 128; suh, svh: float16 (in,),
    (out,); dtype: float32 or float16. ValueError for bad arguments.
    """
    _check_layer(trellis, suh, svh, codebook)
    _check(dtype in (torch.float32, torch.float16), f"W is float32 or float16, not {dtype}")
    return torch.ops.exl3.decode_weight(
        trellis.contiguous(), suh, svh, codebook, dtype, parallel.threads()
    )


def linear(
    x: torch.Tensor,
    trellis: torch.Tensor,
    suh: torch.Tensor,
    svh: torch.Tensor,
    codebook: str,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W + bias of an EXL3 layer, (rows, in) -> (rows, out), without ever making W.

    x is transformed, multiplied by W_hat, which float16 holds exactly, and transformed back. In
    float32 nothing else is rounded; in float16 x and the result are, after their transforms.
    Shapes and dtypes as for `decode_weight`; bias: float16 (out,). ValueError for bad arguments.
    """
    _check_layer(trellis, suh, svh, codebook)
    _check(x.dtype in (torch.float32, torch.float16), f"x must be float32 or 16, not {x.dtype}")
    _check(x.dim() == 2 and x.shape[1] == len(suh), f"bad shape {tuple(x.shape)} of x")
    if bias is not None:
        _check_scale(bias, len(svh))
    arguments = (x.contiguous(), trellis.contiguous(), suh, svh, bias, codebook)
    # The one place where a way is chosen.
    if x.is_cuda and x.dtype == torch.float16 and len(x) <= FUSED_ROWS:
        return torch.ops.exl3.fused_linear(*arguments, parallel.threads())
    return reference.fused_linear(*arguments, parallel.threads())


def _check_trellis(trellis: torch.Tensor, codebook: str) -> None:
    _check(codebook in CODEBOOKS, f"unknown codebook {codebook!r}")
    _check(trellis.dtype == torch.int16 and trellis.dim() == 3, "trellis must be int16, 3D")
    _check(trellis.shape[2] in range(16, 129, 16), f"bad trellis shape {tuple(trellis.shape)}")


def _check_layer(
    trellis: torch.Tensor, suh: torch.Tensor, svh: torch.Tensor, codebook: str
) -> None:
    _check_trellis(trellis, codebook)
    for scale, tiles in zip((suh, svh), trellis.shape[:2], strict=True):
        _check(tiles % (HADAMARD // 16) == 0, f"bad trellis shape {tuple(trellis.shape)}")
        _check_scale(scale, 16 * tiles)


def _check_scale(scale: torch.Tensor | None, size: int) -> None:
    if scale is not None:
        fits = scale.dtype == torch.float16 and scale.shape == (size,)
        _check(fits, f"scales must be float16 ({size},), not {scale.dtype} {tuple(scale.shape)}")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
