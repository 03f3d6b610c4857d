"""Checkpoints that are published quantized, seen as ordinary ones: tensors are decoded when read.

FP8 (DeepSeek, MiniMax): `KEY` in float8 with `KEY_scale_inv`, a factor for every block of it.
MXFP4 (gpt-oss): `KEY_blocks`, two 4-bit floats (E2M1) a byte, with `KEY_scales`, an exponent for
every 32 of them.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from exl3.errors import UserError
from exl3.model.checkpoint import TensorSource, View

SCALE = "_scale_inv"
ACTIVATIONS = (".activation_scale", ".input_scale")  # for the activations of a reader in FP8
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
EXPONENT_BIAS = 127


def dequantized(source: TensorSource, quantization: dict[str, Any], path: Path) -> TensorSource:
    """The source with its tensors decoded, by the quantization_config of its config.json.

    UserError for a method that is not known, and for tensors that contradict the config.
    """
    method = quantization.get("quant_method")
    if method == "fp8":
        return Fp8Checkpoint(source, _block_size(quantization, path))
    if method == "mxfp4":
        return Mxfp4Checkpoint(source)
    raise UserError(
        f"{path} is already quantized ({method}); give the folder of the original model."
    )


def _block_size(quantization: dict[str, Any], path: Path) -> tuple[int, int] | None:
    """Rows and columns that share a factor, None if the whole tensor has one."""
    size = quantization.get("weight_block_size")
    if size is None:
        return None
    if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
        return size[0], size[1]
    raise UserError(
        f"{path}/config.json: weight_block_size of quantization_config is {size!r:.60}, not two "
        "sizes; download it again."
    )


class Fp8Checkpoint(View):
    """A source of tensors with float8 weights in float32, times their factors, which are hidden.

    block: rows and columns that share a factor (those at the ends may have fewer), None if a
    tensor has one. Tensors that are not float8 are shown as they are.
    """

    def __init__(self, source: TensorSource, block: tuple[int, int] | None):
        super().__init__(source)
        self._block = block
        names = set(source.keys())
        # Scales are told by the weights, for a plain tensor may have a name like theirs.
        self._scaled = {key for key in names if source.dtype(key) in FLOAT8}
        hidden = {key + SCALE for key in self._scaled}
        hidden |= {key.rpartition(".")[0] + leaf for key in self._scaled for leaf in ACTIVATIONS}
        self._shown = [key for key in source.keys() if key not in hidden]  # noqa: SIM118
        for key in sorted(self._scaled):
            self._check(key, names)

    def _check(self, key: str, names: set[str]) -> None:
        """UserError unless there is a factor for every block of a float8 weight."""
        scale, shape = key + SCALE, self.shape(key)
        if scale not in names:
            raise UserError(
                f"{self.file(key)}: {key} is float8, but {scale} is in no file; download the model "
                "again."
            )
        found = self.source.shape(scale)
        if self._block is None:
            wanted, fits = "one number", found in ((), (1,))
        else:
            grid = tuple(-(-n // b) for n, b in zip(shape[-2:], self._block, strict=True))
            wanted = (*shape[:-2], *grid)
            fits = len(shape) >= 2 and found == wanted
        if not fits:
            raise UserError(
                f"{self.source.file(scale)}: {scale} is {found}, but by weight_block_size of "
                f"config.json and its weight it is {wanted}; check that the files belong together."
            )

    def keys(self) -> Iterable[str]:
        return self._shown

    def dtype(self, key: str) -> torch.dtype:
        return torch.float32 if key in self._scaled else self.source.dtype(key)

    def nbytes(self, key: str) -> int:
        """Bytes in the file, with those of the factors."""
        scale = self.source.nbytes(key + SCALE) if key in self._scaled else 0
        return self.source.nbytes(key) + scale

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor, the caller's own to write into."""
        tensor = self.source.tensor(key)
        if key in self._scaled:
            return self._times(tensor, self.source.tensor(key + SCALE))
        return tensor

    def matrix(self, key: str, index: int) -> torch.Tensor:
        """`tensor(key)[index]`, of which alone the bytes are read."""
        matrix = self.source.matrix(key, index)
        if key not in self._scaled:
            return matrix
        if self._block is None:
            return self._times(matrix, self.source.tensor(key + SCALE))
        return self._times(matrix, self.source.matrix(key + SCALE, index))

    def _times(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """(..., rows, columns) times its factors, (..., blocks down, blocks across) or one."""
        weight, scale = weight.float(), scale.float()
        if self._block is None:
            return weight.mul_(scale)
        rows, columns = self._block
        scale = scale.repeat_interleave(rows, dim=-2)[..., : weight.shape[-2], :]
        return weight.mul_(scale.repeat_interleave(columns, dim=-1)[..., : weight.shape[-1]])


class Mxfp4Checkpoint(View):
    """A source of tensors with the stacked experts of gpt-oss, (experts, in, out), in bfloat16.

    A value is one of 16 (E2M1) times a power of two, so bfloat16 holds it exactly.
    """

    def __init__(self, source: TensorSource):
        super().__init__(source)
        names = set(source.keys())
        self._packed = {
            key.removesuffix("_blocks")
            for key in names
            if key.endswith("_blocks") and key.removesuffix("_blocks") + "_scales" in names
        }
        hidden = {key + leaf for key in self._packed for leaf in ("_blocks", "_scales")}
        self._shown = [key for key in source.keys() if key not in hidden] + sorted(self._packed)  # noqa: SIM118
        for key in sorted(self._packed):
            self._check(key)

    def _check(self, key: str) -> None:
        """UserError unless blocks are bytes (experts, out, n, 16) and scales (experts, out, n)."""
        blocks, scales = (self.source.shape(key + leaf) for leaf in ("_blocks", "_scales"))
        bytes_only = all(
            self.source.dtype(key + leaf) == torch.uint8 for leaf in ("_blocks", "_scales")
        )
        if len(blocks) != 4 or blocks[:-1] != scales or not bytes_only:
            raise UserError(
                f"{self.file(key)}: {key}_blocks {blocks} and {key}_scales {scales} are not a "
                "weight in MXFP4; download the model again, or give one in bfloat16."
            )

    def keys(self) -> Iterable[str]:
        return self._shown

    def shape(self, key: str) -> tuple[int, ...]:
        if key not in self._packed:
            return self.source.shape(key)
        experts, out, blocks, size = self.source.shape(f"{key}_blocks")
        return (experts, blocks * size * 2, out)

    def dtype(self, key: str) -> torch.dtype:
        return torch.bfloat16 if key in self._packed else self.source.dtype(key)

    def nbytes(self, key: str) -> int:
        """Bytes in the file, with those of the scales."""
        if key not in self._packed:
            return self.source.nbytes(key)
        return self.source.nbytes(f"{key}_blocks") + self.source.nbytes(f"{key}_scales")

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor, the caller's own to write into."""
        if key not in self._packed:
            return self.source.tensor(key)
        return torch.stack([self.matrix(key, e) for e in range(self.shape(key)[0])])

    def matrix(self, key: str, index: int) -> torch.Tensor:
        """`tensor(key)[index]`, of which alone the bytes are read."""
        if key not in self._packed:
            return self.source.matrix(key, index)
        blocks, scales = (self.source.matrix(key + leaf, index) for leaf in ("_blocks", "_scales"))
        return _decode_mxfp4(blocks, scales).to(torch.bfloat16)

    def file(self, key: str) -> str:
        return self.source.file(f"{key}_blocks" if key in self._packed else key)

    def expect(self, key: str, shape: tuple[int, ...]) -> None:
        """UserError unless the tensor has the shape that the model wants."""
        if key not in self._packed:
            self.source.expect(key, shape)
        elif self.shape(key) != shape:
            raise UserError(
                f"{self.file(key)}: {key} is {self.shape(key)} once it is decoded, but by "
                f"config.json it is {shape}; check that the files belong together."
            )


def _decode_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """blocks (out, n, 16), scales (out, n), bytes → (in, out), float32. Low halves come first."""
    values = torch.tensor([*E2M1, *(-v for v in E2M1)])
    both = torch.stack([blocks & 0xF, blocks >> 4], dim=-1).flatten(-2)
    exponents = scales.int() - EXPONENT_BIAS
    weights = torch.ldexp(values[both.int()], exponents[..., None])
    return weights.flatten(1).T.contiguous()
