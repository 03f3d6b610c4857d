"""Signs, channel scales and Hadamard transforms: weights become near-Gaussian with unit variance.

W = diag(suh) B(in) W_inner B(out) diag(svh), as in the format; `regularize` solves it for W_inner.
"""

from dataclasses import dataclass

import torch

from exl3 import parallel
from exl3.format.hadamard import hadamard_columns, hadamard_rows

# Of the mean: channels with a smaller scale count as much as this in the transformed Hessian.
LEAST_SCALE = 0.25

LARGEST_SCALE = 2.0**15  # of an output channel: float16 ends at 65504

PANEL = 2048  # rows or columns that are worked on at a time: a head takes gigabytes


@dataclass
class Regularized:
    """A weight matrix on its way to the trellis."""

    half_way: torch.Tensor  # float32 (in, out): W diag(1/svh) B(out)
    input_scales: torch.Tensor  # float32 (in,): signed; W_inner has unit variance under them
    svh: torch.Tensor  # float16 (out,)

    def sample(self, columns: torch.Tensor) -> torch.Tensor:
        """Columns of W_inner under `input_scales`, float32 (in, len(columns))."""
        return hadamard_columns(self.half_way[:, columns] * _inverse(self.input_scales)[:, None])

    def inner(self, suh: torch.Tensor) -> torch.Tensor:
        """W_inner, float32 (in, out), under the input scales suh (in,); takes half_way's place."""
        inverse = _inverse(suh.float())[:, None]
        for panel in self.half_way.split(PANEL, 1):
            panel.copy_(hadamard_columns(panel * inverse))
        return self.half_way


def regularize(
    weight: torch.Tensor, generator: torch.Generator, out_scales: bool = True
) -> Regularized:
    """Chooses signs and channel scales for weight, float32 (in, out), multiples of 128.

    Channels that are all zero get the scale zero, so that they are decoded to exact zeros.
    """
    rows, columns = weight.shape
    sign_in, sign_out = (_signs(n, generator).to(weight.device) for n in (rows, columns))
    out = _rms(weight, 0)
    if not out_scales:
        out = (out > 0).float() * out.square().mean().sqrt()
    out = out / _mean_of_positive(out)
    share = _share(_rms(weight.flatten(), 0))
    while float(out.max()) * share > LARGEST_SCALE:
        share /= 2
    svh = (sign_out * out * share).half()
    inverse = _inverse(svh.float())[None, :]
    half_way = torch.empty_like(weight)
    for rows_in, rows_out in zip(weight.split(PANEL), half_way.split(PANEL), strict=True):
        rows_out.copy_(hadamard_rows(rows_in * inverse))
    return Regularized(half_way, sign_in * _rms(half_way, 1), svh)


def transform_hessian(hessian: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """H as errors of W_inner feel it: B diag(s) H diag(s) B, in H's dtype and in H's place.

    For H of the inputs (in, in) s is suh, for H of the outputs (out, out) svh.
    Channels of scale zero have no say in the output, but were H nearly singular there, feedback
    would drive their errors beyond the codebook's range: they are taken for average ones.
    """
    scale = scales.to(hessian.dtype)
    mean = _mean_of_positive(scale.abs())
    scale = scale / mean
    small = scale.sign() * scale.abs().clamp(min=LEAST_SCALE)
    scale = torch.where(scale == 0, 1.0, small)

    def rows(panel: slice) -> None:
        hessian[panel] = hadamard_rows(hessian[panel] * scale[panel, None] * scale)

    def columns(panel: slice) -> None:
        hessian[:, panel] = hadamard_columns(hessian[:, panel])

    size = parallel.PANEL
    panels = [slice(a, a + size) for a in range(0, hessian.shape[0], size)]
    parallel.each(rows, panels)
    parallel.each(columns, panels)
    return hessian


def _signs(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, (n,), generator=generator).float() * 2 - 1


def _rms(x: torch.Tensor, dim: int) -> torch.Tensor:
    # In units of the largest: the squares of tiny weights leave the range of float32.
    unit = x.abs().max().clamp(min=1e-30)
    return torch.linalg.vector_norm(x / unit, dim=dim) * (unit / x.shape[dim] ** 0.5)


def _mean_of_positive(x: torch.Tensor) -> torch.Tensor:
    positive = x[x > 0]
    return positive.mean() if positive.numel() else x.new_ones(())


def _inverse(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x == 0, 0.0, 1 / x)


def _share(scale: torch.Tensor) -> float:
    """What svh takes over of the overall scale where suh alone would leave float16's range."""
    if scale == 0 or 2.0**-10 <= scale <= 2.0**10:
        return 1.0
    return 2.0 ** round(float(scale.log2()) / 2)
