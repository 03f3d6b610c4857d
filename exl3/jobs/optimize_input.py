"""What optimize.py is asked for and given, checked before any work is done."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exl3.errors import UserError
from exl3.format.manifest import file_digest
from exl3.measurement import Measurement
from exl3.model.checkpoint import Checkpoint
from exl3.splice import Quant, job_id, refuse_misfits, refuse_order

VERIFY_ROWS = 32
ROUNDS = 5
ADVICE = (
    "make quants to mix with convert.py --no_correction, or convert the original by a recipe "
    "(optimize.py --recipe)"
)


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    measurement: Path
    bitrate: float  # stored bits a weight of the decoder
    out: Path
    quants: tuple[Path, ...] = ()  # none: those of the measurement
    head_bits: int | None = None
    shard_size: int = 8192  # MiB
    original: Path | None = None
    verify: int = VERIFY_ROWS  # rows; 0: nothing is measured
    rounds: int = ROUNDS  # of choices that those measured before suggest, at most
    text: Path | None = None  # for these rows; None: the built-in one
    force: bool = False
    device: str = "0"
    trust_remote_code: bool = False

    @property
    def verifies(self) -> bool:
        """Whether choices are measured for real."""
        return self.original is not None and self.verify > 0


def open_quants(request: Request, measurement: Measurement) -> tuple[Quant, ...]:
    """The quants, found to belong together and to the measurement."""
    if not request.quants and not measurement.has_quants:
        raise UserError(
            f"-m {request.measurement} was made without quants; give quants with -i, or write a "
            "recipe (--recipe) and convert the original by it"
        )
    told = (measurement.base, *measurement.alts)
    folders = request.quants or tuple(Path(quant.dir or "") for quant in told)
    if len(folders) < 2:
        raise UserError("-i: give two or more quants of rising bitrate")
    for folder in folders:
        if not request.quants and not folder.is_dir():
            raise UserError(
                f"{folder}, which -m {request.measurement} was made of, is not there; give the "
                "quants with -i"
            )
    quants = tuple(Quant(folder) for folder in folders)
    refuse_misfits(quants)
    refuse_order(quants)
    _refuse_other_model(request, measurement, quants)
    _refuse_bitrate(request.bitrate, quants)
    return quants


def _refuse_other_model(
    request: Request, measurement: Measurement, quants: Sequence[Quant]
) -> None:
    """UserError unless measurement, quants and original are of one model."""
    base = quants[0]
    arch = (base.config.get("architectures") or [None])[0]
    if arch != measurement.arch_string:
        raise UserError(
            f"-m {request.measurement} is of {measurement.arch_string}, but {base.folder} is {arch}"
        )
    quantized = dict.fromkeys(name for quant in quants for name in quant.decoder)
    if odd := next((key for key in measurement.layers if key not in base.modules), None):
        raise UserError(f"-m {request.measurement} measured {odd}, which {base.folder} lacks")
    measured = set(measurement.layers)
    if odd := next((name for name in quantized if name not in measured), None):
        raise UserError(f"{base.folder} has {odd}, which -m {request.measurement} did not measure")
    known = {"the measurement": measurement.model.fingerprint}
    for quant in quants:
        producer = quant.quantization.get("producer")
        known[str(quant.folder)] = producer.get("source") if isinstance(producer, dict) else None
    if request.original is not None:
        known[f"-r {request.original}"] = Checkpoint(request.original).fingerprint()
    known = {name: value for name, value in known.items() if value is not None}
    for name, value in known.items():
        if value != next(iter(known.values())):
            raise UserError(
                f"{next(iter(known))} and {name} are of different originals, by the hashes of "
                "their files; give what belongs to one model"
            )


def _refuse_bitrate(bitrate: float, quants: Sequence[Quant]) -> None:
    for quant, beyond, word in (
        (quants[0], bitrate < quants[0].bpw, "below the smallest"),
        (quants[-1], bitrate > quants[-1].bpw, "above the largest"),
    ):
        if beyond or bitrate != bitrate:
            raise UserError(
                f"-b {bitrate:g} is {word} of the quants: {quant.folder} has {quant.bpw:.3f} bits "
                "per weight as stored"
            )


def head_number(request: Request, quants: Sequence[Quant]) -> int:
    """Number of the quant whose head is taken."""
    if request.head_bits is None:
        return 0
    for number, quant in enumerate(quants):
        if quant.head_bits == request.head_bits:
            return number
    there = ", ".join(str(bits) for bits in sorted({quant.head_bits for quant in quants}))
    raise UserError(
        f"-hb {request.head_bits}: none of the quants has such a head (they have {there})"
    )


def refuse_corrected(request: Request, quants: Sequence[Quant]) -> None:
    """UserError if layers that belong behind others' errors would be mixed unseen."""
    corrected = [str(quant.folder) for quant in quants if quant.corrected]
    if corrected and not request.verifies:
        raise UserError(
            f"{' and '.join(corrected)} corrected every layer for the errors before it, so mixing "
            f"them may do harm; give the original (-r) to have that measured, or {ADVICE}"
        )


def job_of(request: Request, quants: Sequence[Quant]) -> str:
    """The id of the job; what it depends on."""
    original = request.original and Checkpoint(request.original).fingerprint()
    text = request.text and file_digest(request.text)
    return job_id(
        "optimize",
        [quant.fingerprint for quant in quants],
        file_digest(request.measurement),
        [request.bitrate, request.head_bits, request.force],
        [original, text, request.verify, request.rounds] if request.verifies else None,
    )
