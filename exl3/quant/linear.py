"""One linear layer, from its weights and the Hessian of its inputs to the tensors of the format."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from exl3 import parallel
from exl3.devices import SHORT, where_it_fits
from exl3.errors import JobError, UserError
from exl3.format.codebook import CODEBOOKS
from exl3.format.hadamard import HADAMARD
from exl3.format.layer import decode_layer, padded
from exl3.format.trellis import TILE, pack
from exl3.quant.hessian import DAMPING, block_ldl, damped, useless
from exl3.quant.incoherence import PANEL, Regularized, regularize, transform_hessian
from exl3.quant.ldlq import ldlq, round_plain
from exl3.quant.refit import refit_output_scales, refit_scales
from exl3.quant.scale import (
    refine_scale,
    sample_columns,
    sample_tiles,
    search_scale,
    widened_scale,
)
from exl3.quant.two_sided import two_sided_ldlq

# Which ways of scaling the outputs are tried.
OUT_SCALES = {"always": (True,), "never": (False,), "auto": (True, False)}

# Feedback widens targets so much at these bits that another scale is better for them; at more bits
# the scale without feedback is within 1% of the best (bench/ldlq_scale.py).
WIDENED = (1, 2)

USELESS = 0.9  # error that no layer should have; one bit gives about 0.3

MOST_COLUMNS = 128  # of the sample that scales are searched on with feedback


@dataclass
class QuantizedLinear:
    """A quantized layer and what is known of its quality."""

    tensors: dict[str, torch.Tensor]  # as stored: trellis, suh, svh, the codebook's marker
    weight: torch.Tensor  # what they decode to, float32 (in, out), without padding
    bits: int
    codebook: str
    # Both relative to what the layer was asked to be: to the target, where there is one.
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
    target: torch.Tensor | None = None,
    output_hessian: torch.Tensor | None = None,
    output_damping: float = DAMPING,
    out_scales: str = "always",
    name: str = "the weight",
) -> QuantizedLinear:
    """Quantizes a linear layer y = x W.

    weight: W (in, out), any float dtype; dimensions that are no multiples of 128 are padded with
    zeros. hessian: mean of x^T x over calibration tokens (in, in), or None for rounding without
    feedback. bits: K, 1 to 8. seed: of the random signs. out_scales: "always" one scale for every
    output channel, "never" (one for all), or "auto", what promises less error. name: of the
    tensor, for messages.

    target: W' (in, out), what the layer is to be instead of W (`exl3.quant.correction`); it is what
    is encoded, and all errors are relative to it. output_hessian: mean of d^T d (out, out), d the
    loss's gradient by the outputs, or where that is block diagonal its blocks of 128 outputs (of as
    many as there are padded), (blocks, 128, 128); with it errors are fed back across columns too
    (`two_sided_ldlq`), and the sum of squares that becomes small is no longer the proxy error,
    which may grow: compare outputs. It is of no use without `hessian`. output_damping: what is
    added to its diagonal, of the mean, once it is transformed. Memory for it: two and a half copies
    of (out, out) in float64 (4.1 GB for 14336 outputs), and one more copy of the weight.

    UserError for non-finite weights, JobError for a non-finite target; ValueError for arguments
    that do not fit together.
    """
    _check(weight, hessian, bits, codebook, out_scales, name)
    _check_extras(weight, target, output_hessian, name)
    device = weight.device
    with parallel.one_thread_per_op(), parallel.work_on(device):
        wanted = (weight if target is None else target).detach().float()
        hessian = None if hessian is None else hessian.to(device)
        regular, scale, error = _scaled(_padded(wanted), bits, codebook, seed, out_scales)
        feedback, notes = _feedback(hessian, regular.input_scales)
        if feedback is not None:
            if output_hessian is not None:
                notes += _add_outputs(feedback, output_hessian, regular.svh, output_damping)
            scale = _refined(regular, scale, error, feedback, bits, codebook)
        suh = _stored_input_scales(regular, scale, wanted, name)
        states = _encode(regular.inner(suh), feedback, bits, codebook)
        tensors = {"trellis": pack(states, bits), "suh": suh, "svh": regular.svh}
        sides = 0 if feedback is None else 1 if feedback.factor_out is None else 2
        del regular, feedback, states  # a head's take gigabytes
        if (marker := CODEBOOKS[codebook].marker) is not None:
            tensors[codebook] = marker
        decoded = _decoded(tensors, weight.shape)
        if sides and not _uniform(tensors["svh"]):
            if sides == 2:
                into, out = refit_scales(wanted, decoded, hessian, output_hessian.to(device))
                _multiply(tensors["suh"], into)
            else:
                out = refit_output_scales(wanted, decoded, hessian)
            _multiply(tensors["svh"], out)
            decoded = _decoded(tensors, weight.shape)
        lost = weight_error(wanted, decoded)
        proxy = proxy_error(wanted, decoded, hessian) if sides else None
        notes += _lost(lost, proxy, sides)
        return QuantizedLinear(tensors, decoded, bits, codebook, lost, proxy, notes)


def _multiply(scales: torch.Tensor, factors: torch.Tensor) -> None:
    """Takes factors into scales (float16); those of padding stay as they are, and those that would
    be beyond float16."""
    used = scales[: len(factors)]
    found = (used.float() * factors).half()
    used.copy_(torch.where(torch.isfinite(found), found, used))


def _uniform(svh: torch.Tensor) -> bool:
    """Whether there is one scale for all outputs, which must stay one."""
    used = svh[svh != 0].abs()
    return bool((used == used[:1]).all())


def _decoded(tensors: dict[str, torch.Tensor], shape: torch.Size) -> torch.Tensor:
    """What a layer's tensors stand for, without padding."""
    return decode_layer(tensors)[: shape[0], : shape[1]].contiguous()


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
    refuse_non_finite(weight, name)


