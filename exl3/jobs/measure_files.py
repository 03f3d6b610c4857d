"""The files of a measurement: OUT, there from the beginning, and OUT.work until it is done.

job.json                   what the numbers depend on
kld/STREAM.safetensors     a finished stream: KL divergence of every position, error of its layers
original.safetensors       what leaves the original's last block
entering/MODEL-BLOCK.safetensors  what enters a block where a sweep begins
states.safetensors         all streams of the sweep under way
layers/KEY.safetensors     a layer that was quantized for the measurement
gradients/                 what passes back between the original's blocks (`exl3.jobs.boundaries`)
sensitivities.json         what that says of every tensor
"""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from exl3.errors import UserError
from exl3.files import PARTIAL, write_json
from exl3.jobs.sensitivities import NAME as SENSITIVITIES
from exl3.jobs.workdir import GRADIENTS, WorkDir
from exl3.measurement import Measurement, read_measurement, write_measurement
from exl3.tensor_files import LazyTensor, opened, write_safetensors

FOLDERS = ("kld", "entering", "layers", GRADIENTS)
NAMES = ("job.json", "lock", "original.safetensors", "states.safetensors", SENSITIVITIES)
STATE = "s:"  # before a stream's name in states.safetensors
HOME = "home"
WAY_OUT = "delete it and start again"  # of damaged files


@dataclass(frozen=True)
class Saved:
    """The states of a sweep between two blocks."""

    model: str
    block: int  # that they enter
    streams: tuple[str, ...]  # all of the sweep, begun or not
    home: torch.Tensor | None
    states: dict[str, torch.Tensor]  # of those that have begun
    errors: dict[str, float | None]


