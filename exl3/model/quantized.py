"""An EXL3 folder seen as an ordinary checkpoint: layers are decoded when they are read."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from exl3 import ops
from exl3.errors import UserError
from exl3.format.layer import LAYER_TENSORS, decode_layer, padded
from exl3.format.trellis import TILE
from exl3.model.checkpoint import Checkpoint, read_json
from exl3.model.rope import Rope
from exl3.model.streamed import StreamedModel

OTHER_ROPE = (
    "the quants were made with changed rotary embeddings (-ra, -rs); the original is run with them"
)


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

    def is_layer(self, key: str) -> bool:
        """Whether a key is the weight of a quantized layer."""
        return self._is_weight(key)

    def layer(self, key: str) -> dict[str, torch.Tensor]:
        """All that the layer with the weight `key` is stored as, by leaf names."""
        name = self._layer(key)
        leaves = [leaf for leaf in LAYER_TENSORS if f"{name}.{leaf}" in self._names]
        return {leaf: self.stored.tensor(f"{name}.{leaf}") for leaf in leaves}

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
    folder: str | Path,
    trust_remote_code: bool = False,
    rope: Rope | None = None,
    device: torch.device | str = "cpu",
    packed: bool = False,
) -> StreamedModel:
    """An original or an EXL3 model as a stream of blocks in float32.

    rope: changes to an original's rotary embeddings; a quant's config says them itself.
    packed: the model is only run, so a quant's linears may stay packed (see `runs_packed`).
    """
    quantization = read_json(Path(folder) / "config.json").get("quantization_config")
    exl3 = isinstance(quantization, dict) and quantization.get("quant_method") == "exl3"
    quant = QuantizedCheckpoint(folder) if exl3 else None
    return StreamedModel(
        folder,
        checkpoint=quant,
        device=device,
        dtype=torch.float32,
        trust_remote_code=trust_remote_code,
        rope=None if exl3 else rope,
        packed=quant if packed and runs_packed(device) else None,
    )


def runs_packed(device: torch.device | str) -> bool:
    """Whether quants run packed there: where the kernels for it are. The CPU decodes them once for
    all rows, which costs it less."""
    return torch.device(device).type == "cuda" and ops.HAVE_GPU_KERNELS


def like_quant(
    original: StreamedModel, quant: StreamedModel, trust_remote_code: bool = False
) -> StreamedModel:
    """The original, with the rotary embeddings that a quant of it was made with (-ra, -rs)."""
    ours, theirs = (rope_parameters(model) for model in (original, quant))
    if ours == theirs:
        return original
    rope = Rope(like=theirs or {})
    return open_model(original.path, trust_remote_code, rope, original.device)


def rope_parameters(model: StreamedModel) -> Any:
    """What a model's config says about its rotary embeddings, None for one that has none."""
    return getattr(model.config.get_text_config(decoder=True), "rope_parameters", None)
