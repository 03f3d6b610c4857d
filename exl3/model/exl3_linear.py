"""A linear layer as EXL3 stores it, which runs without ever being decoded as a whole."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from exl3 import ops
from exl3.format.codebook import CODEBOOKS
from exl3.format.layer import layer_codebook, layer_parts

ARITHMETIC = (torch.float32, torch.float16)  # of inputs; others are computed in float32


class Exl3Linear(nn.Module):
    """y = x W + b with W packed, 1 to 8 bits a weight.

    tensors: a layer's by their names without the key prefix (trellis,
    suh, svh, the codebook's marker, bias), kept as buffers of these names. in_features,
    out_features: the model's, without padding. UserError if the tensors contradict each other.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.codebook = layer_codebook(dict(tensors))
        parts = layer_parts(dict(tensors))
        for name, tensor in zip(("trellis", "suh", "svh"), parts, strict=True):
            self.register_buffer(name, tensor)
        self.register_buffer("bias", tensors["bias"].half() if "bias" in tensors else None)
        for name in CODEBOOKS.keys() & tensors.keys():
            self.register_buffer(name, tensors[name])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features), in x's dtype."""
        rows = x.reshape(-1, self.in_features)
        if rows.dtype not in ARITHMETIC:
            rows = rows.float()
        rows = functional.pad(rows, (0, len(self.suh) - self.in_features))
        y = ops.linear(rows, self.trellis, self.suh, self.svh, self.codebook, self.bias)
        return y[:, : self.out_features].to(x.dtype).unflatten(0, x.shape[:-1])


class LayerSource(Protocol):
    """Quantized layers by the keys of their weights."""

    def is_layer(self, key: str) -> bool:
        """Whether a key is the weight of a quantized layer."""

    def layer(self, key: str) -> dict[str, torch.Tensor]:
        """All that the layer is stored as, by leaf names."""


def pack_linear(
    linear: nn.Linear, tensors: Mapping[str, torch.Tensor], device: torch.device
) -> None:
    """Makes a linear run as the layer of these tensors, on the device; hooks stay as they are.

    Its weight is neither read nor needed from then on.
    """
    packed = Exl3Linear(tensors, linear.in_features, linear.out_features).to(device)
    linear.forward = packed.forward


def unpack_linear(linear: nn.Linear) -> None:
    """Undoes `pack_linear`, if it was done."""
    linear.__dict__.pop("forward", None)
