"""Weights that make up for what is already lost before them: the target W' a layer is asked to be.

In a model that is quantized block by block, a layer's inputs are xq, not the xf it had in the
original. W' is what maps xq to the original's outputs best, by ridge regression towards W.
"""

from copy import copy
from functools import partial

import torch

from exl3 import parallel
from exl3.devices import SHORT, where_it_fits
from exl3.quant.hessian import DAMPING, Hessian, cholesky_, damped, useless

TOKENS_PER_INPUT = 1.0  # at which a Hessian of its own counts half in `trust`


class Moments:
    """Running means of xq^T xq, xq^T (xf - xq) and xq^T r over calibration tokens, in float32.

    xq: inputs of a layer in the quantized model, xf: in the original, r: what the layer's output is
    to make up for besides. Memory: (in, in) twice, and (in, out) where there are residuals.
    """

    def __init__(
        self,
        features: int,
        outputs: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """outputs: out, where residuals will be added."""
        self.hessian = Hessian(features, device)
        self._shift = torch.zeros(features, features, device=device)
        self._residual = None
        if outputs is not None:
            self._residual = torch.zeros(features, outputs, device=device)

    @property
    def tokens(self) -> int:
        """How many were added."""
        return self.hessian.tokens

    def add(
        self,
        xq: torch.Tensor,
        xf: torch.Tensor,
        residual: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> None:
        """Adds tokens: xq and xf (tokens, in), residual r (tokens, out), weights (tokens,) or None.

        ValueError if there are residuals and none are expected, or the other way round.
        """
        if (residual is None) != (self._residual is None):
            raise ValueError("residuals must be given with all tokens or with none")
        xq = xq.reshape(-1, xq.shape[-1]).to(self._shift)
        self.hessian.add(xq, weights)
        left = xq if weights is None else xq * weights.reshape(-1, 1).to(xq)
        self._shift += parallel.matmul(left.T, xf.reshape(xq.shape).to(xq) - xq)
        if residual is not None:
            right = residual.reshape(-1, residual.shape[-1]).to(xq)
            self._residual += parallel.matmul(left.T, right)

    def add_scaled(self, other: "Moments", factor: float) -> None:
        """Adds all tokens of others without residuals, each counting `factor` times as much."""
        self.hessian.add_scaled(other.hessian, factor)
        self._shift.add_(other._shift, alpha=factor)

    def shift(self) -> torch.Tensor:
        """Mean of xq^T (xf - xq), float32 (in, in)."""
        return self._shift / (self.hessian.weight or 1)

    def residual(self) -> torch.Tensor | None:
        """Mean of xq^T r, float32 (in, out); None where no residuals are kept."""
        return None if self._residual is None else self._residual / (self.hessian.weight or 1)


class Correction:
    """W' for all layers that share their inputs (q, k and v; gate and up): factors once.

    W' = (Hq + l I)^-1 (xq^T xf W + xq^T r + l W) with Hq = xq^T xq and l = damping * mean diag Hq,
    written as W + (Hq + l I)^-1 (shift W + residual). Its part for xf is GPTAQ's asymmetric
    calibration (arXiv 2504.02692); l W on the right keeps W from shrinking.

    Takes one matrix (in, in) in float64.
    """

    def __init__(self, hessian: torch.Tensor, damping: float = DAMPING) -> None:
        """hessian: mean of xq^T xq (in, in). damping: raised as far as the solution needs it."""
        self.notes: list[str] = []  # what the user should know
        self._factor = None
        if reason := useless(hessian):
            self.notes.append(f"{reason}: not corrected for earlier errors")
            return
        with parallel.one_thread_per_op():
            found, where = where_it_fits(hessian.device, partial(_factor, hessian, damping))
        if where != hessian.device:
            self.notes.append(f"the correction is factored on the CPU: {SHORT}")
        if found is None:
            self.notes.append(
                "the Hessian is not positive definite: not corrected for earlier errors"
            )
            return
        used, factor = found
        self._factor = factor.to(hessian.device)
        if used > damping:
            self.notes.append(f"the correction needed a damping of {used:g}")

    def to(self, device: torch.device) -> "Correction":
        """The same on another device, with the same list of notes."""
        other = copy(self)
        other._factor = None if self._factor is None else self._factor.to(device)
        return other

    def target(
        self,
        weight: torch.Tensor,
        shift: torch.Tensor,
        residual: torch.Tensor | None = None,
        strength: float = 1.0,
    ) -> torch.Tensor:
        """W', float32 (in, out); W itself, and a note, where there is no telling it.

        weight: W (in, out); shift: mean of xq^T (xf - xq) (in, in); residual: mean of xq^T r
        (in, out). strength: 0 for none of the correction, 1 for all.
        """
        weight = weight.detach().float()
        if self._factor is None:
            return weight
        result = torch.empty(weight.shape, device=weight.device)

        def solve(panel: slice) -> None:
            wanted = (shift @ weight[:, panel]).double()
            if residual is not None:
                wanted += residual[:, panel]
            half = torch.linalg.solve_triangular(self._factor, wanted, upper=False)
            found = torch.linalg.solve_triangular(self._factor.T, half, upper=True)
            result[:, panel] = weight[:, panel] + strength * found

        with parallel.one_thread_per_op():
            starts = range(0, weight.shape[1], parallel.PANEL)
            parallel.each(solve, [slice(a, a + parallel.PANEL) for a in starts])
        if not torch.isfinite(result).all():
            self.notes.append("moments with non-finite values: not corrected for earlier errors")
            return weight
        return result


def _factor(
    hessian: torch.Tensor, damping: float, device: torch.device
) -> tuple[float, torch.Tensor] | None:
    """The damping it took and C of H = C C^T, float64; None if H is not positive definite."""
    for used, h in damped(hessian.to(device), damping):
        if cholesky_(h):
            return used, h
    return None


def corrected_weight(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    shift: torch.Tensor,
    residual: torch.Tensor | None = None,
    damping: float = DAMPING,
    strength: float = 1.0,
) -> torch.Tensor:
    """W' of one layer, as `Correction` gives it, which also tells why where it is W itself."""
    return Correction(hessian, damping).target(weight, shift, residual, strength)


def trust(tokens: float, features: int, per_input: float = TOKENS_PER_INPUT) -> float:
    """How far moments of so many tokens are believed: tokens / (tokens + per_input * features).

    0 without tokens, a half at `per_input` tokens an input channel, near 1 from 10 of them on.
    The weight of a sample in a mean of itself and of a prior worth per_input * features tokens.
    """
    return tokens / (tokens + per_input * features)


def shrink(
    hessian: torch.Tensor,
    tokens: float,
    toward: torch.Tensor,
    per_input: float = TOKENS_PER_INPUT,
) -> torch.Tensor:
    """A Hessian of few tokens (a rare expert's), moved toward one of many (its layer's mean).

    t H + (1 - t) T, with t = `trust` and T = `toward` in H's trace; T's own where H's is zero.
    hessian, toward: float32 (n, n). H itself where `toward` tells nothing.
    """
    if useless(toward):
        return hessian
    share = trust(tokens, hessian.shape[0], per_input)
    if useless(hessian):
        return toward.clone()
    scale = float(hessian.diagonal().double().sum() / toward.diagonal().double().sum())
    return share * hessian + ((1 - share) * scale) * toward
