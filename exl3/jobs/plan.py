"""What a conversion will do: which tensor gets how many bits, and what that makes of the model."""

from dataclasses import dataclass

from exl3.allocate import MAX_BITS, Module, allocate, average_bits
from exl3.format.layer import padded
from exl3.jobs.settings import Settings
from exl3.model.streamed import StreamedModel

UNQUANTIZED = 16
FAVOURED = ("attn", "attention", "shared_expert")  # parts of the keys that -hq gives more bits


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


def make_plan(settings: Settings, model: StreamedModel) -> Plan:
    """Shares out the bits."""
    modules = decoder_modules(model)
    bits = allocate(modules, settings.bits)
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
