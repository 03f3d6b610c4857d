"""The tensors of a model folder, read from safetensors files whose headers are checked first.

A folder may be half downloaded or come from a stranger, so nothing in it is trusted: every header
is parsed and checked here, and every complaint is one sentence naming the file and the way out.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from exl3.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000  # the safetensors library's own limit
ALIGNMENT = 64  # bytes, of torch's own tensors
SAMPLE = 64 * 1024  # bytes that the fingerprint reads at each of its places in a file
SAMPLES = 256  # places, evenly spread; a file of up to 16 MiB is read whole

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorSource(Protocol):
    """Named tensors which are read one at a time; what `StreamedModel` loads from."""

    def keys(self) -> Iterable[str]: ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def dtype(self, key: str) -> torch.dtype: ...

    def nbytes(self, key: str) -> int: ...

    def tensor(self, key: str) -> torch.Tensor: ...

    def matrix(self, key: str, index: int) -> torch.Tensor:
        """`tensor(key)[index]`, without reading the rest where that is possible."""

    def file(self, key: str) -> str: ...

    def expect(self, key: str, shape: tuple[int, ...]) -> None:
        """Tells the shape that the model wants; UserError if the tensor cannot have it."""

    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Entry:
    """One tensor as a header describes it."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # offset in the file's data section
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class Checkpoint:
    """The tensors of a folder with `model.safetensors`, indexed shards, or `*.safetensors`.

    Raises UserError for whatever is missing, truncated, contradictory or outside the folder.
    May be used from several threads at once.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"{self.folder} is not a folder; give the folder of a model.")
        names, promised = _files(self.folder)
        self.files: tuple[str, ...] = tuple(sorted(names))
        self._entries: dict[str, Entry] = {}
        for name in self.files:
            self._add(read_header(self.folder / name))
        for key, name in promised.items():
            if key not in self._entries or self._entries[key].file != name:
                raise UserError(
                    f"{INDEX} promises {key} in {name}, but it is not there; "
                    "download both files again."
                )

    def _add(self, entries: dict[str, Entry]) -> None:
        for key, entry in entries.items():
            if key in self._entries:
                raise UserError(
                    f"{key} is in {self._entries[key].file} and again in {entry.file}; "
                    "remove the file that does not belong to the model."
                )
            self._entries[key] = entry

    def keys(self) -> Iterable[str]:
        """The tensors' names, by file and then by place in the file."""
        return self._entries.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._entries[key].shape

    def dtype(self, key: str) -> torch.dtype:
        return self._entries[key].dtype

    def nbytes(self, key: str) -> int:
        """Bytes of the tensor in its file."""
        return self._entries[key].nbytes

    def file(self, key: str) -> str:
        """Name of the file that holds the tensor, without the folder."""
        return self._entries[key].file

    def expect(self, key: str, shape: tuple[int, ...]) -> None:
        """UserError unless the tensor has the shape that the model wants."""
        if self.shape(key) != shape:
            raise UserError(
                f"{self.file(key)}: {key} is {self.shape(key)}, but by config.json it is {shape}; "
                "check that the files belong together."
            )

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor, on the CPU, in its stored dtype; the caller's own to write into."""
        return self._read(key, lambda file: file.get_tensor(key))

    def matrix(self, key: str, index: int) -> torch.Tensor:
        """`tensor(key)[index]`, of which alone the bytes are read."""
        return self._read(key, lambda file: file.get_slice(key)[index : index + 1])[0]

    def _read(self, key: str, take: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        name = self._entries[key].file
        try:
            # Opened anew: the tensors of one handle share memory, and so what is written there.
            with safe_open(self.folder / name, framework="pt", device="cpu") as file:
                return _aligned(take(file))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{name}: {key} cannot be read ({error}); check the file.") from error

    def fingerprint(self) -> str:
        """sha256 (hex) of config.json, of the files' names, sizes, headers and parts of their data.

        Of a large file 16 MiB are read: it tells models and downloads apart, and is no proof
        against somebody who edits a few bytes.
        """
        digest = hashlib.sha256()

        def add(part: bytes) -> None:
            digest.update(len(part).to_bytes(8, "little"))  # so that parts cannot run together
            digest.update(part)

        config = self.folder / "config.json"
        add(config.read_bytes() if config.is_file() else b"")
        for name in self.files:
            path = self.folder / name
            size = path.stat().st_size
            with path.open("rb") as file:
                start = 8 + int.from_bytes(file.read(8), "little")
                add(name.encode())
                add(size.to_bytes(8, "little"))
                add(file.read(start - 8))
                step = max(SAMPLE, (size - start) // SAMPLES)
                for place in (*range(start, size, step), max(start, size - SAMPLE)):
                    file.seek(place)
                    add(file.read(SAMPLE))
        return digest.hexdigest()


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor at an address where torch would put it: it is read to where it is in its file, and
    the last bits of a product with one row depend on that."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


class View:
    """A source of tensors (see `TensorSource`) that shows another's; subclasses change some."""

    def __init__(self, source: TensorSource):
        self.source = source

    def keys(self) -> Iterable[str]:
        return self.source.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self.source.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self.source.dtype(key)

    def nbytes(self, key: str) -> int:
        """Bytes in the file."""
        return self.source.nbytes(key)

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor, the caller's own to write into."""
        return self.source.tensor(key)

    def matrix(self, key: str, index: int) -> torch.Tensor:
        """`tensor(key)[index]`."""
        return self.source.matrix(key, index)

    def file(self, key: str) -> str:
        return self.source.file(key)

    def expect(self, key: str, shape: tuple[int, ...]) -> None:
        """UserError unless the tensor has the shape that the model wants."""
        self.source.expect(key, shape)

    def fingerprint(self) -> str:
        return self.source.fingerprint()


def _files(folder: Path) -> tuple[set[str], dict[str, str]]:
    """The folder's safetensors file names, and what its index promises (tensor → file name)."""
    if (folder / SINGLE).is_file():
        return {SINGLE}, {}
    if (folder / INDEX).is_file():
        promised = _read_index(folder / INDEX)
        for name in sorted(set(promised.values())):
            if not (folder / name).is_file():
                raise UserError(f"{name} is missing, but {INDEX} names it; download it again.")
        return set(promised.values()), promised
    names = {path.name for path in folder.glob("*.safetensors")}
    if not names:
        raise UserError(f"{folder} has no .safetensors file; give the folder of a model.")
    return names, {}


def _read_index(path: Path) -> dict[str, str]:
    """The index's weight_map, tensor → plain file name; UserError if it is anything else."""
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path.name} has no weight_map; download it again.")
    for key, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise UserError(f"{path.name} names {name!r} for {key}, which is no safetensors file.")
        if any(mark in name for mark in "/\\:\0"):
            raise UserError(
                f"{path.name} names {name!r} for {key}, which is outside the model's folder; "
                "do not use this file."
            )
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError if it is missing or anything else."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}; give the folder of a model.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path.name} cannot be read ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path.name} is not a JSON object; download it again.")
    return value


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors a safetensors file says it has, in the order of their data, all checked."""
    raw, data_bytes = _raw_header(path)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise UserError(f"{path.name} has a header that is not JSON; download it again.")
    header.pop("__metadata__", None)
    entries = {key: _entry(path.name, key, value) for key, value in header.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    end = 0
    for key, entry in ordered.items():
        if entry.begin != end:
            raise UserError(f"{path.name}: {key} overlaps or leaves a gap; download it again.")
        end = entry.end
    whole = 8 + len(raw) + end
    if data_bytes < end:
        size = 8 + len(raw) + data_bytes
        raise UserError(
            f"{path.name} is truncated: {size:,} of {whole:,} bytes; download it again."
        )
    if data_bytes > end:
        raise UserError(
            f"{path.name} is {data_bytes - end:,} bytes longer than its header says; "
            "download it again."
        )
    return ordered


def _raw_header(path: Path) -> tuple[bytes, int]:
    """The header's JSON bytes, and how many bytes of data follow it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if prefix == b"version ":  # as a header's length it would be eight exabytes
                raise UserError(
                    f"{path.name} is a Git LFS pointer, not the tensors; run `git lfs pull`."
                )
            length = int.from_bytes(prefix, "little")
            if size < 8:
                raise UserError(f"{path.name} is truncated: {size:,} bytes; download it again.")
            if length > MAX_HEADER:
                raise UserError(f"{path.name} is not a safetensors file; download it again.")
            if 8 + length > size:
                raise UserError(
                    f"{path.name} is truncated: {size:,} bytes of at least {8 + length:,}; "
                    "download it again."
                )
            return file.read(length), size - 8 - length
    except OSError as error:
        raise UserError(f"{path.name} cannot be read ({error.strerror}).") from error


def _entry(file: str, key: str, value: Any) -> Entry:
    """One tensor's description, with offsets that fit its dtype and shape."""
    value = value if isinstance(value, dict) else {}
    shape, offsets = value.get("shape"), value.get("data_offsets")
    if not (_sizes(shape) and _sizes(offsets) and len(offsets) == 2):
        raise UserError(f"{file}: the header's entry for {key} is damaged; download it again.")
    dtype = DTYPES.get(str(value.get("dtype")))
    if dtype is None:
        raise UserError(
            f"{file}: {key} has the dtype {value.get('dtype')!r}, which exl3 does not know; "
            "use a version of the model in bfloat16, float16 or float32."
        )
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise UserError(
            f"{file}: {key} is {tuple(shape)} in {value['dtype']}, which does not fit its "
            f"{end - begin:,} bytes; download the file again."
        )
    return Entry(file, dtype, tuple(shape), begin, end)


def _sizes(value: Any) -> bool:
    """Whether this is a list of whole numbers from 0 up (True is no number here)."""
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
