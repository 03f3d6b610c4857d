"""What splices that were measured as wholes teach about the options they are made of.

Predicted KLDs of single options are off, each by a factor; how errors meet in a whole is not
predicted at all. Every measured whole is a sum that has to come out. So the factors are taken as
Gaussian, those of a group's options correlated, and conditioned on the sums (Bayesian linear
regression: Rasmussen & Williams, Gaussian Processes for Machine Learning, 2006, section 2.1).
Wholes that are much worse than the best are believed less: errors that meet there say little about
where they are few (docs/benchmarks.md has numbers).
"""

from collections.abc import Sequence

import numpy as np

SPREAD = 0.3  # standard deviation of an option's factor
SHARED = 0.5  # correlation of the factors of two options of one group
UNSURE = 0.005  # relative: noise of a measured whole beside another on the same rows,
FAR = 0.5  # and how much it grows with what the whole is worse than the best


def learned(
    predicted: Sequence[Sequence[float]],
    picks: Sequence[Sequence[int]],
    klds: Sequence[float],
) -> list[list[float]]:
    """Expected KLD of every option, so that the sums of what was picked are near what was measured.

    predicted: KLD of every group's options, up to one common factor. picks: of every whole, the
    option each group had; klds: what it was measured to cost. ValueError without any whole.
    """
    if not len(picks):
        raise ValueError("nothing was measured to learn from")
    options = np.array(picks)  # (wholes, groups)
    parts = np.array([[own[i] for own, i in zip(predicted, row, strict=True)] for row in picks])
    sums, wanted = parts.sum(1), np.array(klds, dtype=float)
    if not (sums.min() > 0 and wanted.min() > 0):
        return [list(own) for own in predicted]
    scale = float(np.exp(np.log(wanted / sums).mean()))
    lacking = wanted / scale - sums
    covariance = np.array(
        [
            (_related(options, own) * parts * of).sum(1)
            for own, of in zip(options, parts, strict=True)
        ]
    )
    noise = (UNSURE + FAR * (wanted / wanted.min() - 1)) * sums
    weights = np.linalg.solve(covariance + np.diag(noise**2), lacking)  # (wholes,)
    found = []
    for g, own in enumerate(predicted):
        pulls = weights * parts[:, g]
        shifts = [pulls @ _related(options[:, g], i) for i in range(len(own))]
        found.append([scale * max(0.0, p * (1 + s)) for p, s in zip(own, shifts, strict=True)])
    return found


def _related(options: np.ndarray, others: np.ndarray | int) -> np.ndarray:
    """Covariance of the factors of options with others of the same groups."""
    return SPREAD**2 * np.where(options == others, 1.0, SHARED)
