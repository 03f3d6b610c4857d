"""Second moments of a layer's inputs, and the factor that LDLQ feeds errors back with."""

from collections.abc import Iterator

import torch

from exl3 import parallel
from exl3.format.trellis import TILE

DAMPING = 0.025  # of the mean of the diagonal
MAX_DAMPING = 1.0

PANEL = 256  # rows of a Gram matrix that are one piece of work; part of the result's definition
CHOLESKY_PANEL = 512  # columns that are eliminated at a time; likewise


class Hessian:
    """Running mean of x^T x over calibration tokens, accumulated in float32."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(features, features, device=device)  # below the diagonal only
        self.tokens = 0
        self.weight = 0.0  # of all tokens

    def add(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Adds the inputs x (tokens, features) of a layer, from any device.

        weights: how much each token counts, (tokens,), not negative; None: one each.
        """
        x = x.reshape(-1, x.shape[-1]).to(self._sum)
        self.tokens += x.shape[0]
        self.weight += x.shape[0] if weights is None else float(weights.double().sum())
        if weights is not None:
            x = x * weights.reshape(-1, 1).to(self._sum).sqrt()
        _add_gram(self._sum, x)

    def add_scaled(self, other: "Hessian", factor: float) -> None:
        """Adds all tokens of another one, each counting `factor` times as much as there."""
        self._sum.add_(other._sum, alpha=factor)
        self.tokens += other.tokens
        self.weight += factor * other.weight

    def mean(self) -> torch.Tensor:
        """float32 (features, features), symmetric bit for bit; zeros if no token was seen."""
        return _mirrored(self._sum / (self.weight or 1))


def _add_gram(total: torch.Tensor, x: torch.Tensor) -> None:
    """total += x^T x on and below the diagonal: half the work, for x^T x is symmetric."""

    def add(a: int) -> None:
        b = min(a + PANEL, total.shape[0])
        total[a:b, :b].addmm_(x[:, a:b].T, x[:, :b])

    # The longest rows first, so that no thread ends with one.
    parallel.each(add, reversed(range(0, total.shape[0], PANEL)))


def _mirrored(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix itself, with what is below its diagonal copied above it."""
    for a in range(0, matrix.shape[0], PANEL):
        b = a + PANEL
        matrix[a:b, b:] = matrix[b:, a:b].T
        corner = matrix[a:b, a:b]
        corner.copy_(corner.tril() + corner.tril(-1).T)
    return matrix


def useless(hessian: torch.Tensor | None) -> str | None:
    """Why LDLQ cannot use this Hessian, None if it can."""
    if hessian is None:
        return "no Hessian"
    if not torch.isfinite(hessian).all():
        return "a Hessian with non-finite values"
    if not (hessian.diagonal() > 0).any():
        return "an all-zero Hessian"
    return None


def damped(hessian: torch.Tensor, damping: float = DAMPING) -> Iterator[tuple[float, torch.Tensor]]:
    """The Hessian with a share of its mean diagonal added to it, then with more and more of it.

    Each is a copy of its own, float64: it may be worked on in place.
    """
    mean = hessian.diagonal().double().mean()
    while True:
        yield damping, _raised(hessian, damping * mean)  # a variable here would keep it alive
        damping = max(4 * damping, DAMPING)
        if damping > MAX_DAMPING:
            return


def _raised(hessian: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    h = hessian.to(torch.float64, copy=True)
    h.diagonal().add_(by)
    return h


def cholesky_(matrix: torch.Tensor) -> bool:
    """Puts C of `matrix` = C C^T, lower triangular, in its place; False if there is none.

    (n, n); only what is on and below the diagonal is read. The same bits for any number of
    threads, no second matrix. Right-looking, in panels (Golub and Van Loan, section 4.2.6).
    """
    n = matrix.shape[0]
    for a in range(0, n, CHOLESKY_PANEL):
        b = min(a + CHOLESKY_PANEL, n)
        corner, failed = torch.linalg.cholesky_ex(matrix[a:b, a:b])
        if failed or not torch.isfinite(corner).all():
            return False
        matrix[a:b, a:b] = corner
        matrix[a:b, b:] = 0
        behind = range(b, n, CHOLESKY_PANEL)
        parallel.each(lambda i, a=a, b=b: _solve_panel(matrix, a, b, i), behind)
        pairs = [(i, j) for i in behind for j in range(b, i + 1, CHOLESKY_PANEL)]
        parallel.each(lambda ij, a=a, b=b: _eliminate(matrix, a, b, *ij), pairs)
    return True


def _solve_panel(matrix: torch.Tensor, a: int, b: int, i: int) -> None:
    """C[i, a] = A[i, a] C[a, a]^-T for the panel of rows i."""
    rows = matrix[i : i + CHOLESKY_PANEL, a:b]
    corner = matrix[a:b, a:b]
    rows.copy_(torch.linalg.solve_triangular(corner.T, rows, upper=True, left=False))


def _eliminate(matrix: torch.Tensor, a: int, b: int, i: int, j: int) -> None:
    """A[i, j] -= C[i, a] C[j, a]^T for the panels of rows i and columns j."""
    left = matrix[i : i + CHOLESKY_PANEL, a:b]
    right = matrix[j : j + CHOLESKY_PANEL, a:b]
    target = matrix[i : i + CHOLESKY_PANEL, j : j + CHOLESKY_PANEL]
    target.addmm_(left, right.T, alpha=-1)


def block_ldl(hessian: torch.Tensor) -> torch.Tensor | None:
    """L of H = L D L^T with 16x16 blocks: unit lower block triangular (n, n), in H's dtype.

    None if H (n, n) is not positive definite. QuIP (arXiv 2307.13304) section 4, in blocks as in
    QuIP# (arXiv 2402.04396) section 5. Takes one matrix besides H and L's own panels.
    """
    factor = hessian.clone()
    if not cholesky_(factor):
        return None
    blocks = factor.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE))
    diagonal = torch.diagonal(blocks, dim1=0, dim2=2).permute(2, 0, 1)  # (blocks, 16, 16)
    unit = torch.eye(TILE, dtype=factor.dtype, device=factor.device).expand_as(diagonal)
    inverse = torch.linalg.solve_triangular(diagonal, unit, upper=False)

    def divide(rows: torch.Tensor) -> None:
        """C[rows, j] C[j, j]^-1 for all blocks of columns j."""
        columns = rows.unflatten(1, (-1, TILE)).transpose(0, 1)  # (blocks, rows, 16)
        columns.copy_(torch.bmm(columns, inverse))

    parallel.each(divide, factor.split(PANEL))
    return factor
