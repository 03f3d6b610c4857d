"""An EXL3 folder seen as an ordinary checkpoint: layers are decoded when they are read."""

from collections.abc import Iterable
from pathlib import Path

import torch

from exl3.errors import UserError
from exl3.format.layer import LAYER_TENSORS, decode_layer, padded
from exl3.format.trellis import TILE
from exl3.model.checkpoint import Checkpoint, read_json
from exl3.model.rope import Rope
from exl3.model.streamed import StreamedModel


class QuantizedCheckpoint:
    """A source of tensors (see `exl3.model.checkpoint.TensorSource`) from an EXL3 folder.

    Every layer `KEY.trellis`, ... appears as `KEY.weight`, float32 (out, in), without padding
    once `expect` has told the shape.
    """

    def __init__(self, folder: str | Path) -> None:
        self.stored = Checkpoint(folder)
        suffix = ".trellis"
        self._names = set(self.stored.keys())
        self.layers = {k.removesuffix(suffix) for k in self._names if k.endswith(suffix)}
        self._shapes: dict[str, tuple[int, ...]] = {}  # without padding

    def keys(self) -> Iterable[str]:
        for key in self.stored.keys():  # noqa: SIM118
            name, _, leaf = key.rpartition(".")
            if name not in self.layers or leaf == "bias":
                yield key
            elif leaf == "trellis":
                yield f"{name}.weight"

    def expect(self, key: str, shape: tuple[int, ...]) -> None:
        """Padding beyond the model's shape is cut off; UserError for any other difference."""
        if not self._layer(key):
            self.stored.expect(key, shape)
        elif self._stored_shape(key) == tuple(padded(n) for n in shape):
            self._shapes[key] = shape
        else:
            raise UserError(
                f"{self.file(key)}: {key} is {self._stored_shape(key)}, but by config.json it is "
                f"{shape}; check that the files belong together"
            )

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shapes.get(key) or self._stored_shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return torch.float32 if self._is_weight(key) else self.stored.dtype(key)

    def nbytes(self, key: str) -> int:
        """Bytes in the file; of a layer's codes and scales for its weight."""
        if not self._is_weight(key):
            return self.stored.nbytes(key)
        return sum(self.stored.nbytes(f"{self._layer(key)}.{leaf}") for leaf in self._leaves(key))

    def tensor(self, key: str) -> torch.Tensor:
        if self._is_weight(key):
            name = self._layer(key)
            leaves = {leaf: self.stored.tensor(f"{name}.{leaf}") for leaf in self._leaves(key)}
            try:
                tensor = decode_layer(leaves).T
            except UserError as error:
                raise UserError(f"{self.file(key)}: {name}: {error}") from None
        else:
            tensor = self.stored.tensor(key)
        return tensor[tuple(slice(n) for n in self.shape(key))]

    def matrix(self, key: str, index: int) -> torch.Tensor:
        """`tensor(key)[index]`."""
        return self.tensor(key)[index]

    def file(self, key: str) -> str:
        return self.stored.file(f"{self._layer(key)}.trellis" if self._is_weight(key) else key)

    def fingerprint(self) -> str:
        return self.stored.fingerprint()

    def _layer(self, key: str) -> str | None:
        """The quantized layer that a weight or bias belongs to."""
        name = key.rpartition(".")[0]
        return name if name in self.layers else None

    def _is_weight(self, key: str) -> bool:
        return self._layer(key) is not None and key.endswith(".weight")

    def _leaves(self, key: str) -> list[str]:
        """Leaf names of what a layer's weight is stored as."""
        layer = self._layer(key)
        return [a for a in LAYER_TENSORS if a != "bias" and f"{layer}.{a}" in self._names]

    def _stored_shape(self, key: str) -> tuple[int, ...]:
        if not self._is_weight(key):
            return self.stored.shape(key)
        rows, columns, *_ = self.stored.shape(f"{self._layer(key)}.trellis")
        return (columns * TILE, rows * TILE)


def open_model(
    folder: str | Path, trust_remote_code: bool = False, rope: Rope | None = None
) -> StreamedModel:
    """An original or an EXL3 model as a stream of blocks in float32.

    rope: changes to an original's rotary embeddings; a quant's config says them itself.
    """
    quantization = read_json(Path(folder) / "config.json").get("quantization_config")
    exl3 = isinstance(quantization, dict) and quantization.get("quant_method") == "exl3"
    return StreamedModel(
        folder,
        checkpoint=QuantizedCheckpoint(folder) if exl3 else None,
        dtype=torch.float32,
        trust_remote_code=trust_remote_code,
        rope=None if exl3 else rope,
    )
