"""One linear layer, from its weights and the Hessian of its inputs to the tensors of the format."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from exl3 import parallel
from exl3.errors import UserError
from exl3.format.codebook import CODEBOOKS
from exl3.format.layer import decode_layer, padded
from exl3.format.trellis import TILE, pack
from exl3.quant.hessian import DAMPING, block_ldl, damped, useless
from exl3.quant.incoherence import PANEL, Regularized, regularize, transform_hessian
from exl3.quant.ldlq import ldlq, round_plain
from exl3.quant.scale import refine_scale, sample_columns, search_scale

# Which ways of scaling the outputs are tried.
OUT_SCALES = {"always": (True,), "never": (False,), "auto": (True, False)}

# Feedback widens targets so much at these bits that another scale is better for them; at more bits
# the scale without feedback is within 1% of the best (bench/ldlq_scale.py).
WIDENED = (1, 2)

USELESS = 0.9  # weight error that no layer should have; one bit gives about 0.3

# Columns of the samples that scales are searched on, without and with feedback.
MOST_COLUMNS = MOST_LDLQ_COLUMNS = 128


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
    out_scales: str = "always",
    name: str = "the weight",
) -> QuantizedLinear:
    """Quantizes a linear layer y = x W.

    weight: W (in, out), any float dtype; dimensions that are no multiples of 128 are padded with
    zeros. hessian: mean of x^T x over calibration tokens (in, in), or None for rounding without
    feedback. bits: K, 1 to 8. seed: of the random signs. out_scales: "always" one scale for every
    output channel, "never" (one for all), or "auto", what promises less error. name: of the
    tensor, for messages.
    UserError for non-finite weights; ValueError for arguments that do not fit together.
    """
    _check(weight, hessian, bits, codebook, out_scales, name)
    with parallel.one_thread_per_op():
        weight = weight.detach().float().cpu()
        regular, scale = _scaled(_padded(weight), bits, codebook, seed, out_scales)
        feedback, notes = _feedback(hessian, regular.input_scales)
        if feedback is not None and bits in WIDENED:
            width = min(max(regular.svh.shape[0] // 32, TILE), MOST_LDLQ_COLUMNS)
            sample = regular.sample(sample_columns(regular.svh.shape[0], width))
            scale = refine_scale(sample, scale, *feedback, bits, codebook)
        suh = (regular.input_scales / scale).half()
        if not (torch.isfinite(suh).all() and torch.isfinite(regular.svh).all()):
            raise UserError(
                f"{name} has weights up to {float(weight.abs().max()):.3g}, beyond what scales in "
                "float16 can hold: the source model is damaged; download it again"
            )
        inner = regular.inner(suh)
        if feedback is None:
            states = round_plain(inner, bits, codebook)
        else:
            states = ldlq(inner, feedback[0], bits, codebook)
        tensors = {"trellis": pack(states, bits), "suh": suh, "svh": regular.svh}
        fed_back = feedback is not None
        del regular, inner, feedback, states  # a head's take gigabytes
        if (marker := CODEBOOKS[codebook].marker) is not None:
            tensors[codebook] = marker
        decoded = decode_layer(tensors)[: weight.shape[0], : weight.shape[1]].contiguous()
        error = weight_error(weight, decoded)
        if error > USELESS:
            notes.append(f"{error:.0%} of the weights' energy is lost: they span too wide a range")
        return QuantizedLinear(
            tensors,
            decoded,
            bits,
            codebook,
            weight_error=error,
            proxy_error=proxy_error(weight, decoded, hessian) if fed_back else None,
            notes=notes,
        )


def weight_error(weight: torch.Tensor, decoded: torch.Tensor) -> float:
    """|W - decoded|^2 / |W|^2, squared Frobenius norms."""
    return _ratio(weight, decoded, lambda x: (x * x).double().sum())


def proxy_error(weight: torch.Tensor, decoded: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(E^T H E) / tr(W^T H W) with E = W - decoded, both (in, out); H (in, in)."""
    hessian = hessian.float()
    return _ratio(weight, decoded, lambda x: (x * parallel.matmul(hessian, x)).double().sum())


