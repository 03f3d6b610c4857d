"""One quant put together from the layers of several quants of the same model."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from exl3 import __version__
from exl3.errors import UserError
from exl3.evaluate.storage import BLOCK, HEADS, NOT_TEXT
from exl3.files import write_json
from exl3.format.directory import (
    FORMAT_VERSION,
    StoredModule,
    copy_small_files,
    write_configs,
    write_weights,
)
from exl3.format.layer import LAYER_TENSORS, UNQUANTIZED
from exl3.format.stored_layer import StoredLayer, read_layer
from exl3.groups import kind
from exl3.jobs import out_folder
from exl3.model.checkpoint import Checkpoint, read_json
from exl3.progress import Progress
from exl3.tensor_files import LazyTensor, tensor_bytes

RECORD = "splice.json"  # in the output: where every layer came from
MIXED = "mixed"  # the codebook of a model whose layers have several
# Fields of a config that say nothing about the model.
IRRELEVANT = {"quantization_config", "transformers_version", "_name_or_path", "use_cache"}
EXPERT = re.compile(r"(?<=\.)\d+(?=\.)")


class Quant:
    """An EXL3 folder and what its headers tell. UserError if it is none."""

    def __init__(self, folder: str | Path, flag: str = "-i") -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"{flag} {folder} is no folder; give the folder of an EXL3 quant")
        self.config = read_json(self.folder / "config.json")
        found = self.config.get("quantization_config")
        if not isinstance(found, dict) or found.get("quant_method") != "exl3":
            raise UserError(f"{flag} {folder} is no EXL3 quant; give quants made by convert.py")
        self.quantization = found
        self.tensors = Checkpoint(self.folder)
        self.modules: dict[str, dict[str, str]] = {}  # module → leaf → key
        for key in self.tensors.keys():  # noqa: SIM118
            name, _, leaf = key.rpartition(".")
            self.modules.setdefault(name, {})[leaf] = key
        self.layers = {
            name: self._layer(name) for name, keys in self.modules.items() if "trellis" in keys
        }

    def _layer(self, name: str) -> StoredLayer:
        known = {leaf: k for leaf, k in self.modules[name].items() if leaf in LAYER_TENSORS}
        try:
            return read_layer(self.tensors, name, known)
        except UserError as error:
            raise UserError(f"{self.folder}: {error}") from None

    @property
    def corrected(self) -> bool:
        """Whether its layers make up for the errors of those before them, and so belong behind
        them."""
        producer = self.quantization.get("producer")
        return isinstance(producer, dict) and producer.get("correction") is True

    @cached_property
    def decoder(self) -> tuple[str, ...]:
        """The quantized layers of its blocks."""
        return tuple(name for name in self.layers if in_decoder(name))

    @cached_property
    def bpw(self) -> float:
        """Stored bits a weight of the decoder's quantized layers."""
        layers = [self.layers[name] for name in self.decoder]
        return 8 * sum(x.nbytes for x in layers) / max(1, sum(x.weights for x in layers))

    @cached_property
    def fingerprint(self) -> str:
        return self.tensors.fingerprint()

    def module_bits(self, name: str) -> int:
        """Everything a module is stored as, in bits; 0 if it is not there."""
        return 8 * sum(map(self.tensors.nbytes, self.modules.get(name, {}).values()))

    def k(self, name: str) -> int:
        """Bits of a module's codes; UNQUANTIZED if it is not quantized."""
        return self.layers[name].bits if name in self.layers else UNQUANTIZED

    def head(self) -> str | None:
        """The head's module, None if it is tied and stored with the embedding alone."""
        return next((name for name in self.modules if name.rpartition(".")[2] in HEADS), None)

    @property
    def head_bits(self) -> int:
        head = self.head()
        return UNQUANTIZED if head is None else self.k(head)


def in_decoder(name: str) -> bool:
    """Whether a module is part of a block of the text model."""
    return BLOCK.search(f"{name}.") is not None and not NOT_TEXT.search(name)


# -- Quants that fit together --------------------------------------------------------------------