def refuse_non_finite(weight: torch.Tensor, name: str) -> None:
    """UserError unless all values of an original tensor are finite."""
    bad = weight.numel() - int(torch.isfinite(weight).sum())
    if bad:
        raise UserError(
            f"{name} holds {bad:,} non-finite values of {weight.numel():,}: "
            f"the source model is damaged; download it again"
        )


def _check_extras(
    weight: torch.Tensor,
    target: torch.Tensor | None,
    output_hessian: torch.Tensor | None,
    name: str,
) -> None:
    if target is not None and target.shape != weight.shape:
        raise ValueError(f"{name} is {weight.shape}, its target {target.shape}")
    outputs = weight.shape[1]
    shapes = ((outputs,) * 2, (padded(outputs) // HADAMARD, HADAMARD, HADAMARD))
    if output_hessian is not None and output_hessian.shape not in shapes:
        raise ValueError(
            f"{name} has {weight.shape[1]} outputs, their Hessian is {output_hessian.shape}"
        )
    if target is not None and not torch.isfinite(target).all():
        bad = target.numel() - int(torch.isfinite(target).sum())
        raise JobError(
            f"{name}: its correction for earlier errors holds {bad:,} non-finite values of "
            f"{target.numel():,}: convert with other calibration rows, or without the correction"
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
) -> tuple[Regularized, float, float]:
    """Regularized weights, the scale at which they are encoded best without feedback, its error."""
    best: tuple[float, Regularized, float, float] | None = None
    for with_outputs in OUT_SCALES[out_scales]:
        generator = torch.Generator().manual_seed(seed)
        regular = regularize(weight, generator, with_outputs)
        scale, error = 1.0, 0.0
        if regular.input_scales.any():
            numbers, counts = sample_tiles(regular.tails().flatten())
            scale, error = search_scale(regular.tiles(numbers), counts, bits, codebook)
        # An error of the inner matrix reaches the output through both scales.
        through = float(regular.input_scales.square().mean() * regular.svh.float().square().mean())
        if best is None or error * through < best[0]:
            best = (error * through, regular, scale, error)
    return best[1:]


@dataclass
class _Feedback:
    """What errors of W_inner are fed back with: float32."""

    factor: torch.Tensor  # L (in, in)
    hessian: torch.Tensor | None  # that L comes from; None once the scale is found
    factor_out: torch.Tensor | None = None  # L of the outputs (out, out)


def _feedback(
    hessian: torch.Tensor | None, input_scales: torch.Tensor
) -> tuple[_Feedback | None, list[str]]:
    """None for plain rounding; and notes."""
    if reason := useless(hessian):
        return None, [f"{reason}: rounded without error feedback"]
    if not input_scales.any():
        return None, []  # nothing but zeros
    found, notes = _factored("the Hessian", hessian, input_scales, DAMPING)
    if found is None:
        notes.append("the Hessian is not positive definite: rounded without error feedback")
        return None, notes
    return _Feedback(found.factor, found.hessian), notes


def _add_outputs(
    feedback: _Feedback, hessian: torch.Tensor, svh: torch.Tensor, damping: float
) -> list[str]:
    """Adds the factor of the outputs' Hessian, if it can serve; and notes."""
    if hessian.dim() == 3:
        feedback.factor_out = _factors_of_blocks(hessian, svh, damping)
        return []
    if reason := useless(hessian):
        return [f"outputs with {reason}: errors fed back by inputs only"]
    found, notes = _factored("the outputs' Hessian", hessian, svh, damping, keep=False)
    if found is None:
        notes.append(
            "the outputs' Hessian is not positive definite: errors fed back by inputs only"
        )
    else:
        feedback.factor_out = found.factor
    return notes


@dataclass
class _Factored:
    """L of a transformed Hessian, float32, and that Hessian."""

    factor: torch.Tensor
    hessian: torch.Tensor | None  # float32; None where it is not kept
    damping: float  # that it took


def _factored(
    name: str, hessian: torch.Tensor, scales: torch.Tensor, damping: float, keep: bool = True
) -> tuple[_Factored | None, list[str]]:
    """A Hessian as W_inner under these scales feels it, and its L, on the scales' device; None if
    it is not positive definite. And notes. Where a GPU has no room, the CPU works.

    keep: the transformed Hessian is wanted too.
    """

    def on(device: torch.device) -> _Factored | None:
        for used, h in damped(hessian.to(device), damping):
            h = transform_hessian(_padded_hessian(h, scales.shape[0]), scales.to(device))
            factor = block_ldl(h)
            kept = h.float() if keep and factor is not None else None
            del h  # 1.6 GB for 14336 channels
            if factor is not None:
                return _Factored(factor.float(), kept, used)
        return None

    found, where = where_it_fits(scales.device, on)
    notes = [] if where == scales.device else [f"{name} is factored on the CPU: {SHORT}"]
    if found is not None:
        found.factor = found.factor.to(scales.device)
        found.hessian = found.hessian.to(scales.device) if keep else None
        if found.damping > damping:
            notes.append(f"{name} needed a damping of {found.damping:g}")
    return found, notes


def _factors_of_blocks(hessian: torch.Tensor, svh: torch.Tensor, damping: float) -> torch.Tensor:
    """L of every block of a block diagonal H_out, (blocks, 128, 128) both; the identity for blocks
    that tell nothing."""
    factors = torch.eye(HADAMARD, device=svh.device).repeat(len(hessian), 1, 1)
    hessian = hessian.to(svh.device)
    for factor, h, scales in zip(factors, hessian, svh.split(HADAMARD), strict=True):
        if useless(h):
            continue
        for _, raised in damped(h, damping):
            found = block_ldl(transform_hessian(raised, scales))
            if found is not None:
                factor.copy_(found)
                break
    return factors


def _padded_hessian(hessian: torch.Tensor, size: int) -> torch.Tensor:
    """The Hessian itself, or with average, independent channels up to `size`."""
    rows = hessian.shape[0]
    if rows == size:
        return hessian
    h = F.pad(hessian, (0, size - rows, 0, size - rows))
    h.diagonal()[rows:] = hessian.diagonal().mean()
    return h


def _refined(
    regular: Regularized,
    scale: float,
    error: float,
    feedback: _Feedback,
    bits: int,
    codebook: str,
) -> float:
    """The scale under feedback, where that is another; the Hessian is not needed any more.

    scale, error: the best ones without feedback.
    """
    if feedback.factor_out is not None:
        given = feedback.factor, feedback.factor_out, bits in WIDENED
        scale = widened_scale(scale, error, *given)
    elif bits in WIDENED:
        columns = regular.svh.shape[0]
        width = min(max(columns // 32, TILE), MOST_COLUMNS)
        sample = regular.sample(sample_columns(columns, width))
        scale = refine_scale(sample, scale, feedback.factor, feedback.hessian, bits, codebook)
    feedback.hessian = None
    return scale


def _stored_input_scales(
    regular: Regularized, scale: float, weight: torch.Tensor, name: str
) -> torch.Tensor:
    """suh, float16 (in,). UserError where float16 cannot hold the scales."""
    suh = (regular.input_scales / scale).half()
    if not (torch.isfinite(suh).all() and torch.isfinite(regular.svh).all()):
        raise UserError(
            f"{name} has weights up to {float(weight.abs().max()):.3g}, beyond what scales in "
            "float16 can hold: the source model is damaged; download it again"
        )
    return suh


def _encode(
    inner: torch.Tensor, feedback: _Feedback | None, bits: int, codebook: str
) -> torch.Tensor:
    """States of inner, whose place its errors take."""
    if feedback is None:
        return round_plain(inner, bits, codebook)
    if feedback.factor_out is None:
        return ldlq(inner, feedback.factor, bits, codebook)
    return two_sided_ldlq(inner, feedback.factor, feedback.factor_out, bits, codebook)


def _lost(weight_error: float, proxy_error: float | None, sides: int) -> list[str]:
    """A note on a layer that is lost: told by what its rounding was to make small.

    Feedback by inputs trades weight error for proxy error, feedback by outputs trades that for the
    loss: there neither tells, and only outputs can be compared.
    """
    if sides == 0 and weight_error > USELESS:
        return [f"{weight_error:.0%} of the weights' energy is lost: they span too wide a range"]
    if sides == 1 and proxy_error > USELESS:
        return [f"{proxy_error:.0%} of the outputs' energy is lost: weights span too wide a range"]
    return []
