"""What a conversion will do: which tensor gets how many bits, and what that makes of the model."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor
from pathlib import Path

from exl3.allocate import ALL_BITS, MAX_BITS, TOLERANCE, Option, solve
from exl3.divide import divided
from exl3.errors import UserError
from exl3.errors_by_bits import relative_error
from exl3.format.layer import UNQUANTIZED, padded
from exl3.format.manifest import file_digest
from exl3.groups import EVERY_TENSOR, group
from exl3.jobs.boundaries import traced_rows
from exl3.jobs.settings import Settings, flag
from exl3.measurement import Measurement, read_measurement
from exl3.model.streamed import StreamedModel
from exl3.predict import Offer, predict
from exl3.recipe import bits_by_recipe, read_recipe

FAVOURED = ("attn", "attention", "shared_expert")  # parts of the keys that -hq gives more bits


@dataclass(frozen=True)
class Module:
    """A linear layer that competes for bits."""

    key: str
    block: int
    weights: int  # padded, as bits are counted


@dataclass(frozen=True)
class Plan:
    """Bits of every linear that is quantized, the head included if it is."""

    modules: list[Module]  # the decoder's
    bits: dict[str, int]

    @property
    def average(self) -> float:
        """Bits a weight of the decoder's codes."""
        return average_bits(self.modules, self.bits)

    @property
    def weights(self) -> int:
        """Of the decoder's linears, padded."""
        return sum(m.weights for m in self.modules)

    @property
    def shares(self) -> str:
        """Which part of the decoder's weights has how many bits, and the average."""
        count = Counter()
        for m in self.modules:
            count[self.bits[m.key]] += m.weights
        parts = (f"{count[k] / self.weights:.0%} with {k} bits" for k in sorted(count))
        return f"{', '.join(parts)}; {self.average:.3f} on average"


def average_bits(modules: Sequence[Module], chosen: dict[str, int]) -> float:
    """Bits a weight of the codes alone: sum of K n over sum of n."""
    total = sum(m.weights for m in modules)
    return sum(chosen[m.key] * m.weights for m in modules) / total


def shared_by_gradients(settings: Settings) -> bool:
    """Whether what the original's gradients say decides which tensor gets how many bits."""
    if settings.recipe is not None or settings.measurement is not None:
        return False
    return settings.bits != floor(settings.bits) or not uniform(settings)


def traces_back(settings: Settings) -> bool:
    """Whether gradients of the original are wanted at all."""
    return settings.hessian == "kron" or shared_by_gradients(settings)


def gradient_rows(settings: Settings, model: StreamedModel, rows: int) -> int:
    """How many of the calibration rows go back through the original."""
    return min(rows, settings.hessian_rows or traced_rows(model, settings.cal_cols))


def uniform(settings: Settings) -> bool:
    """Whether a whole -b is the same for all tensors: wanted so, or in quants to be spliced."""
    return settings.uniform or settings.no_correction


def make_plan(
    settings: Settings, model: StreamedModel, sensitivities: Mapping[str, float] | None = None
) -> Plan:
    """Shares out the bits: by a recipe, by a measurement, or by the original's gradients.

    sensitivities: key → KLD per unit of relative error, where `shared_by_gradients`; without them
    all weights count alike, and only the sizes are what they will be. UserError for a recipe or
    measurement of another model.
    """
    modules = decoder_modules(model)
    if settings.recipe is not None:
        bits = _by_recipe(settings, model, modules)
    elif settings.measurement is not None:
        bits = _by_measurement(settings, model, modules)
    else:
        bits = _by_gradients(settings, modules, sensitivities)
    if settings.hq:
        for key in bits:
            if any(part in key for part in FAVOURED):
                bits[key] = min(bits[key] + 1, MAX_BITS)
    if settings.head_bits != UNQUANTIZED:
        bits[model.head()[0]] = settings.head_bits
    return Plan(modules, bits)


def decoder_modules(model: StreamedModel) -> list[Module]:
    """The decoder's linears, which share the bits."""
    return [
        Module(key, i, padded(linear.in_features) * padded(linear.out_features))
        for i in range(model.num_blocks)
        for key, linear in model.block_linears(i).items()
    ]


def _by_gradients(
    settings: Settings, modules: Sequence[Module], sensitivities: Mapping[str, float] | None
) -> dict[str, int]:
    """Shared out, unless all are to have the same."""
    if shared_by_gradients(settings):
        return allocate(modules, settings.bits, sensitivities)
    return {m.key: int(settings.bits) for m in modules}


