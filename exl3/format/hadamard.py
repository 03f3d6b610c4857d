"""The 128-wide Hadamard transform that makes weights look Gaussian (QuIP#, arXiv 2402.04396)."""

from functools import cache

import torch

HADAMARD = 128  # every stored dimension is a multiple of this


@cache
def hadamard_matrix(dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """The symmetric, orthogonal 128x128 Sylvester Hadamard matrix over sqrt(128)."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < HADAMARD:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return (h / HADAMARD**0.5).to(device=device, dtype=dtype)


def hadamard_rows(x: torch.Tensor) -> torch.Tensor:
    """x B(n) for x (..., n), n a multiple of 128: the transform of the last dimension."""
    h = hadamard_matrix(x.dtype, str(x.device))
    return (x.unflatten(-1, (-1, HADAMARD)) @ h).flatten(-2)


def hadamard_columns(x: torch.Tensor) -> torch.Tensor:
    """B(n) x for x (n, m), n a multiple of 128: the transform of the first dimension."""
    h = hadamard_matrix(x.dtype, str(x.device))
    return (h @ x.unflatten(0, (-1, HADAMARD))).flatten(0, 1)
