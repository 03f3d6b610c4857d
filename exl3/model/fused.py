"""Fused linears shown as the several linears that an EXL3 folder holds in their place.

Readers of EXL3 want `q_proj`, `k_proj`, `v_proj` for a model's `qkv_proj`, and `gate_proj`,
`up_proj` for its `gate_up_proj`. The split is made in both places at once, so that nobody else
needs to know: in the model, where the parts stand beside the fused linear under their own names,
and in the checkpoint, where its rows are the parts' tensors.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from exl3.model.checkpoint import TensorSource, View

Sizes = dict[str, int]  # part → how many of the fused linear's rows are its own, in their order


def _qkv_sizes(config: PreTrainedConfig) -> Sizes:
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None)
    if kv_heads is None:  # a type that may mix the rows (CodeGen does)
        return {}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv = kv_heads * head_dim
    return {"q_proj": heads * head_dim, "k_proj": kv, "v_proj": kv}


def _gate_up_sizes(config: PreTrainedConfig) -> Sizes:
    return {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}


FUSED = {"qkv_proj": _qkv_sizes, "gate_up_proj": _gate_up_sizes}


class JoinedLinear(nn.Module):
    """Stands where a fused linear stood: its output is that of the parts side by side.

    The parts are children of the module around it and not of this one, so that their names in
    the model are those in the checkpoint.
    """

    def __init__(self, parts: Iterable[nn.Linear]):
        super().__init__()
        self.parts = tuple(parts)  # a tuple, for a list of modules would be children

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) → (..., sum of the parts' out)."""
        return torch.cat([part(x) for part in self.parts], dim=-1)


def split_linears(model: nn.Module, config: PreTrainedConfig) -> dict[str, Sizes]:
    """Replaces the fused linears of a model by their parts, which have no weights yet.

    config: the text config, which tells the parts' sizes; a linear they do not add up to stays.
    Returns what was split: the fused linears' name → their parts.
    """
    fused: dict[str, Sizes] = {}
    for path, linear in list(model.named_modules()):
        before, _, name = path.rpartition(".")
        if name not in FUSED or not isinstance(linear, nn.Linear):
            continue
        sizes = FUSED[name](config)
        if sum(sizes.values()) == linear.out_features:
            around = model.get_submodule(before)
            for part, rows in sizes.items():
                around.add_module(part, _part(linear, rows))
            around.add_module(name, JoinedLinear(around.get_submodule(part) for part in sizes))
            fused[name] = sizes
    return fused


def _part(linear: nn.Linear, rows: int) -> nn.Linear:
    weight = linear.weight
    part = nn.Linear(
        linear.in_features,
        rows,
        bias=linear.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    return part.requires_grad_(weight.requires_grad).train(linear.training)


@dataclass(frozen=True)
class _Rows:
    """The rows of a fused tensor that are a part's own."""

    key: str  # of the fused tensor
    rows: slice

    def of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.rows.stop - self.rows.start, *shape[1:])


class SplitCheckpoint(View):
    """A source of tensors (see `TensorSource`) with the parts in the place of fused tensors.

    Weights and biases are cut. A source that holds the parts already shows them as they are.
    """

    def __init__(self, source: TensorSource, fused: dict[str, Sizes]):
        super().__init__(source)
        self._parts: dict[str, _Rows | None] = {}  # key → its rows, None: stored under this key
        for key in source.keys():  # noqa: SIM118
            self._parts |= self._cut(key, fused)

    def _cut(self, key: str, fused: dict[str, Sizes]) -> dict[str, _Rows | None]:
        """What is shown for a key of the source: the parts of a fused tensor, else itself."""
        name, _, leaf = key.rpartition(".")
        around, dot, linear = name.rpartition(".")
        sizes = fused.get(linear, {})
        shape = self.source.shape(key)
        if leaf not in ("weight", "bias") or shape[:1] != (sum(sizes.values()),):
            return {key: None}
        parts: dict[str, _Rows | None] = {}
        begin = 0
        for part, rows in sizes.items():
            parts[f"{around}{dot}{part}.{leaf}"] = _Rows(key, slice(begin, begin + rows))
            begin += rows
        return parts

    def keys(self) -> Iterable[str]:
        return self._parts.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        part = self._parts[key]
        return part.of(self.source.shape(part.key)) if part else self.source.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self.source.dtype(self._stored(key))

    def nbytes(self, key: str) -> int:
        """Bytes in the file; of a part, of its rows."""
        part = self._parts[key]
        if part is None:
            return self.source.nbytes(key)
        whole = self.source.shape(part.key)[0]
        return self.source.nbytes(part.key) // whole * (part.rows.stop - part.rows.start)

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor, the caller's own to write into."""
        part = self._parts[key]
        if part is None:
            return self.source.tensor(key)
        return self.source.tensor(part.key)[part.rows].clone()  # a view would keep all rows

    def file(self, key: str) -> str:
        return self.source.file(self._stored(key))

    def expect(self, key: str, shape: tuple[int, ...]) -> None:
        """UserError unless the tensor has the shape that the model wants."""
        part = self._parts[key]
        if part is None:
            self.source.expect(key, shape)
        else:
            whole = self.source.shape(part.key)[0]
            self.source.expect(part.key, (whole, *shape[1:]))

    def _stored(self, key: str) -> str:
        part = self._parts[key]
        return part.key if part else key
