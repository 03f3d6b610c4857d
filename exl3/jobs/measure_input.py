"""What a measurement works on: the original, quants of it or layers made for the purpose, and text;
checked before any work is done."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open

from exl3.cli import read_devices
from exl3.data.rows import TextSource, calibration_rows
from exl3.data.tokenizer import load_tokenizer
from exl3.devices import CPU
from exl3.errors import UserError
from exl3.format.layer import UNQUANTIZED, decode_layer, layer_bits, layer_codebook, padded
from exl3.format.stored_layer import StoredLayer
from exl3.format.trellis import TILE
from exl3.jobs.boundaries import traced_rows
from exl3.jobs.workdir import WorkDir
from exl3.model.checkpoint import read_json
from exl3.model.quantized import like_quant, open_model, rope_parameters
from exl3.model.streamed import StreamedModel
from exl3.splice import Quant

DIFFERENT = 0.005  # of a norm's length: more than rounding to float16 or bfloat16


@dataclass(frozen=True)
class Request:
    """What is measured, with what. No quants: every group is quantized by itself."""

    original: Path
    out: Path
    quants: tuple[Path, ...] = ()
    level: int = 2
    method: str = "isolate"
    max_sys: float = 8.0  # GiB of hidden states
    rows: int = 10
    cols: int = 1024
    text: TextSource | None = None  # None: the built-in mix
    bits: int = 2  # without quants: of every group
    codebook: str = "mul1"
    hessian_rows: int = 30  # without quants: rows to quantize with, others than those measured on
    device: str = "0"
    trust_remote_code: bool = False

    @property
    def text_name(self) -> str:
        """Where the rows come from."""
        return self.text.place if self.text else "the built-in text"


class Layers(Protocol):
    """Where the other tensors of a group come from."""

    def stored(self, key: str) -> StoredLayer:
        """How a linear is stored there; bits UNQUANTIZED if it is not quantized."""

    def tensors(self, key: str) -> dict[str, torch.Tensor]:
        """Its weight (out, in) and bias (out,), maybe with padding; the bias only if there."""

    def error(self, key: str) -> float | None:
        """Relative squared error as it was when the layer was made, None if not known."""


class QuantLayers:
    """The layers of a quant's folder."""

    def __init__(self, folder: Path, trust_remote_code: bool, device: torch.device = CPU) -> None:
        self.folder = folder
        self.quant = Quant(folder)
        self.model = open_model(folder, trust_remote_code, device=device)

    def quantized(self, key: str) -> bool:
        return key in self.quant.layers

    def stored(self, key: str) -> StoredLayer:
        if self.quantized(key):
            return self.quant.layers[key]
        keys = self.quant.modules.get(key, {}).values()  # none: a tied head
        nbytes = sum(map(self.quant.tensors.nbytes, keys))
        return StoredLayer(key, UNQUANTIZED, "", 0, nbytes)

    def tensors(self, key: str) -> dict[str, torch.Tensor]:
        keys = {leaf: f"{key}.{leaf}" for leaf in ("weight", "bias")}
        present = self.keys
        return {a: self.model.checkpoint.tensor(k) for a, k in keys.items() if k in present}

    @cached_property
    def keys(self) -> set[str]:
        """Tensors as the model wants them."""
        return set(self.model.checkpoint.keys())

    def error(self, key: str) -> None:
        return None


class MadeLayers:
    """Layers that the measurement quantizes itself and keeps in its work folder."""

    def __init__(self, work: WorkDir, biases: dict[str, int]) -> None:
        self.work = work
        self.biases = biases  # key → bytes of a bias that a quant would store with it

    def stored(self, key: str) -> StoredLayer:
        tensors = self.work.load_layer(key)
        trellis = tensors["trellis"]
        weights = trellis.shape[0] * trellis.shape[1] * TILE**2
        nbytes = sum(t.nbytes for t in tensors.values()) + self.biases.get(key, 0)
        return StoredLayer(key, layer_bits(trellis), layer_codebook(tensors), weights, nbytes)

    def tensors(self, key: str) -> dict[str, torch.Tensor]:
        return {"weight": decode_layer(self.work.load_layer(key)).T}

    def error(self, key: str) -> float:
        """The proxy error, or without a Hessian that of the weights."""
        with safe_open(self.work.layer_path(key), "pt") as file:
            report = json.loads(file.metadata()["report"])
        proxy = report["proxy_error"]
        return report["weight_error"] if proxy is None else proxy


