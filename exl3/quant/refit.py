"""Scales fitted again once the codes are there.

Rounding with feedback leaves errors that depend on the weights, so the scales that the codes were
made with are not the best for them (docs/fidelity.md).
"""

import torch

from exl3 import parallel
from exl3.quant.hessian import DAMPING, cholesky_
from exl3.quant.incoherence import PANEL

ROUNDS = 2  # output scales, input scales, and again
RIDGE = 1e-3  # of the mean diagonal: towards the scales as they are


def refit_output_scales(
    wanted: torch.Tensor, decoded: torch.Tensor, hessian: torch.Tensor
) -> torch.Tensor:
    """Factors (out,) that bring the outputs of a quantized layer nearest to the wanted ones.

    Of every column by itself: q^T H w / q^T H q, least squares under H with the damping of the
    codes.

    wanted, decoded: float32 (in, out); hessian: (in, in), mean of x^T x. 1 for columns of zeros.
    """
    h = _damped(hessian)
    factors = []
    for w, q in zip(wanted.split(PANEL, 1), decoded.split(PANEL, 1), strict=True):
        hq = parallel.matmul(h, q)
        along, own = (hq * w).double().sum(0), (hq * q).double().sum(0)
        factors.append(torch.where(own > 0, along / own, 1.0))
    return _usable(torch.cat(factors))


def refit_scales(
    wanted: torch.Tensor,
    decoded: torch.Tensor,
    hessian: torch.Tensor,
    output_hessian: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the input scales (in,) and of the output scales (out,) of a quantized layer, that
    make tr(H_out E^T H E) small, E = W - diag(a) Q diag(b).

    For one of a and b it is least squares in the other, so they take turns. Normal equations, with
    * entry by entry: (H_out * Q^T H Q) (b - 1) = diag(Q^T H (W - Q) H_out), and the same with both
    sides changed over.

    wanted: W, decoded: Q, float32 (in, out); hessian: (in, in), mean of x^T x; output_hessian:
    (out, out), mean of d^T d, or of a block diagonal one the blocks, (blocks, n, n), the last of
    which may be partly for padding; all get the damping of the codes. Memory: four copies of W, and
    of each Hessian three, one of them in float64. Time: each round five products of (in, out) with
    a Hessian.
    """
    h, h_out = _damped(hessian), _damped(output_hessian)
    q, into, out = decoded, *(torch.ones(n, device=decoded.device) for n in decoded.shape)
    for _ in range(ROUNDS):
        found = _output_factors(h_out, parallel.matmul(h, q), q, wanted - q)
        q, out = q * found, out * found
        found = _factors(h, _by_outputs(q, h_out), q.T, (wanted - q).T)
        q, into = q * found[:, None], into * found
    return into, out


def _damped(hessian: torch.Tensor) -> torch.Tensor:
    h = hessian.to(torch.float32, copy=True)
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(DAMPING * diagonal.mean(-1, keepdim=True))
    return h


def _by_outputs(q: torch.Tensor, h_out: torch.Tensor) -> torch.Tensor:
    """q H_out, (in, out)."""
    if h_out.dim() == 2:
        return parallel.matmul(q, h_out)
    found = torch.empty_like(q)

    def block(c: int) -> None:
        here = found[:, _columns(h_out, c)]
        n = here.shape[1]
        here.copy_(q[:, _columns(h_out, c)] @ h_out[c, :n, :n])

    parallel.each(block, range(len(h_out)))
    return found


def _output_factors(
    h_out: torch.Tensor, hq: torch.Tensor, q: torch.Tensor, error: torch.Tensor
) -> torch.Tensor:
    """`_factors` of the outputs, of every block by itself where H_out is block diagonal."""
    if h_out.dim() == 2:
        return _factors(h_out, hq.T, q, error)

    def block(c: int) -> torch.Tensor:
        hq_c, q_c, error_c = (x[:, _columns(h_out, c)] for x in (hq, q, error))
        n = q_c.shape[1]
        return _factors(h_out[c, :n, :n], hq_c.T, q_c, error_c)

    return torch.cat(parallel.each(block, range(len(h_out))))


def _columns(blocks: torch.Tensor, c: int) -> slice:
    return slice(c * blocks.shape[1], (c + 1) * blocks.shape[1])


def _factors(
    weights: torch.Tensor, weighted: torch.Tensor, decoded: torch.Tensor, error: torch.Tensor
) -> torch.Tensor:
    """b (n,) that solves (weights * weighted decoded) (b - 1) = diag(weighted error weights).

    weights: (n, n); weighted: (n, m); decoded, error: (m, n).
    """
    wanted = parallel.matmul(weighted, error).mul_(weights).double().sum(1, keepdim=True)
    a = _lower_product(weighted, decoded).mul_(weights).double()
    a.diagonal().add_(RIDGE * a.diagonal().mean())
    if not cholesky_(a):
        return torch.ones(len(a), device=a.device)
    half = torch.linalg.solve_triangular(a, wanted, upper=False)
    return _usable(1 + torch.linalg.solve_triangular(a.T, half, upper=True)[:, 0])


def _lower_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right, (n, m) and (m, n), on and below the diagonal: it is known to be symmetric."""
    product = left.new_zeros(len(left), len(left))

    def rows(a: int) -> None:
        b = min(a + PANEL, len(left))
        torch.matmul(left[a:b], right[:, :b], out=product[a:b, :b])

    # The longest rows first, so that no thread ends with one.
    parallel.each(rows, reversed(range(0, len(left), PANEL)))
    return product


def _usable(factors: torch.Tensor) -> torch.Tensor:
    """1 in the place of what is no scale's factor."""
    return torch.where(torch.isfinite(factors) & (factors > 0), factors, 1.0).float()
