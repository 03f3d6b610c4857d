"""Whether a folder is a sound EXL3 model: its files, what they say, and what they decode to.

Folders of other programs are welcome. What their readers can do without (a count, a list, a name
in a config) is a problem only where we wrote the folder ourselves; elsewhere it is a note.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from exl3 import parallel
from exl3.errors import UserError
from exl3.format.codebook import CODEBOOKS
from exl3.format.directory import WEIGHT_FILES
from exl3.format.layer import UNQUANTIZED
from exl3.format.manifest import (
    MANIFEST,
    compare_manifest,
    file_bytes,
    file_names,
    read_manifest,
)
from exl3.format.stored_layer import (
    AGAIN,
    StoredLayer,
    count_not_finite,
    decoded_not_finite,
    described,
    read_layer,
)
from exl3.model.checkpoint import Checkpoint, read_json
from exl3.model.quantized import open_model
from exl3.progress import Progress

DETAIL = "quantization_config.json"
SHOWN = 10  # lines of a list of problems
TOLERANCE = 0.02  # of the bits that a config tells
EXPERT = re.compile(r"(.+\.experts)\.\d+\.(.+)")  # a layer of one expert among several
MIXED = "mixed"  # the codebook of a config whose layers have several
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Report:
    """What a check has found. The model is sound if there are no problems."""

    problems: list[str]
    notes: list[str]
    summary: str


def verify(
    folder: str | Path, decode: bool = True, hashes: bool = True, quiet: bool = False
) -> Report:
    """Checks a model folder; `decode` reads every tensor, `hashes` every byte of every file."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is not a folder; give the folder of a model")
    check = _Check(Path(folder), quiet)
    with parallel.one_thread_per_op():
        check.config()
        check.headers()
        check.storage()
        check.other_files()
        check.model()
        check.claims()
        check.experts()
        if decode:
            check.numbers()
        if hashes:
            check.hashes()
    return Report(check.problems, check.notes, check.summary(decode, hashes))


def shortened(lines: list[str], mark: str = "") -> str:
    """The first lines of a list, and how many more there are."""
    more = [f"and {len(lines) - SHOWN:,} more"] if len(lines) > SHOWN else []
    return "\n".join([mark + line for line in lines[:SHOWN]] + more)


