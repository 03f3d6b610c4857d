"""Signs, channel scales and Hadamard transforms: weights become near-Gaussian with unit variance.

W = diag(suh) B(in) W_inner B(out) diag(svh), as in the format; `regularize` solves it for W_inner.
"""

from dataclasses import dataclass

import torch

from exl3 import parallel
from exl3.format.hadamard import HADAMARD, hadamard_columns, hadamard_rows
from exl3.format.trellis import TILE, matrix_to_tiles

# Of the mean: channels with a smaller scale count as much as this in the transformed Hessian.
LEAST_SCALE = 0.25

LARGEST_SCALE = 2.0**15  # of an output channel: float16 ends at 65504

DRAWS = 16  # of signs for each block of outputs
MOST_ROWS = 1024  # that the draws are compared on

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

    def tails(self) -> torch.Tensor:
        """Fourth moments of the tiles of W_inner under `input_scales`, float32 (in/16, out/16)."""
        inverse = _inverse(self.input_scales)[:, None]
        found = []
        for panel in self.half_way.split(PANEL, 1):
            fourth = hadamard_columns(panel * inverse).square_().square_()
            found.append(fourth.unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE)).mean((1, 3)))
        return torch.cat(found, 1)

    def tiles(self, numbers: torch.Tensor) -> torch.Tensor:
        """Tiles of W_inner under `input_scales`, float32 (n, 256), by their numbers (n,) row by
        row."""
        across = self.half_way.shape[1] // TILE
        i, j = numbers // across, numbers % across
        within = torch.arange(TILE, device=numbers.device)
        runs = self.sample((j[:, None] * TILE + within).flatten())  # of their 16 columns each
        runs = runs.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE))
        each = torch.arange(len(numbers), device=numbers.device)
        return matrix_to_tiles(runs[i, :, each].flatten(0, 1)).flatten(0, 1)

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
    sign_in = _signs(rows, generator).to(weight.device)
    signs_out = torch.stack([_signs(columns, generator) for _ in range(DRAWS)]).to(weight.device)
    out = _rms(weight, 0)
    if not out_scales:
        out = (out > 0).float() * out.square().mean().sqrt()
    out = out / _mean_of_positive(out)
    share = _share(_rms(weight.flatten(), 0))
    while float(out.max()) * share > LARGEST_SCALE:
        share /= 2
    sign_out = _flattest(weight, out, signs_out)
    svh = (sign_out * out * share).half()
    inverse = _inverse(svh.float())[None, :]
    half_way = torch.empty_like(weight)
    for rows_in, rows_out in zip(weight.split(PANEL), half_way.split(PANEL), strict=True):
        rows_out.copy_(hadamard_rows(rows_in * inverse))
    return Regularized(half_way, sign_in * _rms(half_way, 1), svh)


def _flattest(weight: torch.Tensor, scales: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Of several draws of signs (draws, out) for each block of 128 outputs those under which its
    transform has the shortest tails, by the fourth moment. Outputs that are all but equal, as of
    tokens that a model has hardly met, add up under unlucky signs, beyond any codebook's range.

    weight: float32 (in, out); scales: of the outputs (out,). On some of the inputs, evenly spread.
    """
    rows = weight[:: -(-len(weight) // MOST_ROWS)] * _inverse(scales)
    rows = rows * _inverse(_rms(rows, 1))[:, None]
    moments = []
    for signs in draws:
        fourth = hadamard_rows(rows * signs).square_().square_().sum(0)
        moments.append(fourth.unflatten(0, (-1, HADAMARD)).sum(1))
    best = torch.stack(moments).argmin(0)
    blocks = draws.unflatten(1, (-1, HADAMARD))
    return blocks[best, torch.arange(len(best), device=draws.device)].flatten()


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