def refuse_misfits(quants: Sequence[Quant], quiet: bool = False) -> None:
    """UserError unless all are quants of one model: config, layers, and what is not quantized."""
    base = quants[0]
    total = sum(len(quant.modules) for quant in quants[1:])
    with Progress(total, "Comparing the quants", quiet) as progress:
        for other in quants[1:]:
            progress.doing(str(other.folder))
            if not set(base.layers) & set(other.layers):
                raise UserError(
                    f"{base.folder} and {other.folder} have no quantized layer in common; give "
                    "quants of one model"
                )
            _refuse_other_config(base, other)
            heads = {base.head(), other.head()}
            for name in dict.fromkeys((*base.modules, *other.modules)):
                if name not in heads:
                    _refuse_other_module(base, other, name)
                progress.advance(1)


def _refuse_other_config(a: Quant, b: Quant) -> None:
    for field in dict.fromkeys((*a.config, *b.config)):
        if field not in IRRELEVANT and a.config.get(field) != b.config.get(field):
            raise UserError(
                f"{b.folder} is a quant of another model than {a.folder}: {field} of config.json "
                f"is {b.config.get(field)!r:.60} and not {a.config.get(field)!r:.60}"
            )
    sources = [
        q.quantization["producer"].get("source")
        for q in (a, b)
        if isinstance(q.quantization.get("producer"), dict)
    ]
    if len(set(filter(None, sources))) > 1:
        raise UserError(
            f"{b.folder} and {a.folder} were made from different originals, by the hashes in their "
            "config.json; give quants of one model"
        )


