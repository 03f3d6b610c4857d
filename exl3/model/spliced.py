"""Several EXL3 folders of one model seen as one checkpoint: every layer from one of them."""

from collections.abc import Iterable, Mapping, Sequence

import torch

from exl3.model.quantized import QuantizedCheckpoint


class SplicedCheckpoint:
    """A source of tensors (see `exl3.model.checkpoint.TensorSource`) from several quants.

    origin: module → number of the quant that all its tensors come from; what it does not name
    comes from the first.
    """

    def __init__(self, quants: Sequence[QuantizedCheckpoint], origin: Mapping[str, int]) -> None:
        self.quants = quants
        self._home: dict[str, QuantizedCheckpoint] = {}
        for number, quant in enumerate(quants):
            for key in quant.keys():  # noqa: SIM118
                if origin.get(key.rpartition(".")[0], 0) == number:
                    self._home[key] = quant

    def keys(self) -> Iterable[str]:
        return self._home.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._home[key].shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self._home[key].dtype(key)

    def nbytes(self, key: str) -> int:
        """Bytes in the file; of a layer's codes and scales for its weight."""
        return self._home[key].nbytes(key)

    def tensor(self, key: str) -> torch.Tensor:
        return self._home[key].tensor(key)

    def matrix(self, key: str, index: int) -> torch.Tensor:
        """`tensor(key)[index]`."""
        return self._home[key].matrix(key, index)

    def file(self, key: str) -> str:
        return self._home[key].file(key)

    def expect(self, key: str, shape: tuple[int, ...]) -> None:
        """UserError if the tensor cannot have the shape that the model wants."""
        self._home[key].expect(key, shape)

    def fingerprint(self) -> str:
        """Those of the quants, one after the other."""
        return "".join(quant.fingerprint() for quant in self.quants)