def allocate(
    modules: Sequence[Module], bits: float, sensitivities: Mapping[str, float] | None = None
) -> dict[str, int]:
    """Whole bits for every tensor, on average at most `bits` (1 to 8) and as near as they allow.

    Those tensors get more whose sensitivity is worth it (None: all weights count alike), from one
    bit below the whole part of `bits` to two above: what errors do to a model is known for small
    ones. Experts of a kind have the same, as readers want it.
    """
    low = floor(bits)
    offered = range(max(1, low - 1), min(MAX_BITS, low + 2) + 1)
    weights = {m.key: m.weights for m in modules}
    worth = weights if sensitivities is None else sensitivities
    keys = [[m.key for m in modules if m.block == i] for i in sorted({m.block for m in modules})]
    groups, options = group(keys, EVERY_TENSOR), []
    for own in groups:
        n, kld = (sum(of[key] for key in own.keys) for of in (weights, worth))
        options.append([Option(k * n, kld * relative_error({k: 1}, None)) for k in offered])
    picked = _solved(options, bits, sum(weights.values()))
    return {key: offered[i] for own, i in zip(groups, picked, strict=True) for key in own.keys}


def _solved(options: Sequence[Sequence[Option]], bits: float, weights: int) -> tuple[int, ...]:
    """The option of every group, on average at most `bits` per weight."""
    budget = floor(bits * weights + 1e-6)
    found = solve(options, budget, least=budget - floor(TOLERANCE * weights))
    return found.picked  # there is one: all at the whole part of `bits`


def _by_measurement(
    settings: Settings, model: StreamedModel, modules: Sequence[Module]
) -> dict[str, int]:
    """The best bits by what was measured of this model."""
    measurement = divided(read_measurement(settings.measurement))
    _refuse_changed(settings, "measurement")
    weights = {m.key: m.weights for m in modules}
    refuse_other_model(measurement, model, weights)
    options = []
    for own in measurement.groups:
        n = sum(weights[key] for key in own.layers)
        offers = [Offer(k * n, {k: n}) for k in ALL_BITS]
        options.append(predict(measurement, own, offers).options)
    picked = _solved(options, settings.bits, sum(weights.values()))
    chosen = {
        key: ALL_BITS[i]
        for own, i in zip(measurement.groups, picked, strict=True)
        for key in own.layers
    }
    return {key: chosen[key] for key in weights}


def _by_recipe(
    settings: Settings, model: StreamedModel, modules: Sequence[Module]
) -> dict[str, int]:
    """What the recipe says. UserError where experts of a kind would differ."""
    recipe = read_recipe(settings.recipe)
    _refuse_changed(settings, "recipe")
    what = f"--recipe {settings.recipe}"
    _refuse_other_original(recipe.arch, recipe.fingerprint, model, what)
    chosen = bits_by_recipe(recipe, [m.key for m in modules])
    keys = [[m.key for m in modules if m.block == i] for i in range(model.num_blocks)]
    for own in group(keys, EVERY_TENSOR):
        if len({chosen[key] for key in own.keys}) > 1:
            raise UserError(
                f"{what}: {own.name} of {model.block_name(own.block)} have "
                "different bits; readers want the experts of one kind of a block alike"
            )
    return chosen


def refuse_other_model(
    measurement: Measurement, model: StreamedModel, weights: dict[str, int]
) -> None:
    """UserError if a measurement is not of this model. weights: of its decoder's linears."""
    arch, fingerprint = measurement.arch_string, measurement.model.fingerprint
    _refuse_other_original(arch, fingerprint, model, "-m: the measurement")
    ours, theirs = set(weights), set(measurement.layers)
    if odd := next((key for key in (*weights, *measurement.layers) if key in ours ^ theirs), None):
        whose = "the model has" if odd in ours else "the measurement has"
        other = "the measurement" if odd in ours else "the model"
        raise UserError(f"-m: {whose} {odd}, but {other} has not: they do not belong together")


def _refuse_other_original(
    arch: str | None, fingerprint: str | None, model: StreamedModel, what: str
) -> None:
    """UserError if the architecture or the hash of the model that something was made for is known
    and not this model's."""
    ours = (model.config.architectures or [model.config.model_type])[0]
    if arch not in (None, ours):
        raise UserError(f"{what} is of {arch}, but the model is {ours}")
    if fingerprint not in (None, model.checkpoint.fingerprint()):
        raise UserError(
            f"{what} was made from other files than those of {model.path} (their hashes differ); "
            "give the model it was made from"
        )


def _refuse_changed(settings: Settings, name: str) -> None:
    """UserError if the file of a setting is not the one that the job began with."""
    if file_digest(Path(getattr(settings, name))) != getattr(settings, f"{name}_hash"):
        raise UserError(
            f"{flag(name)} {getattr(settings, name)} has changed since the job began; start afresh "
            "in another work folder"
        )
