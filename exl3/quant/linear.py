"""One linear layer, from its weights and the Hessian of its inputs to the tensors of the format."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from exl3 import parallel
from exl3.errors import UserError
from exl3.format.codebook import CODEBOOKS
from exl3.format.layer import decode_layer, padded
from exl3.format.trellis import pack
from exl3.quant import hessian as hessians
from exl3.quant.incoherence import Regularized, regularize, transform_hessian
from exl3.quant.ldlq import ldlq, round_plain
from exl3.quant.scale import search_scale


@dataclass
class QuantizedLinear:
    """A quantized layer and what is known of its quality."""

    tensors: dict[str, torch.Tensor]  # as stored: trellis, suh, svh, the codebook's marker
    weight: torch.Tensor  # what they decode to, float32 (in, out), without padding
    bits: int
    codebook: str
    weight_error: float  # squared Frobenius norms: |W - W_q|^2 / |W|^2
    proxy_error: float | None = None  # tr(E^T H E) / tr(W^T H W), None without a Hessian
    notes: list[str] = field(default_factory=list)  # what the user should know


def quantize_linear(
    weight: torch.Tensor,
    hessian: torch.Tensor | None,
    bits: int,
    codebook: str = "mul1",
    seed: int = 0,
    *,
    out_scales: bool = True,
    name: str = "the weight",
) -> QuantizedLinear:
    """Quantizes a linear layer y = x W.

    weight: W (in, out), any float dtype; dimensions that are no multiples of 128 are padded with
    zeros. hessian: mean of x^T x over calibration tokens (in, in), or None for rounding without
    feedback. bits: K, 1 to 8. seed: of the random signs. out_scales: one scale for every output
    channel rather than for all. name: of the tensor, for messages.
    UserError for non-finite weights; ValueError for arguments that do not fit together.
    """
    _check(weight, hessian, bits, codebook, name)
    with parallel.one_thread_per_op():
        weight = weight.detach().float().cpu()
        rows, columns = weight.shape
        full = F.pad(weight, (0, padded(columns) - columns, 0, padded(rows) - rows))
        generator = torch.Generator().manual_seed(seed)
        regular = regularize(full, generator, out_scales)
        suh = _input_scales(regular, bits, codebook)
        inner = regular.inner(suh)
        factor, notes = _feedback(hessian, suh)
        if factor is None:
            _, states = round_plain(inner, bits, codebook)
        else:
            _, states = ldlq(inner, factor, bits, codebook)
        tensors = {"trellis": pack(states, bits), "suh": suh, "svh": regular.svh}
        if (marker := CODEBOOKS[codebook].marker) is not None:
            tensors[codebook] = marker
        decoded = decode_layer(tensors)[:rows, :columns].contiguous()
        return QuantizedLinear(
            tensors,
            decoded,
            bits,
            codebook,
            weight_error=_ratio((weight - decoded).square().sum(), weight.square().sum()),
            proxy_error=None if factor is None else proxy_error(weight, decoded, hessian),
            notes=notes,
        )


def proxy_error(weight: torch.Tensor, decoded: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(E^T H E) / tr(W^T H W) with E = W - decoded, both (in, out); H (in, in)."""
    hessian = hessian.float()

    def energy(x: torch.Tensor) -> torch.Tensor:
        return (x * parallel.matmul(hessian, x)).double().sum()

    return _ratio(energy(weight - decoded), energy(weight))


def _check(
    weight: torch.Tensor, hessian: torch.Tensor | None, bits: int, codebook: str, name: str
) -> None:
    if weight.dim() != 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise ValueError(f"{name} must be a float matrix, not {weight.dtype} {weight.shape}")
    if hessian is not None and hessian.shape != (weight.shape[0],) * 2:
        raise ValueError(f"{name} has {weight.shape[0]} inputs, its Hessian is {hessian.shape}")
    if bits not in range(1, 9):
        raise ValueError(f"bits must be 1 to 8, not {bits}")
    if codebook not in CODEBOOKS:
        raise ValueError(f"unknown codebook {codebook!r}; there are {', '.join(CODEBOOKS)}")
    bad = weight.numel() - int(torch.isfinite(weight).sum())
    if bad:
        raise UserError(
            f"{name} holds {bad:,} non-finite values of {weight.numel():,}: "
            f"the source model is damaged; download it again"
        )


def _input_scales(regular: Regularized, bits: int, codebook: str) -> torch.Tensor:
    """suh, float16 (in,): the scales of the input channels over the scale of the whole layer."""
    scales = regular.input_scales
    if not scales.any():
        return scales.half()
    return (scales / search_scale(regular.inner(scales), bits, codebook)).half()


def _feedback(
    hessian: torch.Tensor | None, suh: torch.Tensor
) -> tuple[torch.Tensor | None, list[str]]:
    """L of the transformed Hessian, float32 (in, in), or None for plain rounding; and notes."""
    if reason := hessians.useless(hessian):
        return None, [f"{reason}: rounded without error feedback"]
    size = suh.shape[0]
    hessian = hessian.double().cpu()
    for damping, h in hessians.damped(hessian):
        h = F.pad(h, (0, size - h.shape[0], 0, size - h.shape[0]))
        pad = torch.arange(hessian.shape[0], size)
        h[pad, pad] = h.diagonal()[: hessian.shape[0]].mean()
        factor = hessians.block_ldl(transform_hessian(h, suh))
        if factor is not None:
            extra = damping > hessians.DAMPING
            notes = [f"the Hessian needed a damping of {damping:g}"] if extra else []
            return factor.float(), notes
    return None, ["the Hessian is not positive definite: rounded without error feedback"]


def _ratio(error: torch.Tensor, total: torch.Tensor) -> float:
    return float(error / total) if total > 0 else 0.0
