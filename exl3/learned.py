"""What splices that were measured as wholes teach about the options they are made of.

Predicted KLDs of single options are off, each by a factor; how errors meet in a whole is not
predicted at all. Every measured whole is a sum that has to come out. So the logarithms of the
factors are taken as Gaussian and conditioned on the sums (Gaussian processes: Rasmussen & Williams,
2006, section 2.1; the sums are linearized around the latest estimate, as in Gauss-Newton). A factor
has three parts: one of the option alone, one that all options of its group share, and one that all
groups of its family share, such as the tensors of a block's attention: gradients foretell those
alike too low or too high. Wholes that are much worse than the best are believed less: errors that
meet there say little about where they are few (docs/benchmarks.md has numbers).
"""

from collections.abc import Hashable, Sequence
from itertools import pairwise

import numpy as np

# Standard deviations of the parts of a factor's logarithm (bench/learning.py has others).
OPTION, GROUP, FAMILY = 0.3, 0.5, 0.5
UNSURE = 0.02  # relative: noise of a measured whole beside another on the same rows,
FAR = 0.25  # and how much it grows with what the whole is worse than the best
STEPS, STRIDE = 8, 0.7  # of Gauss-Newton; whole strides can overshoot
MOST = 3.0  # logarithm of the largest factor that is believed


def learned(
    predicted: Sequence[Sequence[float]],
    families: Sequence[Hashable],
    picks: Sequence[Sequence[int]],
    klds: Sequence[float],
) -> list[list[float]]:
    """Most likely KLD of every option, so that the sums of what was picked are near what was
    measured.

    predicted: KLD of every group's options, up to one common factor. families: of every group.
    picks: of every whole, the option each group had; klds: what it was measured to cost. ValueError
    without any whole.
    """
    if not len(picks):
        raise ValueError("nothing was measured to learn from")
    prior = np.concatenate([np.asarray(own, dtype=float) for own in predicted])
    first = np.cumsum([0, *map(len, predicted)])
    parts = np.zeros((len(picks), len(prior)))  # of every whole, the KLDs it is the sum of
    for row, pick in zip(parts, picks, strict=True):
        taken = first[:-1] + np.asarray(pick)
        row[taken] = prior[taken]
    wanted = np.asarray(klds, dtype=float)
    if not (parts.sum(1).min() > 0 and wanted.min() > 0):
        return [list(own) for own in predicted]
    scale = float(np.exp(np.log(wanted / parts.sum(1)).mean()))
    noise = (UNSURE + FAR * (wanted / wanted.min() - 1)) * wanted
    factors = _factors(parts, _mixing(predicted, families), wanted / scale, noise / scale)
    found = scale * prior * factors
    return [found[a:b].tolist() for a, b in pairwise(first)]


def _factors(
    parts: np.ndarray, mixing: np.ndarray, wanted: np.ndarray, noise: np.ndarray
) -> np.ndarray:
    """Of every option. parts (wholes, options) are to have sums near `wanted`; mixing (options,
    causes) makes logarithms of factors from causes of unit variance."""
    causes = np.zeros(mixing.shape[1])
    for _ in range(STEPS):
        now = parts * np.exp(np.clip(mixing @ causes, -MOST, MOST))
        slopes = now @ mixing  # (wholes, causes)
        lacking = wanted - now.sum(1) + slopes @ causes
        likely = slopes.T @ np.linalg.solve(slopes @ slopes.T + np.diag(noise**2), lacking)
        causes += STRIDE * (likely - causes)
    return np.exp(np.clip(mixing @ causes, -MOST, MOST))


def _mixing(predicted: Sequence[Sequence[float]], families: Sequence[Hashable]) -> np.ndarray:
    """(options, causes): what independent causes of unit variance add to the logarithm of every
    option's factor."""
    groups = np.repeat(np.arange(len(predicted)), [len(own) for own in predicted])
    numbers = {family: i for i, family in enumerate(dict.fromkeys(families))}
    kin = np.array([numbers[family] for family in families])[groups]
    own = OPTION * np.eye(len(groups))
    shared = GROUP * (groups[:, None] == np.arange(len(predicted)))
    wide = FAMILY * (kin[:, None] == np.arange(len(numbers)))
    return np.hstack([own, shared, wide])