def _ratio(
    weight: torch.Tensor, decoded: torch.Tensor, energy: Callable[[torch.Tensor], torch.Tensor]
) -> float:
    """energy(W - decoded) / energy(W), summed over panels of columns; 0 for a layer of zeros."""
    error, total = 0.0, 0.0
    for w, d in zip(weight.split(PANEL, 1), decoded.split(PANEL, 1), strict=True):
        error += float(energy(w - d))
        total += float(energy(w))
    return error / total if total > 0 else 0.0


def _check(
    weight: torch.Tensor,
    hessian: torch.Tensor | None,
    bits: int,
    codebook: str,
    out_scales: str,
    name: str,
) -> None:
    if weight.dim() != 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise ValueError(f"{name} must be a float matrix, not {weight.dtype} {weight.shape}")
    if hessian is not None and hessian.shape != (weight.shape[0],) * 2:
        raise ValueError(f"{name} has {weight.shape[0]} inputs, its Hessian is {hessian.shape}")
    if bits not in range(1, 9):
        raise ValueError(f"bits must be 1 to 8, not {bits}")
    if out_scales not in OUT_SCALES:
        raise ValueError(f"out_scales must be one of {', '.join(OUT_SCALES)}, not {out_scales!r}")
    if codebook not in CODEBOOKS:
        raise ValueError(f"unknown codebook {codebook!r}; there are {', '.join(CODEBOOKS)}")
    bad = weight.numel() - int(torch.isfinite(weight).sum())
    if bad:
        raise UserError(
            f"{name} holds {bad:,} non-finite values of {weight.numel():,}: "
            f"the source model is damaged; download it again"
        )


def _padded(weight: torch.Tensor) -> torch.Tensor:
    """The weight itself where its dimensions are multiples of 128, else with zeros around."""
    rows, columns = weight.shape
    size = (padded(rows), padded(columns))
    return (
        weight if size == weight.shape else F.pad(weight, (0, size[1] - columns, 0, size[0] - rows))
    )


def _scaled(
    weight: torch.Tensor, bits: int, codebook: str, seed: int, out_scales: str
) -> tuple[Regularized, float]:
    """Regularized weights, and the scale at which they are encoded best without feedback."""
    best: tuple[float, Regularized, float] | None = None
    for with_outputs in OUT_SCALES[out_scales]:
        generator = torch.Generator().manual_seed(seed)
        regular = regularize(weight, generator, with_outputs)
        scale, error = 1.0, 0.0
        if regular.input_scales.any():
            sample = regular.sample(sample_columns(weight.shape[1], MOST_COLUMNS))
            scale, error = search_scale(sample, bits, codebook)
        # An error of the inner matrix reaches the output through both scales.
        error *= float(regular.input_scales.square().mean() * regular.svh.float().square().mean())
        if best is None or error < best[0]:
            best = (error, regular, scale)
    return best[1:]


def _feedback(
    hessian: torch.Tensor | None, input_scales: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor] | None, list[str]]:
    """L and the Hessian it comes from, float32 (in, in), as errors of W_inner feel it; and notes.

    None for plain rounding.
    """
    if reason := useless(hessian):
        return None, [f"{reason}: rounded without error feedback"]
    if not input_scales.any():
        return None, []  # nothing but zeros
    rows, size = hessian.shape[0], input_scales.shape[0]
    for damping, h in damped(hessian.double().cpu()):
        h = F.pad(h, (0, size - rows, 0, size - rows))
        h.diagonal()[rows:] = h.diagonal()[:rows].mean()
        h = transform_hessian(h, input_scales)
        factor = block_ldl(h)
        if factor is not None:
            extra = damping > DAMPING
            notes = [f"the Hessian needed a damping of {damping:g}"] if extra else []
            return (factor.float(), h.float()), notes
    return None, ["the Hessian is not positive definite: rounded without error feedback"]