def _is_bits(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= UNQUANTIZED


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


# Fields of a quantization config: test, what it must be, whether readers can do without.
FIELDS: dict[str, tuple[Callable[[Any], bool], str, bool]] = {
    "version": (lambda v: isinstance(v, str), "a text", False),
    "bits": (_is_bits, "a number of bits", False),
    "head_bits": (_is_count, "a number of bits", False),
    "calibration": (
        lambda v: isinstance(v, dict) and all(_is_count(v.get(k)) for k in ("rows", "cols")),
        "its rows and cols",
        True,
    ),
    "out_scales": (lambda v: v in ("always", "never", "auto"), "always, never or auto", True),
    "codebook": (lambda v: v in (*CODEBOOKS, MIXED), f"one of {', '.join(CODEBOOKS)}", True),
}


class _Check:
    """One folder and what is known of it so far."""

    def __init__(self, folder: Path, quiet: bool) -> None:
        self.folder, self.quiet = folder, quiet
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.quantization: dict[str, Any] = {}  # of config.json
        self.ours = False  # written by this program
        self.model_type: Any = None
        self.custom_code = False
        self.tensors: Checkpoint | None = None
        self.modules: dict[str, dict[str, str]] = {}  # name → leaf → key
        self.layers: dict[str, StoredLayer] = {}  # the sound ones among them
        self.broken: set[str] = set()  # the others
        self.head: str | None = None
        self.decoder: set[str] = set()  # names of the modules in its blocks

    def claim(self, problem: str) -> None:
        """Something readers can do without is wrong."""
        (self.problems if self.ours else self.notes).append(problem)

    # Each of the following looks at one thing and never raises a UserError.

    def config(self) -> None:
        """config.json has a quantization config with all its fields."""
        config = self._json("config.json")
        if config is None:
            return
        self.custom_code = "auto_map" in config
        self.model_type = config.get("model_type")
        found = config.get("quantization_config")
        if not isinstance(found, dict) or found.get("quant_method") != "exl3":
            method = found.get("quant_method") if isinstance(found, dict) else None
            what = f"the quant_method {method!r:.60}" if method else "no quantization_config"
            self.problems.append(
                f"config.json has {what}, so no program takes this for an EXL3 model; give the "
                f"folder of one, or download config.json again"
            )
            return
        self.quantization = found
        producer = found.get("producer")
        self.ours = isinstance(producer, dict) and producer.get("name") == "exl3"
        for name, (test, kind, dispensable) in FIELDS.items():
            if name not in found or not test(found[name]):
                fault = f"is {found[name]!r:.60}, not {kind}" if name in found else "is missing"
                text = f"config.json: {name} of quantization_config {fault}; download it again"
                tell = self.claim if dispensable else self.problems.append
                tell(text)

    def headers(self) -> None:
        """Every file is whole by its header, and so is every quantized layer."""
        try:
            self.tensors = Checkpoint(self.folder)
        except UserError as error:
            self.problems.append(str(error))
            return
        for key in self.tensors.keys():  # noqa: SIM118
            name, _, leaf = key.rpartition(".")
            self.modules.setdefault(name, {})[leaf] = key
        for name, keys in self.modules.items():
            if not {"trellis", "suh", "svh"}.intersection(keys):
                continue
            try:
                self.layers[name] = read_layer(self.tensors, name, keys)
            except UserError as error:
                self.problems.append(str(error))
                self.broken.add(name)
        if not self.layers and not self.broken:
            self.problems.append(
                f"{self.tensors.files[0]} holds no quantized layer; give the folder of an EXL3 "
                "model"
            )

    def storage(self) -> None:
        """quantization_config.json says what config.json says, and lists what the files hold."""
        if not (self.folder / DETAIL).is_file():
            self.claim(f"{DETAIL} is missing, so nothing tells which tensors belong; {AGAIN}")
            return
        detail = self._json(DETAIL)
        if detail is None:
            return
        storage = detail.pop("tensor_storage", None)
        if self.quantization and detail != self.quantization:
            self.claim(f"{DETAIL} is not the quantization_config of config.json; {AGAIN}")
        if not isinstance(storage, dict):
            self.claim(f"{DETAIL} has no tensor_storage to tell which tensors belong; {AGAIN}")
        elif self.tensors is not None:
            self._compare_modules(storage)
            self._compare_tensors(storage)

    def _compare_modules(self, storage: dict[str, Any]) -> None:
        """Format, K and codebook of the list against those of the files."""
        for name, entry in storage.items():
            if name in self.broken or not isinstance(entry, dict):
                continue
            layer = self.layers.get(name)
            told = {"quant_format": "exl3" if layer else None}
            told["bits_per_weight"] = layer.bits if layer else None
            for book in CODEBOOKS.values():
                if book.multiplier is not None:
                    uses = layer is not None and layer.codebook == book.name
                    told[f"{book.name}_multiplier"] = book.multiplier if uses else None
            for field, value in told.items():
                if entry.get(field) != value:
                    self.problems.append(
                        f"{DETAIL}: {field} of {name} is {entry.get(field)!r:.60}, but by its "
                        f"tensors it is {value!r}; {AGAIN}"
                    )

    def _compare_tensors(self, storage: dict[str, Any]) -> None:
        """The list of tensors against the files."""
        listed: dict[str, Any] = {}
        for name, entry in storage.items():
            stored = entry.get("stored_tensors") if isinstance(entry, dict) else None
            if isinstance(stored, dict):
                listed |= stored
            else:
                self.problems.append(f"{DETAIL}: {name} lists no tensors; {AGAIN}")
        have = set(self.tensors.keys())
        for key, said in listed.items():
            if key not in have:
                self.problems.append(f"{key} is in no file, but {DETAIL} lists it; {AGAIN}")
                continue
            dtype, shape = self.tensors.dtype(key), self.tensors.shape(key)
            n_bytes = self.tensors.nbytes(key)
            found = {"shape": list(shape), "dtype": str(dtype), "n_bytes": n_bytes}
            if not isinstance(said, dict) or any(said.get(k) != v for k, v in found.items()):
                self.problems.append(
                    f"{self.tensors.file(key)}: {key} is {described(dtype, shape)}, {n_bytes:,} "
                    f"bytes, but {DETAIL} lists something else; {AGAIN}"
                )
        for key in sorted(have.difference(listed)):
            self.claim(f"{self.tensors.file(key)}: {key} is not listed in {DETAIL}; {AGAIN}")

    def other_files(self) -> None:
        """No weights but the quant's own; a tokenizer."""
        ours = self.tensors.files if self.tensors else ()
        for path in sorted(self.folder.iterdir()):
            if path.name in ours or path.suffix not in WEIGHT_FILES:
                continue
            text = f"{path.name} holds weights that are no part of the model; remove it"
            if path.suffix != ".safetensors":
                self.claim(text)
            elif self.tensors is not None:  # else nothing tells whose it is
                self.problems.append(text)
        if not any((self.folder / name).is_file() for name in TOKENIZERS):
            self.notes.append(f"there is no tokenizer ({', '.join(TOKENIZERS[:2])}, ...)")

    def model(self) -> None:
        """The tensors are those of the model of config.json, padding apart."""
        self.head = next((n for n in self.layers if n.rpartition(".")[2] == "lm_head"), None)
        self.decoder = set(self.layers) - {self.head}
        if self.problems:  # they would be told once more in other words
            return
        if not isinstance(self.model_type, str) or self.model_type not in CONFIG_MAPPING:
            self.notes.append(
                f"the installed transformers does not know the model type {self.model_type!r:.60} "
                "of config.json, so whether all tensors are there was not checked"
            )
            return
        try:
            model = open_model(self.folder)
        except UserError as error:
            if self.custom_code:
                self.notes.append(f"the model's own code was not run: {error}")
            else:
                self.claim(str(error))
            return
        blocks = [key for i in range(model.num_blocks) for key in model.block_keys(i)]
        self.decoder = {key.rpartition(".")[0] for key in blocks} & self.layers.keys()
        self.head = model.head()[0]

    def claims(self) -> None:
        """Bits and codebook of config.json are those of the layers."""
        if self.broken or not self.layers or self.tensors is None:
            return
        self._check_bits()
        self._check_head()
        codebook = self.quantization.get("codebook")
        for layer in self.layers.values():
            if codebook in list(CODEBOOKS) and layer.codebook != codebook:
                self.claim(
                    f"{self.tensors.file(f'{layer.name}.trellis')}: {layer.name} has the codebook "
                    f"{layer.codebook}, but config.json says {codebook}; {AGAIN}"
                )

    def experts(self) -> None:
        """Experts of one kind in a block have the same K and codebook: readers run them at once."""
        kinds: dict[str, dict[tuple[int, str], str]] = {}  # kind → what is found, and where first
        for name, layer in self.layers.items():
            if match := EXPERT.fullmatch(name):
                kind = f"{match[1]}.*.{match[2]}"
                kinds.setdefault(kind, {}).setdefault((layer.bits, layer.codebook), name)
        for kind, found in kinds.items():
            if len(found) > 1:
                listed = ", ".join(f"{n}: {k} bits {book}" for (k, book), n in found.items())
                self.problems.append(
                    f"the experts {kind} do not have the same bits and codebook ({listed}), and "
                    "readers run them together; convert the model again"
                )

    def _check_head(self) -> None:
        told = self.quantization.get("head_bits")
        if self.head is None or not _is_count(told):
            return
        bits = self.layers[self.head].bits if self.head in self.layers else UNQUANTIZED
        if told != bits:
            self.claim(f"config.json says head_bits {told}, but {self.head} has {bits}; {AGAIN}")

    def _check_bits(self) -> None:
        """A spliced model tells its stored bits, any other those of the codes."""
        told = self.quantization.get("bits")
        if not self.decoder or not _is_bits(told):
            return
        codes, stored = self._average_bits()
        if not any(abs(told - bits) <= TOLERANCE for bits in (codes, stored)):
            self.claim(
                f"config.json says {told} bits, but the decoder's layers have {codes:.2f} "
                f"({stored:.2f} with scales); {AGAIN}"
            )

    def _average_bits(self) -> tuple[float, float]:
        """Bits per weight of the decoder's codes, and of all that is stored for them."""
        layers = [self.layers[name] for name in self.decoder]
        weights = sum(layer.weights for layer in layers)
        codes = sum(layer.bits * layer.weights for layer in layers)
        return codes / weights, 8 * sum(layer.nbytes for layer in layers) / weights

    def numbers(self) -> None:
        """Every stored number, and every weight that layers decode to, is finite."""
        if self.tensors is None:
            return
        total = sum(map(self.tensors.nbytes, self.tensors.keys()))
        with Progress(total, "Decoding", self.quiet) as progress:
            for name, keys in self.modules.items():
                progress.doing(name)
                try:
                    self._check_numbers(name, keys)
                except UserError as error:
                    self.problems.append(str(error))
                progress.advance(sum(map(self.tensors.nbytes, keys.values())))

    def _check_numbers(self, name: str, keys: dict[str, str]) -> None:
        leaves = {leaf: self.tensors.tensor(key) for leaf, key in keys.items()}
        bad = {keys[leaf]: n for leaf, t in leaves.items() if (n := count_not_finite(t))}
        if name in self.layers and not bad and (n := decoded_not_finite(leaves)):
            bad = {f"{name}, decoded,": n}
        for what, n in bad.items():
            home = self.tensors.file(next(iter(keys.values())))
            self.problems.append(f"{home}: {what} has {n:,} numbers that are not finite; {AGAIN}")

    def hashes(self) -> None:
        """Every file is, byte for byte, the one that was published."""
        if not (self.folder / MANIFEST).is_file():
            self.notes.append(f"there is no {MANIFEST}, so the bytes of the files were not checked")
            return
        try:
            sums = read_manifest(self.folder)
        except UserError as error:
            self.problems.append(str(error))
            return
        with Progress(file_bytes(self.folder), "Hashing", self.quiet) as progress:
            progress.doing("all files")
            self.problems += compare_manifest(self.folder, sums, progress.advance)
        if others := [name for name in file_names(self.folder) if name not in sums]:
            listed = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            self.notes.append(f"{MANIFEST} does not list {listed}")

    def summary(self, decode: bool, hashes: bool) -> str:
        """One line about a sound model."""
        if self.problems:
            return f"{self.folder}: {len(self.problems)} problems"
        keys = list(self.tensors.keys())
        bits = f"{self._average_bits()[0]:.2f} bits per weight" if self.decoder else "no decoder"
        head = f", head {self.layers[self.head].bits}" if self.head in self.layers else ""
        books = "/".join(sorted({layer.codebook for layer in self.layers.values()}))
        size = sum(map(self.tensors.nbytes, keys)) / 2**20
        skipped = [] if decode else ["decoded"]
        skipped += [] if hashes else ["hashed"]
        return (
            f"{self.folder} is sound: {len(keys)} tensors, {len(self.layers)} quantized layers, "
            f"{bits}{head}, {books}, {size:,.1f} MiB"
            + (f" (not {' and not '.join(skipped)})" if skipped else "")
        )

    def _json(self, name: str) -> dict[str, Any] | None:
        try:
            return read_json(self.folder / name)
        except UserError as error:
            self.problems.append(str(error))
            return None
