"""Measured groups divided into their tensors, by what gradients say of each.

A coarse measurement is cheap and sure of its sums; how a sum divides among the tensors of its
group is what gradients foretell well (docs/fidelity.md, "How good the shares are").
"""

from dataclasses import replace

from exl3.errors_by_bits import relative_error
from exl3.measurement import Candidate, MeasuredGroup, Measurement, Part


def divided(measurement: Measurement) -> Measurement:
    """The same measurement with every group's known parts as groups of their own, which together
    have the group's KLD, gains and bits."""
    groups = [own for group in measurement.groups for own in _parts(measurement, group)]
    return replace(measurement, groups=tuple(replace(g, idx=i) for i, g in enumerate(groups)))


def undivided(measurement: Measurement) -> Measurement:
    """The same measurement with nothing known of parts."""
    return replace(
        measurement, groups=tuple(replace(group, parts=()) for group in measurement.groups)
    )


def _parts(measurement: Measurement, group: MeasuredGroup) -> list[MeasuredGroup]:
    if not group.parts:
        return [group]
    harm = [_harm(part, measurement.model.codebook) for part in group.parts]
    losses = _shares([own[0] for own in harm], group)
    return [
        MeasuredGroup(
            idx=group.idx,
            layers=part.layers,
            candidates=_candidates(group, i, harm),
            block=group.block,
            name=part.name,
            weights=part.weights,
            kld=_times(group.kld, losses[i]),
            kld_error=_times(group.kld_error, losses[i]),
            bits=part.bits[0],
            k=part.k[0],
            error=group.error,
            sensitivity=_times(group.sensitivity, part.share),
        )
        for i, part in enumerate(group.parts)
    ]


def _candidates(group: MeasuredGroup, i: int, harm: list[list[float]]) -> tuple[Candidate, ...]:
    """Of part i. harm: of each part in each quant, up to a common factor."""
    part, found = group.parts[i], []
    for q, whole in enumerate(group.candidates, 1):
        share = _shares([own[0] - own[q] for own in harm], group)[i]
        found.append(
            Candidate(
                dkld=whole.dkld * share,
                dbits=part.bits[q] - part.bits[0],
                dkld_error=_times(whole.dkld_error, share),
                error=whole.error,
                k=part.k[q],
            )
        )
    return tuple(found)


def _harm(part: Part, codebook: str | None) -> list[float]:
    """What a part does to the predictions in each quant, up to a common factor."""
    return [part.share * relative_error(dict.fromkeys(k, 1.0), codebook) for k in part.k]


def _shares(amounts: list[float], group: MeasuredGroup) -> list[float]:
    """Parts of one; of nothing, or of gains and losses mixed, by what gradients say alone."""
    if min(amounts) < 0 or sum(amounts) <= 0:
        amounts = [part.share for part in group.parts]
    return [amount / sum(amounts) for amount in amounts]


def _times(number: float | None, share: float) -> float | None:
    return None if number is None else number * share
