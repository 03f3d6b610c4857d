"""Files of reference logits, read row by row.

    tensor.0, tensor.1, ...   each (1, length, vocab), float16 or float32
    metadata                  hashes of the model and of the rows

Files made elsewhere have no hashes, and may have one `tensor` (rows, length, vocab) instead.
"""

import hashlib
import json
from collections.abc import Iterator
from itertools import count, takewhile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from exl3.data.rows import rows_hash
from exl3.errors import UserError

SAMPLE = 1 << 20  # bytes of a file's end that stand for its content
MAX_HEADER = 100 << 20  # bytes; what the safetensors library allows


def row_hashes(rows: torch.Tensor) -> list[str]:
    """A short hash of every row of ids (rows, length): files of fewer rows can be told by it."""
    return [rows_hash(row)[:16] for row in rows]


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata in the header of a safetensors file, also of a beginning of one; {} without any."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            content = json.loads(file.read(length)) if length <= MAX_HEADER else {}
    except (OSError, ValueError, RecursionError):
        return {}
    metadata = content.get("__metadata__") if isinstance(content, dict) else None
    return metadata if isinstance(metadata, dict) else {}


class ReferenceLogits:
    """The logits of a file, one row in memory at a time.

    Also takes files without metadata, with all rows in one `tensor` (rows, length, vocab), and
    folders with one file a row. Raises UserError for anything else.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._places = list(self._find())  # of every row: file, tensor, index in it
        self.metadata = read_metadata(self._places[0][0])
        shapes = {shape for *_, shape in self._places}
        if len(shapes) > 1:
            raise UserError(f"{self.path}: rows of different shapes; make it again")
        ((self.length, self.vocab),) = shapes

    def __len__(self) -> int:
        return len(self._places)

    def row(self, i: int) -> torch.Tensor:
        """Logits of row i, float32 (1, length, vocab)."""
        file, key, index, _ = self._places[i]
        try:
            # Opened anew: what an open file has shown stays in the process's memory.
            with safe_open(file, "pt") as content:
                return content.get_slice(key)[index : index + 1].float()
        except (OSError, SafetensorError) as error:
            raise self._unreadable(file, error) from error

    def check(self, rows: torch.Tensor, vocab: int) -> list[str]:
        """Lines to tell the user, if these are logits for the rows of ids (n, length).

        The file may have fewer or more rows than those. UserError if it is for other rows, or a
        model with another vocabulary.
        """
        if self.vocab != vocab:
            raise UserError(
                f"{self.path}: logits for a vocabulary of {self.vocab}, but the model has {vocab}; "
                "they must be of the model's own original"
            )
        used = min(len(self), len(rows))
        hashes = self.metadata.get("row_hashes", "").split()
        if self.length != rows.shape[1] or (hashes and hashes[:used] != row_hashes(rows[:used])):
            raise UserError(
                f"{self.path}: logits for other rows than those of the dataset spec; make them "
                "again with the same spec, or give the spec that they were made with"
            )
        lines = []
        if not hashes:
            lines.append(
                f"Warning: {self.path} does not say for which rows it was made; the numbers mean "
                "something only if it was made with the same dataset spec"
            )
        if used < len(rows):
            lines.append(
                f"{self.path} has {used} of the {len(rows)} rows: KL divergence on those, "
                "perplexity on all"
            )
        return lines

    def fingerprint(self) -> str:
        """sha256 (hex) of the files' sizes, headers and ends of their data."""
        digest = hashlib.sha256()
        for file in dict.fromkeys(place[0] for place in self._places):
            size = file.stat().st_size
            with open(file, "rb") as content:
                length = int.from_bytes(content.read(8), "little")
                digest.update(size.to_bytes(8, "little") + content.read(length))
                digest.update(content.read(SAMPLE))
                content.seek(max(8 + length, size - SAMPLE))
                digest.update(content.read())
        return digest.hexdigest()

    def _find(self) -> Iterator[tuple[Path, str, int, tuple[int, int]]]:
        """Where each row is: file, tensor, index in the tensor, (length, vocab)."""
        if not self.path.exists():
            raise UserError(f"{self.path}: there is no such file of reference logits")
        files = [self.path]
        if self.path.is_dir():
            numbered = (self.path / f"row_{i:06}.safetensors" for i in count())
            files = list(takewhile(Path.is_file, numbered))
        found = [place for file in files for place in self._rows_of(file)]
        if not found:
            raise UserError(
                f"{self.path}: no reference logits in it (tensor.0, tensor.1, ... or tensor); "
                "make them with eval/compare_q_logits.py"
            )
        yield from found

    def _rows_of(self, file: Path) -> Iterator[tuple[Path, str, int, tuple[int, int]]]:
        try:
            with safe_open(file, "pt") as content:
                names = set(content.keys())
                numbered = takewhile(names.__contains__, (f"tensor.{i}" for i in count()))
                for key in ["tensor"] if "tensor" in names else numbered:
                    part = content.get_slice(key)
                    shape = part.get_shape()
                    if len(shape) != 3 or part.get_dtype() not in ("F16", "BF16", "F32", "F64"):
                        raise UserError(
                            f"{file}: {key} is {part.get_dtype()} {tuple(shape)}, not logits "
                            "(rows, length, vocabulary)"
                        )
                    for i in range(shape[0]):
                        yield file, key, i, (shape[1], shape[2])
        except (OSError, SafetensorError) as error:
            raise self._unreadable(file, error) from error

    def _unreadable(self, file: Path, error: Exception) -> UserError:
        return UserError(
            f"{file} cannot be read ({error}); make it again with eval/compare_q_logits.py"
        )
