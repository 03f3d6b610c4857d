"""The folder of a conversion: what the job has done is what the folder shows.

job.json               the settings
calibration.safetensors  the calibration rows
identity.json          hashes of source and rows: what the job works on
layers/KEY.safetensors one finished linear
gradients/             what `exl3.jobs.boundaries` keeps, until the quant is written
states.safetensors     the hidden states that enter a block, and which block
routers/KEY.safetensors  one router's corrected weight
experts/NAME.json      how many tokens routing sent to each expert
tuned/way.json         how the job tunes
tuned/NAME.safetensors a tuning under way; as `result`, every tensor that it made another
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from exl3.errors import UserError
from exl3.files import PARTIAL, take_lock, write_json
from exl3.format.trellis import STATE_BITS
from exl3.jobs.streams import Streams
from exl3.tensor_files import LazyTensor, opened, write_safetensors

WAY_OUT = "delete it and resume the job"  # of damaged files
GRADIENTS = "gradients"

BACKEND = "trellis search"  # the part of the identity that tells what computes
METHOD = "method"  # and the one that grows where a version makes other bytes of the same


class WorkDir:
    """Reads and writes a conversion's progress; every file is whole or not there."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.layers = self.path / "layers"

    # The job

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second process out while this one works here."""
        self.layers.mkdir(parents=True, exist_ok=True)
        with open(self.path / "lock", "w") as file:
            if not take_lock(file):
                raise UserError(f"another process is working in {self.path}; wait for it to end")
            yield

    def check_identity(self, identity: dict[str, str]) -> None:
        """Remembers what the job works on; UserError if it has changed since."""
        path = self.path / "identity.json"
        if not path.exists():
            return write_json(path, identity)
        try:
            before = dict(json.loads(path.read_text()))
        except (ValueError, TypeError):
            raise UserError(f"{path} is damaged; start afresh in another work folder") from None
        changed = [k for k in identity if before.get(k) != identity[k]]
        if changed and {BACKEND, METHOD}.issuperset(changed) and not self._has_results():
            return write_json(path, identity)
        if METHOD in changed:
            raise UserError(
                f"another version of exl3 began the job in {self.path}, and this one would go on "
                "otherwise; finish it with that version, or start afresh in another work folder "
                "(-w), or with -nr"
            )
        if changed == [BACKEND] and "GPU" in (before[BACKEND], identity[BACKEND]):
            began, way = "a GPU", "with a GPU (-d 0)"
            if identity[BACKEND] == "GPU":
                began, way = "the CPU", "there (-d cpu)"
            raise UserError(
                f"the job in {self.path} began on {began}, and another device would end in other "
                f"bytes; go on {way}, or start afresh in another work folder"
            )
        if changed:
            raise UserError(
                f"the {' and the '.join(changed)} changed since the job in {self.path} began; "
                f"start afresh in another work folder"
            )

    def _has_results(self) -> bool:
        """Whether anything has been computed."""
        patterns = ("layers/*", "states.safetensors", "gradients/*", "sensitivities.json")
        return any(any(self.path.glob(pattern)) for pattern in patterns)

    # Calibration rows

    def load_rows(self) -> torch.Tensor | None:
        found = _read(self.path / "calibration.safetensors")
        return found[0]["rows"] if found else None

    def save_rows(self, rows: torch.Tensor) -> None:
        write_safetensors(self.path / "calibration.safetensors", [LazyTensor.of("rows", rows)])

    # Finished layers

    def layer_path(self, key: str) -> Path:
        return self.layers / f"{key}.safetensors"

    def has_layer(self, key: str) -> bool:
        return self.layer_path(key).is_file()

    def load_layer(self, key: str) -> dict[str, torch.Tensor]:
        """The tensors of a finished layer, by their names without the key."""
        found = _read(self.layer_path(key))
        if found is None:
            raise UserError(f"{self.layer_path(key)} is gone; resume the job to make it again")
        return found[0]

    def layer_bits(self, key: str) -> int:
        """K of a finished layer."""
        with opened(self.layer_path(key), WAY_OUT) as file:
            return file.get_slice("trellis").get_shape()[-1] // STATE_BITS

    def save_layer(
        self, key: str, tensors: dict[str, torch.Tensor], report: dict[str, float]
    ) -> None:
        write_safetensors(
            self.layer_path(key),
            [LazyTensor.of(name, t) for name, t in sorted(tensors.items())],
            {"report": json.dumps(report)},
        )

    # The original's gradients

    @property
    def gradients(self) -> Path:
        return self.path / GRADIENTS

    def drop_gradients(self) -> None:
        """Gives back their room on the disk."""
        for ending in ("", PARTIAL):
            for path in self.gradients.glob(f"*.safetensors{ending}"):
                path.unlink()
        if self.gradients.is_dir() and not any(self.gradients.iterdir()):
            self.gradients.rmdir()

    # Corrected routers

    def save_router(self, key: str, weight: torch.Tensor) -> None:
        """key: of the weight."""
        self._router_path(key).parent.mkdir(exist_ok=True)
        write_safetensors(self._router_path(key), [LazyTensor.of("weight", weight)])

    def has_router(self, key: str) -> bool:
        return self._router_path(key).is_file()

    def load_router(self, key: str) -> torch.Tensor:
        """The corrected weight."""
        found = _read(self._router_path(key))
        if found is None:
            raise UserError(f"{self._router_path(key)} is gone; resume the job to make it again")
        return found[0]["weight"]

    def _router_path(self, key: str) -> Path:
        return self.path / "routers" / f"{key}.safetensors"

    # Tokens that routing sent to experts

    def save_counts(self, name: str, counts: list[int]) -> None:
        """name: of the module that holds the experts."""
        (self.path / "experts").mkdir(exist_ok=True)
        write_json(self.path / "experts" / f"{name}.json", {"tokens": counts})

    # Tuning

    def save_tuning(self, name: str, tensors: dict[str, torch.Tensor], facts: dict) -> None:
        """facts: what JSON can hold."""
        (self.path / "tuned").mkdir(exist_ok=True)
        write_safetensors(
            self.path / "tuned" / f"{name}.safetensors",
            [LazyTensor.of(key, t) for key, t in tensors.items()],
            {"facts": json.dumps(facts)},
        )

    def load_tuning(self, name: str) -> tuple[dict[str, torch.Tensor], dict] | None:
        """Tensors and facts, None if they were not saved."""
        found = _read(self.path / "tuned" / f"{name}.safetensors")
        return None if found is None else (found[0], json.loads(found[1]["facts"]))

    # Hidden states

    def load_states(self, streams: Streams) -> int:
        """Fills in the states that were saved last; the block they enter, 0 if there are none."""
        found = _read(self.path / "states.safetensors")
        if found is None:
            return 0
        for name, kept in (("quantized", "states"), ("original", "original")):
            if kept in found[0]:
                states = streams.empty(*found[0][kept].shape)
                setattr(streams, name, states.copy_(found[0].pop(kept)))
        return int(found[1]["block"])

    def save_states(self, block: int, streams: Streams) -> None:
        """Saves what enters a block."""
        states = [LazyTensor.of("original", streams.original)]
        if streams.paired:
            states.append(LazyTensor.of("states", streams.quantized))
        write_safetensors(self.path / "states.safetensors", states, {"block": str(block)})


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    if not path.is_file():
        return None
    with opened(path, WAY_OUT) as file:
        content = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        return content, file.metadata() or {}