class MeasureFiles:
    """Reads and writes a measurement's progress; every file is whole or not there."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.with_name(out.name + ".work")
        self.work = WorkDir(self.path)

    # -- The job ---------------------------------------------------------------------------------

    def refuse_strangers(self) -> None:
        """UserError if what is to be written has no place, or is there and is something else."""
        out = self.out
        if not out.absolute().parent.is_dir():
            raise UserError(f"-o {out}: the folder {out.absolute().parent} does not exist")
        if out.is_dir():
            raise UserError(f"-o {out} is a folder; give the name of a file")
        if self.path.exists() and not self._is_ours():
            raise UserError(f"{self.path} is in the way of the work folder; give another -o")
        if out.exists() and self.measured() is None:
            raise UserError(f"-o {out} is something else than a measurement; give another name")

    def _is_ours(self) -> bool:
        if not self.path.is_dir():
            return False
        names = {path.name.removesuffix(PARTIAL) for path in self.path.iterdir()}
        return names <= {*NAMES, *FOLDERS}

    def measured(self) -> Measurement | None:
        """What -o holds, None if that is no measurement."""
        try:
            return read_measurement(self.out, partial=True)
        except UserError:
            return None

    @contextlib.contextmanager
    def claimed(self, identity: dict[str, object], job: str) -> Iterator[None]:
        """Keeps other processes out, and makes sure that the job is the one begun here, if any.

        identity: what the numbers depend on, in words; job: their hash, as it stands in OUT.
        """
        found = self.measured() if self.out.exists() else None
        if found is not None and found.job != job:
            raise UserError(
                f"-o {self.out} holds another measurement (level {found.level}, {found.method}, or "
                "of another model, quants or rows); give another name"
            )
        if found is not None and not found.complete and not (self.path / "job.json").exists():
            raise UserError(
                f"-o {self.out} is not finished and its work folder {self.path} is gone; delete it "
                "or give another name"
            )
        with self.work.locked():
            if not self._knows(identity):
                if self._has_progress():
                    raise UserError(
                        f"{self.path} holds a different job{self._difference(identity)}; give "
                        "another -o, or delete that folder"
                    )
                write_json(self.path / "job.json", identity)
            for name in FOLDERS:
                (self.path / name).mkdir(exist_ok=True)
            yield

    def _stored_identity(self) -> dict[str, object]:
        try:
            return dict(json.loads((self.path / "job.json").read_text()))
        except (OSError, ValueError, TypeError):
            return {}

    def _knows(self, identity: dict[str, object]) -> bool:
        return self._stored_identity() == identity

    def _has_progress(self) -> bool:
        """Whether anything would be lost with the work folder."""
        files = (self.original, self.states)
        folders = (self.path / name for name in FOLDERS)
        return any(f.exists() for f in files) or any(
            folder.is_dir() and any(folder.iterdir()) for folder in folders
        )

    def _difference(self, identity: dict[str, object]) -> str:
        before = self._stored_identity()
        changed = [name for name in identity if before.get(name) != identity[name]]
        return f" (other {', '.join(changed)})" if before and changed else ""

    def save_out(self, measurement: Measurement) -> None:
        write_measurement(self.out, measurement)

    def remove_work(self, identity: dict[str, object]) -> None:
        """Removes the work folder, if it is this job's: our own files in it, job.json last."""
        if not self._knows(identity):
            return
        folders = (*(self.path / name for name in FOLDERS), self.path)
        paths = [path for folder in folders for path in sorted(folder.glob("*"))]
        for path in sorted(paths, key=lambda path: path.name == "job.json"):
            if path.is_file():
                path.unlink()
        for folder in folders:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    # -- Finished streams ------------------------------------------------------------------------

    def _kld(self, name: str) -> Path:
        return self.path / "kld" / f"{name}.safetensors"

    def has_kld(self, name: str) -> bool:
        return self._kld(name).is_file()

    def save_kld(self, name: str, klds: torch.Tensor, error: float | None) -> None:
        """klds: float64 (rows, cols); error: of what the stream took."""
        value = torch.tensor(math.nan if error is None else error, dtype=torch.float64)
        tensors = [LazyTensor.of("error", value), LazyTensor.of("kld", klds)]
        write_safetensors(self._kld(name), tensors)

    def load_kld(self, name: str) -> tuple[torch.Tensor, float | None]:
        with opened(self._kld(name), WAY_OUT) as file:
            error = file.get_tensor("error").item()
            return file.get_tensor("kld"), None if math.isnan(error) else error

    # -- States ----------------------------------------------------------------------------------

    @property
    def gradients(self) -> Path:
        return self.path / GRADIENTS

    @property
    def original(self) -> Path:
        return self.path / "original.safetensors"

    def save_original(self, states: torch.Tensor) -> None:
        write_safetensors(self.original, [LazyTensor.of("states", states)])

    def original_row(self, row: int) -> torch.Tensor:
        """(1, cols, hidden)."""
        with opened(self.original, WAY_OUT) as file:
            return file.get_slice("states")[row : row + 1]

    def save_entering(self, model: str, block: int, states: torch.Tensor) -> None:
        path = self.path / "entering" / f"{model}-{block:05}.safetensors"
        write_safetensors(path, [LazyTensor.of("states", states)])

    def load_entering(self, model: str, block: int) -> tuple[int, torch.Tensor | None]:
        """The last block up to `block` of which it is known, and what enters it; older ones are
        removed, for sweeps begin later and later."""
        known = {int(p.stem.rpartition("-")[2]): p for p in self._entering(model)}
        best = max((b for b in known if b <= block), default=0)
        for b, path in known.items():
            if b < best:
                path.unlink()
        if best == 0:
            return 0, None
        with opened(known[best], WAY_OUT) as file:
            return best, file.get_tensor("states")

    def _entering(self, model: str) -> list[Path]:
        return sorted((self.path / "entering").glob(f"{model}-*.safetensors"))

    @property
    def states(self) -> Path:
        return self.path / "states.safetensors"

    def save_states(self, saved: Saved) -> None:
        tensors = {STATE + name: states for name, states in saved.states.items()}
        if saved.home is not None:
            tensors[HOME] = saved.home
        about = {"model": saved.model, "block": saved.block, "streams": saved.streams}
        about["errors"] = saved.errors
        write_safetensors(
            self.states,
            [LazyTensor.of(name, tensor) for name, tensor in tensors.items()],
            {"about": json.dumps(about)},
        )

    def saved_streams(self, model: str) -> tuple[str, ...]:
        """Names of the streams of the sweep under way through a model."""
        if not self.states.is_file():
            return ()
        with opened(self.states, WAY_OUT) as file:
            about = json.loads(file.metadata()["about"])
        return tuple(about["streams"]) if about["model"] == model else ()

    def load_states(self, model: str, names: Sequence[str]) -> Saved | None:
        """The saved states of these streams, None if they are of others."""
        if not names or not set(names) <= set(self.saved_streams(model)):
            return None
        with opened(self.states, WAY_OUT) as file:
            about = json.loads(file.metadata()["about"])
            held = set(file.keys())
            states = {n: file.get_tensor(STATE + n) for n in names if STATE + n in held}
            home = file.get_tensor(HOME) if HOME in held else None
        errors = {name: about["errors"][name] for name in states}
        return Saved(model, about["block"], tuple(names), home, states, errors)

    def drop_states(self) -> None:
        self.states.unlink(missing_ok=True)
