"""The tensors of a GGUF file, by its header: name, number of weights, bytes."""

import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO

from exl3.errors import UserError

MAGIC = b"GGUF"
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # kind → bytes
STRING, ARRAY = 8, 9
MANY = 1 << 24  # entries of anything: more is damage
ALIGNMENT = 32


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file."""

    name: str
    shape: tuple[int, ...]  # the fastest dimension first: (in, out) of a linear
    nbytes: int  # the padding behind it (less than 32 bytes) included

    @property
    def weights(self) -> int:
        return prod(self.shape)


def gguf_parts(path: Path) -> list[Path]:
    """The file, or all files of a model that was split, of which any may be given."""
    found = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name)
    if not found:
        return [path]
    stem, count = found[1], int(found[2])
    names = [f"{stem}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]
    for name in names:
        if not (path.parent / name).is_file():
            raise UserError(f"{path.parent} has no {name}, which belongs to {path.name}")
    return [path.parent / name for name in names]


def gguf_tensors(path: Path) -> list[GgufTensor]:
    """All tensors of a model. UserError for files that are not GGUF, or damaged."""
    return [tensor for part in gguf_parts(path) for tensor in _tensors(part)]


def _tensors(path: Path) -> list[GgufTensor]:
    try:
        with path.open("rb") as file:
            return _read(file, path.stat().st_size)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, struct.error, MemoryError):
        raise UserError(f"{path} is not a sound GGUF file; download it again") from None


def _read(file: IO[bytes], size: int) -> list[GgufTensor]:
    if file.read(4) != MAGIC or _number(file, "I") not in (2, 3):
        raise ValueError
    count, pairs = _number(file, "Q"), _number(file, "Q")
    if max(count, pairs) > MANY:
        raise ValueError
    alignment = ALIGNMENT
    for _ in range(pairs):
        key, kind = _string(file), _number(file, "I")
        if key == b"general.alignment" and kind == 4:
            alignment = _number(file, "I")
        else:
            _skip(file, kind)
    found = [_entry(file) for _ in range(count)]
    begin = -(-file.tell() // alignment) * alignment
    # Types and their block sizes are many; where the next tensor begins tells the bytes as well.
    found.sort(key=lambda entry: entry[2])
    ends = [offset for _, _, offset in found[1:]] + [size - begin]
    if any(end < offset for (_, _, offset), end in zip(found, ends, strict=False)):
        raise ValueError
    return [
        GgufTensor(name, shape, end - offset)
        for (name, shape, offset), end in zip(found, ends, strict=False)
    ]


def _entry(file: IO[bytes]) -> tuple[str, tuple[int, ...], int]:
    """Name, shape and offset in the data."""
    name = _string(file).decode()
    dims = _number(file, "I")
    if dims > 8:
        raise ValueError
    shape = tuple(_number(file, "Q") for _ in range(dims))
    _number(file, "I")  # its type
    return name, shape, _number(file, "Q")


def _number(file: IO[bytes], kind: str) -> int:
    return struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))[0]


def _string(file: IO[bytes]) -> bytes:
    length = _number(file, "Q")
    if length > MANY:
        raise ValueError
    return file.read(length)


def _skip(file: IO[bytes], kind: int, depth: int = 0) -> None:
    if kind == STRING:
        _string(file)
    elif kind == ARRAY:
        element, count = _number(file, "I"), _number(file, "Q")
        if count > MANY or depth > 4:
            raise ValueError
        if element in SIZES:
            file.seek(SIZES[element] * count, 1)
        else:
            for _ in range(count):
                _skip(file, element, depth + 1)
    else:
        file.seek(SIZES[kind], 1)