@dataclass(frozen=True)
class Input:
    """Everything opened and found to fit together."""

    original: StreamedModel
    quants: tuple[QuantLayers, ...]
    rows: torch.Tensor  # int64 (rows, cols)
    hessian_rows: torch.Tensor  # likewise; none with quants
    gradient_rows: torch.Tensor  # likewise, of the same text

    @property
    def arch_string(self) -> str:
        names = self.original.config.architectures
        return names[0] if names else self.original.config.model_type

    def keys_by_block(self) -> list[list[str]]:
        """Linears of every block that are quantized in any of the quants; without quants all."""
        blocks = (self.original.block_linears(i) for i in range(self.original.num_blocks))
        return [[key for key in block if self._measured(key)] for block in blocks]

    def head_key(self) -> str | None:
        """The head, if it is quantized anywhere."""
        key = self.original.head()[0]
        return key if self._measured(key) else None

    def _measured(self, key: str) -> bool:
        return not self.quants or any(quant.quantized(key) for quant in self.quants)


def open_input(request: Request, device: torch.device = CPU) -> Input:
    """Opens and checks everything, for work on a device. UserError for what is wrong."""
    _check_flags(request)
    if _is_quant(request.original):
        raise UserError(f"-r {request.original} is an EXL3 quant; give the original model")
    trust = request.trust_remote_code
    original = open_model(request.original, trust, device=device)
    quants = tuple(QuantLayers(folder, trust, device) for folder in request.quants)
    for quant in quants:
        _refuse_other_model(original, quant)
    _refuse_order(quants)
    if quants:
        _refuse_other_rope(quants)
        original = like_quant(original, quants[0].model, trust)
    found = Input(original, quants, *_rows(request, original))
    _refuse_strangers(found)
    return found


def _check_flags(r: Request) -> None:
    if len(r.quants) == 1:
        raise UserError("-i: give two or more quants of rising bitrate, or leave it out")
    if not r.quants and r.method == "swap":
        raise UserError("--method swap needs quants to swap between; give them with -i")
    for name, value, low in (
        ("-cr", r.rows, 1),
        ("-cc", r.cols, 8),
        ("--hessian_rows", r.hessian_rows, 1),
    ):
        if value < low:
            raise UserError(f"{name} {value}: give at least {low}")
    if not r.max_sys > 0:
        raise UserError(f"-ms {r.max_sys}: give GiB of memory for hidden states")
    read_devices(r.device)
    if not 1 <= r.bits <= 8:
        raise UserError(f"--bits {r.bits} is out of range: 1 to 8")
    if not r.original.is_dir():
        raise UserError(f"-r {r.original} is no folder; give the folder of the original model")
    if len({path.resolve() for path in r.quants}) < len(r.quants):
        raise UserError("-i: the same quant is given twice")


def _is_quant(folder: Path) -> bool:
    config = folder / "config.json"
    found = read_json(config).get("quantization_config") if config.is_file() else None
    return isinstance(found, dict) and found.get("quant_method") == "exl3"