def _refuse_other_module(a: Quant, b: Quant, name: str) -> None:
    advice = "give quants of one model"
    for quant, other in ((a, b), (b, a)):
        if name not in quant.modules:
            raise UserError(f"{quant.folder} has no {name}, but {other.folder} has; {advice}")
    layers = [quant.layers.get(name) for quant in (a, b)]
    if all(layers):
        shapes = [q.tensors.shape(f"{name}.trellis")[:2] for q in (a, b)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{name} has other sizes in {b.folder} than in {a.folder}; {advice}")
    if any(layers):
        return
    for leaf in dict.fromkeys((*a.modules[name], *b.modules[name])):
        keys = [quant.modules[name].get(leaf) for quant in (a, b)]
        if None in keys or not _same_tensor(a, b, keys[0]):
            raise UserError(
                f"{name}.{leaf}, which is not quantized, differs between {a.folder} and "
                f"{b.folder}: they are not made from the same model; {advice}"
            )


def _same_tensor(a: Quant, b: Quant, key: str) -> bool:
    if any(getattr(a.tensors, f)(key) != getattr(b.tensors, f)(key) for f in ("shape", "dtype")):
        return False
    return tensor_bytes(a.tensors.tensor(key)) == tensor_bytes(b.tensors.tensor(key))


def refuse_order(quants: Sequence[Quant]) -> None:
    """UserError unless the bitrate rises from quant to quant."""
    for a, b in pairwise(quants):
        if a.bpw >= b.bpw:
            raise UserError(
                f"give the quants in rising bitrate: {a.folder} has {a.bpw:.2f} bits per weight, "
                f"{b.folder}, which comes after it, {b.bpw:.2f}"
            )


# -- The splice ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Splice:
    """Which module comes from which quant; what is not named comes from the first."""

    quants: tuple[Quant, ...]
    origin: Mapping[str, int]

    def home(self, name: str) -> Quant:
        return self.quants[self.origin.get(name, 0)]

    def names(self) -> list[str]:
        """All modules in the order of the first quant; a head that it lacks comes last."""
        base = self.quants[0]
        names = [n for n in base.modules if n in self.home(n).modules]
        return names + [n for n, i in self.origin.items() if i and n not in base.modules]

    @cached_property
    def decoder(self) -> list[str]:
        """Modules of the blocks that are quantized in any of the quants."""
        quantized = set().union(*(quant.layers for quant in self.quants))
        return [name for name in self.names() if name in quantized and in_decoder(name)]

    @cached_property
    def weights(self) -> int:
        """Of the decoder's layers, padded."""
        return sum(self._weights(name) for name in self.decoder)

    @cached_property
    def bits(self) -> int:
        """Everything the decoder's layers are stored as."""
        return sum(self.home(name).module_bits(name) for name in self.decoder)

    @property
    def bpw(self) -> float:
        """Stored bits a weight of the decoder."""
        return self.bits / self.weights

    @property
    def head_bits(self) -> int:
        head = next((name for name in self.names() if name.rpartition(".")[2] in HEADS), None)
        return UNQUANTIZED if head is None else self.home(head).k(head)

    def _weights(self, name: str) -> int:
        return next(q.layers[name].weights for q in self.quants if name in q.layers)

    def stored(self) -> list[StoredModule]:
        """Every module of the output, to be read when its turn comes."""
        return [self._stored(name) for name in self.names()]

    def _stored(self, name: str) -> StoredModule:
        quant = self.home(name)
        tensors = tuple(_lazy(quant.tensors, key) for key in quant.modules[name].values())
        layer = quant.layers.get(name)
        if layer is None:
            return StoredModule(name, tensors)
        return StoredModule(name, tensors, layer.bits, layer.codebook)

    def refuse_mixed_experts(self) -> None:
        """UserError if the experts of one kind of a block differ in K or codebook."""
        first: dict[str, tuple[str, object]] = {}
        for name in self.decoder:
            if not kind(name).startswith("experts."):
                continue
            layer = self.home(name).layers.get(name)
            what = (self.home(name).k(name), layer.codebook if layer else None)
            known, expected = first.setdefault(_kind_of_expert(name), (name, what))
            if what != expected:
                raise UserError(
                    f"{name} would have other bits or another codebook than {known}; readers want "
                    "the experts of one kind of a block alike: take them all from one quant"
                )


def _kind_of_expert(name: str) -> str:
    """What the names of a block's experts of one kind have in common: the last number goes."""
    block = BLOCK.search(f"{name}.").end()
    return name[:block] + EXPERT.sub("*", name[block:])


def _lazy(tensors: Checkpoint, key: str) -> LazyTensor:
    return LazyTensor(key, tensors.shape(key), tensors.dtype(key), lambda: tensors.tensor(key))


def job_id(*parts: object) -> str:
    """The same for every run that must end in the same bytes. parts: what JSON can hold."""
    text = json.dumps([__version__, *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_splice(splice: Splice, out_dir: Path, shard_size: int, job: str, record: dict) -> None:
    """Writes the model folder. record: what RECORD tells besides the layers' origin."""
    splice.refuse_mixed_experts()
    base = splice.quants[0]
    stored = splice.stored()
    folder = out_folder.begin(out_dir, job)
    with Progress(sum(module.nbytes for module in stored), "Writing") as progress:
        progress.doing(str(out_dir))
        write_weights(folder, stored, out_folder.shard_bytes(shard_size), progress.advance)
    config = {k: v for k, v in base.config.items() if k != "quantization_config"}
    write_configs(folder, config, _quantization(splice, stored, job), stored)
    copy_small_files(base.folder, folder)
    write_json(folder / RECORD, _record(splice, record))
    out_folder.finish(folder, out_dir)


def _quantization(splice: Splice, stored: Sequence[StoredModule], job: str) -> dict:
    """The quantization config: what the base's says, and what the splice made of it."""
    base = splice.quants[0].quantization
    codebooks = {module.codebook for module in stored if module.codebook}
    kept = ("calibration", "out_scales", "original_quantization_config")
    return {
        "quant_method": "exl3",
        "version": FORMAT_VERSION,
        "bits": round(splice.bpw, 2),
        "head_bits": splice.head_bits,
        **{name: base[name] for name in kept if name in base},
        "codebook": codebooks.pop() if len(codebooks) == 1 else MIXED,
        "producer": {
            "name": "exl3",
            "version": __version__,
            "job": job,
            "spliced": True,
            "correction": any(quant.corrected for quant in splice.quants),
            "stored_bits": round(splice.bpw, 4),
        },
    }


def _record(splice: Splice, record: dict) -> dict:
    """Where every module came from. Folders by their names alone: paths are private."""
    sources = [
        {"id": i, "name": q.folder.resolve().name, "bpw": q.bpw, "fingerprint": q.fingerprint}
        for i, q in enumerate(splice.quants)
    ]
    layers = {
        name: {"source": splice.origin.get(name, 0), "bits": splice.home(name).k(name)}
        for name in splice.names()
    }
    return {"format": "exl3-splice", "version": 1, **record, "sources": sources, "layers": layers}
