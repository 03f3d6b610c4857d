"""A quantized layer as a model's files hold it: checked by the headers, then by decoding."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from exl3 import parallel
from exl3.errors import UserError
from exl3.format.codebook import CODEBOOKS
from exl3.format.hadamard import HADAMARD
from exl3.format.layer import LAYER_TENSORS, decode_layer, layer_bits, layer_codebook
from exl3.format.trellis import STATE_BITS, TILE
from exl3.model.checkpoint import TensorSource

AGAIN = "download the file again, or convert the model again"
PANEL = 4 * HADAMARD  # columns decoded at a time, so that no layer is ever in memory as a whole
SCALES = (("suh", "su"), ("svh", "sv"))  # either may be there; the second kind is older


@dataclass(frozen=True)
class StoredLayer:
    """What the headers and the marker tell of a layer."""

    name: str
    bits: int
    codebook: str
    weights: int  # padded
    nbytes: int


def read_layer(tensors: TensorSource, name: str, keys: dict[str, str]) -> StoredLayer:
    """The layer `name` of the tensors leaf → key; UserError if they are not one whole layer."""
    home = tensors.file(next(iter(keys.values())))
    if "trellis" not in keys:
        raise UserError(f"{home}: {name}.trellis is missing; {AGAIN}")
    for pair in SCALES:
        if not keys.keys() & set(pair):
            raise UserError(f"{home}: {name}.{pair[0]} is missing; {AGAIN}")
    rows, columns, bits = _trellis(tensors, keys["trellis"])
    expected = _expected(rows, columns)
    for leaf, key in keys.items():
        if leaf not in LAYER_TENSORS:
            raise UserError(
                f"{tensors.file(key)}: {key} stands beside {name}.trellis, where the format has "
                f"no place for it; {AGAIN}"
            )
        if tensors.file(key) != home:
            raise UserError(f"{tensors.file(key)}: {key} is apart from the rest in {home}; {AGAIN}")
        dtype, shape = tensors.dtype(key), tensors.shape(key)
        if (dtype, shape) != expected.get(leaf, (dtype, shape)):
            raise UserError(
                f"{home}: {key} is {described(dtype, shape)}, but its trellis asks for "
                f"{described(*expected[leaf])}; {AGAIN}"
            )
    markers = {leaf: tensors.tensor(keys[leaf]) for leaf in keys if leaf in CODEBOOKS}
    codebook = _codebook(markers, home, name)
    nbytes = sum(tensors.nbytes(key) for key in keys.values())
    return StoredLayer(name, bits, codebook, rows * columns, nbytes)


def described(dtype: torch.dtype, shape: Iterable[int]) -> str:
    """A tensor's dtype and shape for a message."""
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"


def _trellis(tensors: TensorSource, key: str) -> tuple[int, int, int]:
    """Rows, columns and K of a trellis."""
    shape, dtype = tensors.shape(key), tensors.dtype(key)
    try:
        bits = layer_bits(torch.empty(shape, dtype=dtype, device="meta"))
    except UserError as error:
        raise UserError(f"{tensors.file(key)}: {key}: {error}; {AGAIN}") from None
    rows, columns = shape[0] * TILE, shape[1] * TILE
    if not rows * columns or rows % HADAMARD or columns % HADAMARD:
        raise UserError(
            f"{tensors.file(key)}: {key} is of a {rows} x {columns} layer, and dimensions must "
            f"be multiples of {HADAMARD}; {AGAIN}"
        )
    return rows, columns, bits


def _expected(rows: int, columns: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What must stand beside a trellis, if it is there."""
    return {
        "suh": (torch.float16, (rows,)),
        "svh": (torch.float16, (columns,)),
        "su": (torch.int16, (rows // STATE_BITS,)),
        "sv": (torch.int16, (columns // STATE_BITS,)),
        "bias": (torch.float16, (columns,)),
        "mcg": (torch.int32, ()),
        "mul1": (torch.int32, ()),
    }


def _codebook(markers: dict[str, torch.Tensor], home: str, name: str) -> str:
    try:
        codebook = layer_codebook(markers)
    except UserError as error:
        raise UserError(f"{home}: {name}: {error}; {AGAIN}") from None
    if len(markers) > 1:
        raise UserError(f"{home}: {name} has the markers of two codebooks; {AGAIN}")
    return codebook


def count_not_finite(tensor: torch.Tensor) -> int:
    """How many numbers are infinite or not a number."""
    if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:  # float8: torch has no test
        return 0
    return sum(int((~part.isfinite()).sum()) for part in tensor.reshape(-1).split(1 << 24))


def decoded_not_finite(tensors: dict[str, torch.Tensor]) -> int:
    """How many of a layer's weights are not finite numbers; UserError if it cannot be decoded.

    tensors: by their names without the key prefix, as for `decode_layer`.
    """

    def panel(begin: int) -> int:
        end = begin + PANEL
        part = dict(tensors)
        part["trellis"] = tensors["trellis"][:, begin // TILE : end // TILE].contiguous()
        if "svh" in part:
            part["svh"] = tensors["svh"][begin:end]
        else:
            part["sv"] = tensors["sv"][begin // STATE_BITS : end // STATE_BITS]
        return count_not_finite(decode_layer(part))

    return sum(parallel.each(panel, range(0, tensors["trellis"].shape[1] * TILE, PANEL)))
