"""One stored linear layer: its tensors, its codebook, and the weights they stand for."""

import torch

from exl3 import ops
from exl3.errors import UserError
from exl3.format.codebook import CODEBOOKS
from exl3.format.hadamard import HADAMARD
from exl3.format.trellis import STATE_BITS, TILE

# Everything a layer may be stored as, under its key: the bias is the only optional weight.
LAYER_TENSORS = ("trellis", "suh", "svh", "su", "sv", "mcg", "mul1", "bias")

UNQUANTIZED = 16  # "bits" of a layer that is stored as it was

PANEL = 2048  # columns that are decoded at a time


def padded(size: int) -> int:
    """`size` rounded up to the next multiple of 128, the width of the Hadamard transform."""
    return -(-size // HADAMARD) * HADAMARD


def layer_codebook(tensors: dict[str, torch.Tensor]) -> str:
    """The name of the codebook that a layer's marker tensors tell of."""
    for name, book in CODEBOOKS.items():
        if name in tensors and book.marker is not None:
            if tensors[name].numel() != 1 or tensors[name].item() != book.marker.item():
                raise UserError(f"the layer's {name} multiplier is not the one known here")
            return name
    return "3inst"


def layer_bits(trellis: torch.Tensor) -> int:
    """K of a packed trellis (in/16, out/16, 16*K); UserError if it is none."""
    bits, rest = divmod(trellis.shape[-1], STATE_BITS) if trellis.dim() == 3 else (0, 1)
    if rest or bits not in range(1, 9) or trellis.dtype != torch.int16:
        raise UserError(
            f"a trellis must be int16 of shape (in/16, out/16, 16*K), K = 1 to 8, not "
            f"{trellis.dtype} {tuple(trellis.shape)}"
        )
    return bits


def decode_layer(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weights of a layer: W = diag(suh) B(in) W_hat B(out) diag(svh).

    tensors: the layer's tensors by their names without the key prefix.
    Returns W, float32 (in, out), padded shape. UserError if the tensors contradict each other.
    """
    trellis, suh, svh = layer_parts(tensors)
    codebook = layer_codebook(tensors)
    weight = torch.empty(len(suh), len(svh), device=trellis.device)
    for a in range(0, len(svh), PANEL):  # columns, whole Hadamard blocks: bounds the memory
        part = slice(a, a + PANEL)
        tiles = slice(a // TILE, (a + PANEL) // TILE)
        weight[:, part] = ops.decode_weight(trellis[:, tiles], suh, svh[part], codebook)
    return weight


def layer_parts(
    tensors: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """trellis, suh and svh, float16 of the trellis's dimensions; UserError as `decode_layer`."""
    if "trellis" not in tensors:
        raise UserError(f"a layer needs a trellis; there are only {sorted(tensors)}")
    trellis = tensors["trellis"]
    layer_bits(trellis)
    sizes = (trellis.shape[0] * TILE, trellis.shape[1] * TILE)
    scales = []
    for name, old, size in zip(("suh", "svh"), ("su", "sv"), sizes, strict=True):
        scale = _scale(tensors, name, old)
        if scale.shape != (size,) or size % HADAMARD:
            raise UserError(f"{name} has shape {tuple(scale.shape)}, the trellis asks for {size}")
        scales.append(scale)
    return trellis, *scales


def _scale(tensors: dict[str, torch.Tensor], name: str, old: str) -> torch.Tensor:
    """The scales `name`, or the signs of the old bit field: 16 channels a word, set = -1."""
    if name in tensors:
        return tensors[name].half()
    if old not in tensors:
        raise UserError(f"a layer needs {name} (or {old}); there are only {sorted(tensors)}")
    words = tensors[old].to(torch.int32) & 0xFFFF
    bit = (words[:, None] >> torch.arange(16, dtype=torch.int32, device=words.device)) & 1
    return 1 - 2 * bit.reshape(-1).half()
