"""What a comparison asks of a model, whatever computes it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch

from exl3.evaluate.engines.place import Place
from exl3.evaluate.result import Storage
from exl3.evaluate.storage import measure_storage
from exl3.progress import Progress


class Engine(ABC):
    """A model that predicts. Opening it reads configs; weights are loaded when logits are asked.

    arithmetic: what the numbers depend on besides the model's files, such as "transformers,
    float16"; together with `fingerprint()` it tells results apart. vocab: logits of a position.
    context: the longest row, where the config tells.
    """

    arithmetic: str
    vocab: int
    context: int | None

    def __init__(self, place: Place) -> None:
        self.place = place

    @abstractmethod
    def logits(
        self, rows: torch.Tensor, indices: Sequence[int], progress: Progress | None = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Pairs of a row's number and its logits (1, length, vocab), for the rows `indices`.

        rows: ids (n, length). progress: is advanced by `work(len(indices))` in all.
        """

    def work(self, rows: int) -> int:
        """What so many rows are for the progress."""
        return rows

    def storage(self) -> Storage:
        """What the model takes, from its files."""
        return measure_storage(self.place.path)

    def fingerprint(self) -> str:
        """Hash (hex) of the model's content; the same wherever its files are."""
        return self.place.fingerprint()

    def close(self) -> None:
        """Frees what the model holds; it is of no use afterwards."""
        self.place.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
