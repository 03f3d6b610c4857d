"""A recipe: the best bits for every layer of the original, by a measurement, for a size."""

from dataclasses import dataclass
from math import floor
from pathlib import Path

from exl3.allocate import ALL_BITS, TOLERANCE, Solution, solve
from exl3.divide import divided
from exl3.errors import UserError
from exl3.format.layer import UNQUANTIZED
from exl3.measurement import MeasuredGroup, Measurement, read_measurement
from exl3.model.checkpoint import Checkpoint
from exl3.predict import Offer, predict
from exl3.recipe import Recipe, write_recipe


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    measurement: Path
    bitrate: float  # stored bits a weight of the decoder
    recipe: Path
    head_bits: int | None = None
    original: Path | None = None  # to check that it is the model that was measured


def make_recipe(request: Request) -> None:
    """Writes the recipe. UserError for bad input."""
    measurement = divided(read_measurement(request.measurement))
    _refuse_other_model(request, measurement)
    if request.recipe.exists():
        raise UserError(f"--recipe {request.recipe} is there already; give a new name")
    if not request.recipe.absolute().parent.is_dir():
        raise UserError(f"--recipe {request.recipe}: its folder does not exist")
    if request.head_bits not in (None, *ALL_BITS, UNQUANTIZED):
        raise UserError(f"-hb {request.head_bits} is out of range: 1 to 8, or 16 (unquantized)")
    weights = sum(_weights(group) for group in measurement.groups)
    found = _solved(measurement, request.bitrate, weights)
    chosen = [ALL_BITS[i] for i in found.picked]
    layers = {
        key: k for group, k in zip(measurement.groups, chosen, strict=True) for key in group.layers
    }
    codes = sum(k * _weights(g) for g, k in zip(measurement.groups, chosen, strict=True))
    recipe = Recipe(
        bits=round(codes / weights, 4),
        layers=layers,
        arch=measurement.arch_string,
        fingerprint=measurement.model.fingerprint,
        codebook=measurement.model.codebook,
        head_bits=request.head_bits,
        target=request.bitrate,
        kld=found.kld if measurement.method == "isolate" else None,
    )
    write_recipe(request.recipe, recipe)
    predicted = "" if recipe.kld is None else f", predicted KLD {recipe.kld:.5f}"
    print(
        f"Wrote {request.recipe}: {found.bits / weights:.3f} bits per weight as stored "
        f"({request.bitrate:g} asked), {recipe.bits:.3f} of them codes{predicted}, optimality gap "
        f"{found.gap:.2%}"
    )
    print(f"Next: convert.py -i ORIGINAL -o OUT -w WORK --recipe {request.recipe}")


def _solved(measurement: Measurement, bitrate: float, weights: int) -> Solution:
    options = []
    for group in measurement.groups:
        n, scales = _weights(group), _scales(measurement, group)
        offers = [Offer(k * n + scales, {k: n}) for k in ALL_BITS]
        options.append(predict(measurement, group, offers).options)
    budget = floor(bitrate * weights)
    for word, limit, wrong in (
        ("below", sum(own[0].bits for own in options), lambda a, b: not a >= b),
        ("above", sum(own[-1].bits for own in options), lambda a, b: a > b),
    ):
        if wrong(bitrate * weights, limit):
            raise UserError(
                f"-b {bitrate:g} is {word} what layers can have: {limit / weights:.3f} bits as "
                "stored, scales included"
            )
    return solve(options, budget, least=budget - floor(TOLERANCE * weights))


def _refuse_other_model(request: Request, measurement: Measurement) -> None:
    if request.original is None or measurement.model.fingerprint is None:
        return
    if Checkpoint(request.original).fingerprint() != measurement.model.fingerprint:
        raise UserError(
            f"-m {request.measurement} was made from other files than those of -r "
            f"{request.original} (their hashes differ); give the model it was made from"
        )


def _weights(group: MeasuredGroup) -> int:
    if group.weights is None:
        raise UserError(
            f"the measurement does not tell how many weights {group.layers[0]} has; measure again "
            "with util/measure.py of exl3"
        )
    return group.weights


def _scales(measurement: Measurement, group: MeasuredGroup) -> int:
    """Bits of all that is stored besides the codes, from layers that have one K."""
    if group.bits is not None:
        stored = [(group.k, group.bits)]
        stored += [(c.k, group.bits + c.dbits) for c in group.candidates]
        for k, bits in stored:
            if len(k) == 1 and k[0] != UNQUANTIZED:
                return bits - k[0] * _weights(group)
    raise UserError(
        f"the quants of the measurement mix bits within the group of {group.layers[0]}, so the "
        "size of its scales is not known; measure quants of whole bits, or the original alone"
    )
