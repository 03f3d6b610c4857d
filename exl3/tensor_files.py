"""Safetensors files: opened, and written one tensor at a time."""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from exl3.errors import UserError
from exl3.files import atomic_file

SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a file to be written: known by shape, made when its turn comes."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        size = self.dtype.itemsize
        for n in self.shape:
            size *= n
        return size

    @staticmethod
    def of(key: str, tensor: torch.Tensor) -> "LazyTensor":
        return LazyTensor(key, tuple(tensor.shape), tensor.dtype, lambda: tensor)


@contextlib.contextmanager
def opened(path: Path, way_out: str) -> Iterator[Any]:
    """An open safetensors file. UserError, which tells the way out, if it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); {way_out}") from None


def write_safetensors(
    path: Path, tensors: Iterable[LazyTensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file, atomically, with one tensor in memory at a time.

    The library's own `save_file` wants all tensors of a file in memory; shards hold gigabytes.
    """
    tensors = list(tensors)
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for t in tensors:
        header[t.key] = {
            "dtype": SAFETENSORS_NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [end, end + t.nbytes],
        }
        end += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for t in tensors:
            content = t.load()
            if tuple(content.shape) != t.shape or content.dtype != t.dtype:
                raise ValueError(f"{t.key}: planned {t.dtype} {t.shape}, got {content.shape}")
            file.write(tensor_bytes(content))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")
