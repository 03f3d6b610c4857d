"""What gradients foretell of a measurement's groups, alone or together with what was measured.

To second order a group's KLD is its sensitivity times the relative error of its layers: that is
how a conversion shares out bits, sure but blind to all of higher order. What was measured sees all,
with the noise of its rows. Their errors have little in common, so between the two is often best.
"""

from dataclasses import replace

from exl3.measurement import MeasuredGroup, Measurement
from exl3.predict import measured_klds, table_errors


def foretold(measurement: Measurement, weight: float) -> Measurement | None:
    """The same measurement with every group's KLD as gradients foretell it, to the power of
    `weight`, times what was measured, to the power of 1 - `weight`.

    Only ratios of these KLDs are meant. None where gradients are not known.
    """
    if any(group.sensitivity is None for group in measurement.groups):
        return None
    return replace(
        measurement, groups=tuple(_foretold(measurement, g, weight) for g in measurement.groups)
    )


def _foretold(measurement: Measurement, group: MeasuredGroup, weight: float) -> MeasuredGroup:
    by_gradients = [group.sensitivity * error for error in table_errors(measurement, group)]
    measured = measured_klds(measurement, group)
    base, *others = (
        a**weight * b ** (1 - weight) for a, b in zip(by_gradients, measured, strict=True)
    )
    candidates = tuple(
        replace(candidate, dkld=kld - base, dkld_error=None)
        for candidate, kld in zip(group.candidates, others, strict=True)
    )
    return replace(group, kld=base, kld_error=None, candidates=candidates)