def _refuse_other_model(original: StreamedModel, quant: QuantLayers) -> None:
    """By configs, by shapes, and by norms, which quants keep as they were."""
    other = quant.model
    names = (original.config.architectures, other.config.architectures)
    advice = f"give quants of {original.path}"
    if names[0] != names[1]:
        text = " and ".join(", ".join(name or ["?"]) for name in names)
        raise UserError(f"-r and -i {quant.folder} are different architectures ({text}); {advice}")
    sizes = [
        {key: linear.weight.shape for key, linear in model.linears(head=False).items()}
        for model in (original, other)
    ]
    if sizes[0] != sizes[1]:
        raise UserError(f"-i {quant.folder} has layers of other sizes than -r; {advice}")
    for key in _norms(original, quant.keys):
        a, b = (model.checkpoint.tensor(key).double() for model in (original, other))
        if (a - b).norm() > DIFFERENT * a.norm():
            raise UserError(
                f"-i {quant.folder} is a quant of another model than -r ({key} differs); {advice}"
            )


def _norms(model: StreamedModel, present: set[str]) -> list[str]:
    """Vectors of the first block and of the tail that are present there, but no linear's bias."""
    linears = {f"{key}.bias" for key in model.block_linears(0)} | {f"{model.head()[0]}.bias"}
    keys = [*model.block_keys(0), *model.tail_keys()]
    vectors = [k for k in keys if len(model.checkpoint.shape(k)) == 1]
    return [k for k in vectors if k in present and k not in linears]


def _refuse_order(quants: Sequence[QuantLayers]) -> None:
    for a, b in pairwise(quants):
        bits = [layers.quant.bpw for layers in (a, b)]
        if not bits[0] < bits[1]:
            raise UserError(
                f"-i: give the quants in rising bitrate; {a.folder} has {bits[0]:.2f} bits per "
                f"weight and {b.folder}, which comes after it, {bits[1]:.2f}"
            )


def _refuse_other_rope(quants: Sequence[QuantLayers]) -> None:
    """UserError if there is no one original for all quants."""
    base = quants[0]
    for quant in quants[1:]:
        if rope_parameters(quant.model) != rope_parameters(base.model):
            raise UserError(
                f"-i: {base.folder} and {quant.folder} were made with different rotary embeddings "
                "(-ra, -rs of convert.py); give quants made alike"
            )


def _refuse_strangers(found: Input) -> None:
    """UserError if quants have no quantized layer in common."""
    if not found.quants:
        return
    keys = [key for block in found.keys_by_block() for key in block]
    base = found.quants[0]
    for quant in found.quants[1:]:
        if not any(base.quantized(key) and quant.quantized(key) for key in keys):
            raise UserError(
                f"-i: {base.folder} and {quant.folder} have no quantized layer in common; there "
                "is nothing to choose between"
            )


def _rows(
    request: Request, original: StreamedModel
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows to measure on, to quantize with and for gradients, from all over the text each."""
    text = original.config.get_text_config(decoder=True)
    context = getattr(text, "max_position_embeddings", None)
    if context and request.cols > context:
        raise UserError(
            f"-cc {request.cols}: the model's context is {context} tokens; give shorter rows"
        )
    draw = partial(
        calibration_rows,
        load_tokenizer(request.original, request.trust_remote_code),
        cols=request.cols,
        source=request.text,
        vocab_size=text.vocab_size,
    )
    apart = 0 if request.quants else request.hessian_rows
    wanted = request.rows + apart
    rows = draw(wanted)
    if len(rows) < wanted:
        also = f", and {apart} more to quantize with (--hessian_rows)" if apart else ""
        raise UserError(
            f"-c {request.text.place} holds only {len(rows)} rows of {request.cols} tokens; "
            f"{request.rows} are asked (-cr){also}: give a longer text, or fewer or shorter rows"
        )
    measured = torch.arange(request.rows) * wanted // request.rows
    others = torch.ones(wanted, dtype=torch.bool)
    others[measured] = False
    return rows[measured], rows[others], draw(traced_rows(original, request.cols))


def padded_weights(linear: torch.nn.Linear) -> int:
    """Weights of a linear as they are counted: with their padding."""
    return padded(linear.in_features) * padded(linear.out_features)
