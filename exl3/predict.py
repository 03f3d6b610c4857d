"""The KLD of a measured group at any bits: as measured, or scaled from what was measured nearby.

To first order a group's KLD is proportional to the squared error of its layers, and this error
follows the bits alike in all layers. So what was measured at some bits is scaled by the ratio of
the trellis errors (`exl3.errors_by_bits`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log2

from exl3.allocate import Option
from exl3.errors import UserError
from exl3.errors_by_bits import relative_error
from exl3.measurement import MeasuredGroup, Measurement

WHOLE = 0.25  # bpw: how far a quant's stored bits may be from whole bits for all its layers


@dataclass(frozen=True)
class Offer:
    """Bits that a group could have."""

    bits: int  # all it would take
    weights: Mapping[int, float]  # K → how many weights have it


@dataclass(frozen=True)
class Prediction:
    """A group's options, and which of their KLDs were measured at just these bits."""

    options: list[Option]
    measured: list[bool]
    base: float  # KLD of the layers that the measurement began with


@dataclass(frozen=True)
class _Point:
    """What was measured of a group."""

    weights: Mapping[int, float]  # K → share
    layer_error: float  # by the table
    kld: float
    unsure: float  # relative standard error
    difference_error: float | None  # standard error of the KLD minus that of the base's layers


def predict(measurement: Measurement, group: MeasuredGroup, offers: Sequence[Offer]) -> Prediction:
    """What a group's offers will cost and harm. UserError if the measurement cannot tell."""
    points = _points(measurement, group)
    codebook = measurement.model.codebook
    found = [_at(points, offer, codebook) for offer in offers]
    cheapest = min(range(len(offers)), key=lambda i: (offers[i].bits, found[i][0]))
    options = []
    for offer, (kld, point, measured) in zip(offers, found, strict=True):
        kld_0, point_0, measured_0 = found[cheapest]
        if point_0 is points[0] and measured and measured_0 and point.difference_error is not None:
            error = point.difference_error
        else:
            error = abs(kld_0 - kld) * max(point.unsure, point_0.unsure)
        options.append(Option(offer.bits, kld, error))
    return Prediction(options, [measured for _, _, measured in found], points[0].kld)


def _at(points: Sequence[_Point], offer: Offer, codebook: str | None) -> tuple[float, _Point, bool]:
    """KLD of an offer, the point it comes from, and whether it was measured as it is."""
    for point in points:
        if point.weights.keys() == offer.weights.keys():
            return point.kld, point, True
    error = relative_error(offer.weights, codebook)
    near = min(points, key=lambda p: abs(log2(p.layer_error / error)))
    return near.kld * error / near.layer_error, near, False


def table_errors(measurement: Measurement, group: MeasuredGroup) -> list[float]:
    """Relative squared errors by the table: of the base's layers, then of every candidate's."""
    return [relative_error(own, measurement.model.codebook) for own in _bits(measurement, group)]


def measured_klds(measurement: Measurement, group: MeasuredGroup) -> list[float]:
    """Likewise what was measured, or follows from swaps."""
    base = group.kld
    if base is None:
        base = _kld_of_swaps(group, table_errors(measurement, group))
    differences = (0.0, *(candidate.dkld for candidate in group.candidates))
    return [max(0.0, base + difference) for difference in differences]


def _bits(measurement: Measurement, group: MeasuredGroup) -> list[Mapping[int, float]]:
    """K → share of the weights, likewise."""
    quants = (measurement.base, *measurement.alts)
    told = (group.k, *(candidate.k for candidate in group.candidates))
    return [
        dict.fromkeys(k or _whole(quant.bpw, quant.dir), 1.0)
        for k, quant in zip(told, quants, strict=True)
    ]


def _points(measurement: Measurement, group: MeasuredGroup) -> list[_Point]:
    """What was measured: the base's layers first, then every candidate's."""
    shares, errors = _bits(measurement, group), table_errors(measurement, group)
    klds = measured_klds(measurement, group)
    base = klds[0]
    own = (group.kld_error or 0.0) / base if base > 0 else 0.0
    unsure = [own]
    for candidate in group.candidates:
        gain = abs(candidate.dkld)
        unsure.append((candidate.dkld_error or 0.0) / gain if gain > 0 else own)
    differences = (None, *(candidate.dkld_error for candidate in group.candidates))
    return [_Point(*row) for row in zip(shares, errors, klds, unsure, differences, strict=True)]


def _kld_of_swaps(group: MeasuredGroup, errors: Sequence[float]) -> float:
    """What the base's layers would cost by the gain of the first candidate, the nearest in bits."""
    if not group.candidates or errors[0] <= errors[1]:
        return 0.0
    return max(0.0, -group.candidates[0].dkld) * errors[0] / (errors[0] - errors[1])


def _whole(bpw: float | None, folder: str | None) -> tuple[int]:
    """K of all layers of a quant whose measurement tells its stored bits only."""
    if bpw is not None and 1 <= round(bpw) <= 8 and abs(bpw - round(bpw)) <= WHOLE:
        return (round(bpw),)
    raise UserError(
        f"the measurement does not tell how many bits the groups of {folder} had; measure again "
        "with util/measure.py of exl3"
    )
