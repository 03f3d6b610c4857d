"""Writes a file of reference logits, row by row, so that a killed job goes on where it was.

The header is known before the first row. So the unfinished file, OUT.partial, is a beginning of the
finished one, and its length says how many rows are in it.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import torch

from exl3 import __version__
from exl3.data.rows import rows_hash
from exl3.errors import UserError
from exl3.evaluate.logits_file import read_metadata, row_hashes
from exl3.files import PARTIAL, sync_folder, take_lock
from exl3.tensor_files import SAFETENSORS_NAMES, tensor_bytes

STORED = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Planned:
    """A file of reference logits that is to be written."""

    model: str  # fingerprint
    rows_hash: str
    row_hashes: str  # separated by blanks
    dtype: str  # of STORED
    rows: int
    length: int
    vocab: int

    @staticmethod
    def of(model: str, rows: torch.Tensor, vocab: int, dtype: str = "float16") -> "Planned":
        """rows: ids (rows, length)."""
        hashes = " ".join(row_hashes(rows))
        return Planned(model, rows_hash(rows), hashes, dtype, *rows.shape, vocab)

    @property
    def row_bytes(self) -> int:
        return self.length * self.vocab * STORED[self.dtype].itemsize

    @property
    def metadata(self) -> dict[str, str]:
        own = {name: str(value) for name, value in asdict(self).items()}
        return {"producer": f"exl3 {__version__}", **own}

    def header(self) -> bytes:
        """All bytes of the file before its first row."""
        content: dict[str, object] = {"__metadata__": self.metadata}
        for row in range(self.rows):
            content[f"tensor.{row}"] = {
                "dtype": SAFETENSORS_NAMES[STORED[self.dtype]],
                "shape": [1, self.length, self.vocab],
                "data_offsets": [row * self.row_bytes, (row + 1) * self.row_bytes],
            }
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format wants the data aligned
        return len(text).to_bytes(8, "little") + text

    def is_complete(self, path: Path) -> bool:
        """Whether the file is there and this one; UserError if another one is."""
        if not path.exists():
            return False
        if differing := self._differences(read_metadata(path)):
            raise UserError(
                f"{path} is there already, with another {differing}; delete it, or give another -o"
            )
        return True

    def refuse_other_job(self, partial: Path) -> None:
        """UserError for the beginning of a file, with header, that is not the beginning of this."""
        differing = self._differences(read_metadata(partial)) or "version of exl3"
        raise UserError(
            f"{partial} is the beginning of a file with another {differing}; delete it to start "
            "afresh, or give another -o"
        )

    def _differences(self, found: dict[str, str]) -> str:
        """Which of what defines the logits is another than in a file's metadata."""
        names = {"model": "model", "rows_hash": "rows", "vocab": "vocabulary", "dtype": "dtype"}
        return " and another ".join(
            word for name, word in names.items() if found.get(name) != self.metadata[name]
        )


class LogitsWriter:
    """Appends rows to the file; `done` of them are there already."""

    def __init__(self, file: IO[bytes], planned: Planned, done: int) -> None:
        self.file, self.planned, self.done = file, planned, done

    def add(self, logits: torch.Tensor) -> bool:
        """Writes the next row, (1, length, vocab), which may be changed on the way.

        Returns whether something was beyond the range of the dtype, and so put to its end.
        Raises UserError for logits that are not numbers.
        """
        if tuple(logits.shape) != (1, self.planned.length, self.planned.vocab):
            raise ValueError(f"row {self.done}: planned another shape than {tuple(logits.shape)}")
        dtype = STORED[self.planned.dtype]
        limit = torch.finfo(dtype).max
        low, high = (edge.item() for edge in logits.aminmax())
        if low != low or high != high:
            raise UserError(
                f"the model's predictions for row {self.done} are not numbers (NaN); "
                "its files may be damaged"
            )
        beyond = max(-low, high) > limit
        if beyond:
            logits.clamp_(-limit, limit)
        self.file.write(tensor_bytes(logits.to(dtype)))
        self.file.flush()
        os.fsync(self.file.fileno())  # a length that lasts only with its data
        self.done += 1
        return beyond


@contextmanager
def logits_writer(path: Path, planned: Planned) -> Iterator[LogitsWriter]:
    """Goes on with `path`.partial, which takes the name `path` once all its rows are written.

    Raises UserError if it is another job's, or another process is writing it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    partial.touch()
    with open(partial, "r+b") as file:
        if not take_lock(file):
            raise UserError(f"another process is writing {path}; wait for it to end")
        writer = LogitsWriter(file, planned, _rows_done(file, planned, partial))
        yield writer
    if writer.done == planned.rows:
        os.replace(partial, path)
        sync_folder(path.parent)


def _rows_done(file: IO[bytes], planned: Planned, partial: Path) -> int:
    """Cuts off what follows the last whole row, or begins the file. Leaves the file at its end."""
    header = planned.header()
    found = file.read(len(header))
    if not header.startswith(found):
        planned.refuse_other_job(partial)
    if len(found) < len(header):  # killed before there was any row
        file.seek(0)
        file.write(header)
    data = max(0, os.fstat(file.fileno()).st_size - len(header))
    done = min(data // planned.row_bytes, planned.rows)
    file.truncate(len(header) + done * planned.row_bytes)
    file.seek(0, os.SEEK_END)
    return done
