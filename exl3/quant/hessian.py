"""Second moments of a layer's inputs, and the factor that LDLQ feeds errors back with."""

from collections.abc import Iterator

import torch

from exl3 import parallel
from exl3.format.trellis import TILE

DAMPING = 0.025  # of the mean of the diagonal
MAX_DAMPING = 1.0


class Hessian:
    """Running mean of x^T x over calibration tokens, accumulated in float32."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.sum = torch.zeros(features, features, device=device)
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Adds the inputs x (tokens, features) of a layer."""
        x = x.reshape(-1, x.shape[-1]).float()
        self.sum += parallel.matmul(x.T, x)
        self.tokens += x.shape[0]

    def mean(self) -> torch.Tensor:
        """float32 (features, features), zeros if no token was seen."""
        return self.sum / max(self.tokens, 1)


def useless(hessian: torch.Tensor | None) -> str | None:
    """Why LDLQ cannot use this Hessian, None if it can."""
    if hessian is None:
        return "no Hessian"
    if not torch.isfinite(hessian).all():
        return "a Hessian with non-finite values"
    if not (hessian.diagonal() > 0).any():
        return "an all-zero Hessian"
    return None


def damped(hessian: torch.Tensor) -> Iterator[tuple[float, torch.Tensor]]:
    """The Hessian with 2.5% of its mean diagonal added to it, then with more and more of it."""
    mean = hessian.diagonal().mean()
    damping = DAMPING
    while damping <= MAX_DAMPING:
        h = hessian.clone()
        h.diagonal().add_(damping * mean)
        yield damping, h
        damping *= 4


def block_ldl(hessian: torch.Tensor) -> torch.Tensor | None:
    """L of H = L D L^T with 16x16 blocks: unit lower block triangular (n, n), in H's dtype.

    None if H (n, n) is not positive definite. QuIP (arXiv 2307.13304) section 4, in blocks as in
    QuIP# (arXiv 2402.04396) section 5.
    """
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if failed or not torch.isfinite(factor).all():
        return None
    n = hessian.shape[0]
    blocks = factor.reshape(n // TILE, TILE, n // TILE, TILE)
    diagonal = torch.diagonal(blocks, dim1=0, dim2=2).permute(2, 0, 1)  # (blocks, 16, 16)
    unit = torch.eye(TILE, dtype=factor.dtype, device=factor.device).expand_as(diagonal)
    inverse = torch.linalg.solve_triangular(diagonal, unit, upper=False)
    columns = factor.reshape(n, n // TILE, TILE).transpose(0, 1)  # (blocks, n, 16)
    return torch.bmm(columns, inverse).transpose(0, 1).reshape(n, n)
