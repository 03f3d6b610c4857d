"""How far W_inner is stretched before the trellis: one factor a layer."""

import torch

from exl3 import ops, parallel
from exl3.errors_by_bits import RELATIVE_ERROR
from exl3.format.trellis import TILE
from exl3.quant.ldlq import ldlq

# Best scale of unit Gaussian weights, in units of the codebook, for K = 1..8
# (measured: bench/scale_table.py).
GAUSSIAN_SCALE = {
    "3inst": (1.426, 1.232, 1.165, 1.125, 1.071, 1.008, 0.952, 0.906),
    "mcg": (1.420, 1.231, 1.175, 1.129, 1.074, 1.011, 0.949, 0.900),
    "mul1": (1.122, 0.989, 0.938, 0.908, 0.879, 0.839, 0.797, 0.757),
}
STEP = 1.06  # ratio between the three scales that are tried
# Of the tiles, from the flattest to those with the longest tails: a share, and how many of it are
# tried. What lies beyond the codebook's range is in few tiles: in heads, whose rare tokens have all
# but equal rows, an even sample missed most of it, and errors were ten times what they had to be.
STRATA = ((0.9, 24), (0.09, 16), (0.009, 12), (0.001, 12))
FARTHEST = 14  # steps from the best scale of Gaussian weights
PATIENCE = 2  # steps that may be no better: one weight beyond the range spoils its tile, or not
LONG_TAILS = 1.2  # times the error of Gaussian weights
LDLQ_STEP = 0.9  # ratio between the three scales that are tried with feedback
# At few bits the scale is divided by this power of the targets' variance besides the root, which
# brings back the variance: steep Hessians widen few targets by much, which still would be beyond
# the range. Not by more than the second: where Hessians are all but singular, codes would become
# coarse.
NARROWER, MOST_NARROWER = 0.3, 1.25
PROBES = 32  # random vectors that tell how much feedback widens errors


def sample_columns(columns: int, most: int) -> torch.Tensor:
    """Numbers of at most `most` columns, in runs of 16 (a tile's width) spread over all of them."""
    runs = torch.linspace(0, columns // TILE - 1, min(columns, most) // TILE).long()
    return (runs[:, None] * TILE + torch.arange(TILE)).flatten()


def sample_tiles(tails: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tiles to search the scale on: numbers (n,), and what each counts (n,), 1 in all.

    tails: fourth moments (tiles,); every stratum of them is represented by tiles evenly spread.
    """
    order, begin, device = tails.argsort(stable=True), 0.0, tails.device
    if len(order) <= sum(count for _, count in STRATA):
        return order, torch.full((len(order),), 1 / len(order), device=device)
    picked, counts = [], []
    for share, count in STRATA:
        first, last = round(begin * len(order)), round((begin + share) * len(order))
        begin += share
        own = order[first:last]
        number = min(count, len(own))
        picked.append(own[torch.linspace(0, len(own) - 1, number, device=device).long()])
        each = len(own) / len(order) / max(1, number)
        counts.append(torch.full((number,), each, device=device))
    return torch.cat(picked), torch.cat(counts)


def search_scale(
    tiles: torch.Tensor, counts: torch.Tensor, bits: int, codebook: str
) -> tuple[float, float]:
    """The scale g that makes the error of trellis(g W_inner) / g smallest, and that error.

    tiles: of W_inner, float32 (n, 256), about unit variance; counts: what each counts (n,), 1 in
    all. From the best scale for Gaussian weights on until the last PATIENCE were no better; then
    the minimum of a parabola through the best and its neighbours.
    """
    center = GAUSSIAN_SCALE[codebook][bits - 1]
    errors: dict[int, float] = {}

    def at(i: int) -> float:
        if i not in errors:
            errors[i] = _error(tiles, counts, center * STEP**i, bits, codebook)
        return errors[i]

    best = min((0, -1, 1), key=at)
    step, last = (1 if best > 0 else -1), best
    gaussian = best == 0 and at(0) < LONG_TAILS * RELATIVE_ERROR[codebook][bits - 1]
    while not gaussian and abs(last) < FARTHEST and abs(last - best) < PATIENCE:
        last += step
        best = min(best, last, key=at)
    around = [at(i) for i in (best - 1, best, best + 1)]
    return center * STEP ** (best + _lowest(around, 1.0)), at(best)


def refine_scale(
    sample: torch.Tensor,
    scale: float,
    factor: torch.Tensor,
    hessian: torch.Tensor,
    bits: int,
    codebook: str,
) -> float:
    """The scale that makes LDLQ's own objective smallest, looked for at and below `scale`.

    Feedback makes targets wider than the weights, the more so at few bits, and only a smaller scale
    keeps them within the codebook (bench/ldlq_scale.py: 23% less proxy error at K = 1, 5% at 2).

    sample: columns of W_inner, float32 (in, n), about unit variance; columns do not depend on each
    other. factor: L, and hessian: H it belongs to, float32 (in, in).
    """

    def objective(g: float) -> float:
        error = sample * g
        ldlq(error, factor, bits, codebook)
        return float((error * parallel.matmul(hessian, error)).double().sum()) / g**2

    center = scale * LDLQ_STEP
    errors = [objective(center * LDLQ_STEP ** (-i)) for i in (-1, 0, 1)]
    return center * LDLQ_STEP ** (-_lowest(errors, 1.4))


def widened_scale(
    scale: float,
    error: float,
    factor_in: torch.Tensor,
    factor_out: torch.Tensor,
    few_bits: bool = False,
) -> float:
    """The scale under feedback in both directions, from the best one without and its error.

    Rounding leaves noise N of variance d = `error` of its targets, and errors of the weights are
    E = L_in^-T N L_out^-1; so targets, W - E + N, have the variance 1 + d (t_in t_out - 1) with
    t = |L^-1|^2 / n, and are brought back to that of W, with `few_bits` a little further. No
    search: objectives of a few columns are dominated by few directions, and too noisy
    (bench/two_sided.py --scales).
    """
    widened = _energy_of_inverse(factor_in) * _energy_of_inverse(factor_out)
    variance = 1 + error * (widened - 1)
    narrower = min(variance**NARROWER, MOST_NARROWER) if few_bits else 1.0
    return scale / (variance**0.5 * narrower)


def _energy_of_inverse(factor: torch.Tensor) -> float:
    """|L^-1|^2 / n of a unit lower triangular L (n, n), from random signs (Hutchinson); of blocks
    (blocks, n, n) all together."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (*factor.shape[:-1], PROBES), generator=generator).float() * 2 - 1
    found = torch.linalg.solve_triangular(factor, signs.to(factor.device), upper=False)
    return float(found.double().square().mean())


def _lowest(errors: list[float], most: float) -> float:
    """Where the parabola through the errors at -1, 0 and 1 is lowest, at most `most` away."""
    low, middle, high = errors
    curvature = low + high - 2 * middle
    if curvature <= 0:
        return -1.0 if low < high else 1.0
    return min(max((low - high) / (2 * curvature), -most), most)


def _error(
    tiles: torch.Tensor, counts: torch.Tensor, scale: float, bits: int, codebook: str
) -> float:
    values, _ = ops.encode_tiles(tiles * scale, bits, codebook)
    own = (values / scale - tiles).double().square().mean(1)
    return (own * counts).sum().item()
