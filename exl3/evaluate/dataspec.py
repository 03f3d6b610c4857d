"""A dataset spec: a JSON file that says on which rows of tokens models are compared.

{"tokenize_fn": "transformers", "tokenizer_dir": "/models/Llama-3.2-1B", "dataset": "wiki2",
 "eval_stride": 512, "eval_len": 2048, "max_rows": 20}
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from exl3.data.rows import evaluation_rows
from exl3.data.texts import READERS, read_dataset, read_texts
from exl3.data.tokenizer import load_tokenizer
from exl3.errors import UserError
from exl3.evaluate.cache import cache_folder
from exl3.tensor_files import LazyTensor, write_safetensors

# name in users' files: (dataset on the hub, split, name of a local copy)
KNOWN_DATASETS = {
    "wiki2": ("Salesforce/wikitext:wikitext-2-raw-v1", "test", "wiki.test.txt"),
    "wikitext2": ("Salesforce/wikitext:wikitext-2-raw-v1", "test", "wiki.test.txt"),
}
ENGINES = ("exllamav2", "exllamav3", "llamacpp", "anyprecision", "qtip")  # of users' model specs
# Other spellings of a key, as exllamav3's users have them.
SPELLINGS = {"dataset_name": "config", "dataset_split": "split", "text_column": "column"}
# Keys of exllamav3's scripts that would change the rows or what is counted.
NOT_DONE = ("chat_template", "warmup_tokens", "max_text_rows", "max_dataset_rows")
TOKENIZER_FILES = (".json", ".txt", ".model", ".tiktoken", ".py", ".jinja")


@dataclass(frozen=True)
class Key:
    """What a key of the file must be. least: of a number."""

    kind: type
    meaning: str
    required: bool = True
    least: int = 1


KEYS = {
    "tokenize_fn": Key(str, 'what tokenizes: "transformers"'),
    "tokenizer_dir": Key(str, "the folder of the tokenizer, such as the original model's"),
    "dataset": Key(str, '"wiki2", a .txt, .jsonl or .parquet file, or the name of a dataset'),
    "eval_stride": Key(int, "the tokens from the start of a row to that of the next"),
    "eval_len": Key(int, "the tokens of a row", least=2),  # perplexity needs one that follows
    "max_rows": Key(int, "the largest number of rows; 0: all", required=False, least=0),
    "config": Key(str, "the configuration of a dataset", required=False),
    "split": Key(str, "the split of a dataset", required=False),
    "column": Key(str, "the column of a dataset that holds the texts", required=False),
}


@dataclass(frozen=True)
class DataSpec:
    """A checked dataset spec. notes: lines to tell the user about it."""

    file: Path
    tokenizer_dir: Path
    dataset: str  # a name, or the path of a file or folder that is there
    eval_stride: int  # tokens
    eval_len: int  # tokens
    max_rows: int | None = None  # None: all that the text holds
    config: str | None = None  # of a dataset by name, as the next two
    split: str = "test"
    column: str | None = None
    notes: tuple[str, ...] = ()

    def rows(self, trust_remote_code: bool = False) -> torch.Tensor:
        """Token ids, int64 (rows, eval_len): tokenized once, then from the cache.

        Raises UserError for a text that is missing, empty or too short, and for a tokenizer that
        cannot be loaded.
        """
        text = self._text()
        kept = cache_folder() / "tokens" / f"{self._key(text, trust_remote_code)}.safetensors"
        rows = _read_rows(kept)
        if rows is None:
            rows = self._tokenized(text, trust_remote_code)
            _keep_rows(kept, rows)
        return rows

    def _text(self) -> str:
        """The whole text: documents with a blank line between them."""
        if self.dataset in KNOWN_DATASETS:
            return "\n\n".join(self._known_dataset(*KNOWN_DATASETS[self.dataset]))
        name = f"{self.dataset}:{self.config}" if self.config else self.dataset
        try:
            if Path(self.dataset).is_file():
                return "\n\n".join(read_texts(self.dataset))
            return "\n\n".join(read_dataset(name, self.split, self.column))
        except UserError as error:
            raise UserError(f"{self.file}: dataset: {error}") from error

    def _known_dataset(self, place: str, split: str, copy: str) -> list[str]:
        try:
            return read_dataset(place, split, "text")
        except UserError as error:
            cause = error.__cause__ or error
            reason = next(iter(str(cause).splitlines()), type(cause).__name__)
            raise UserError(
                f"{self.file}: dataset: {self.dataset} could not be loaded from the hub "
                f'({reason}); offline, give a local copy of it: "dataset": "path/to/{copy}"'
            ) from error

    def _tokenized(self, text: str, trust_remote_code: bool) -> torch.Tensor:
        try:
            tokenizer = load_tokenizer(self.tokenizer_dir, trust_remote_code)
        except UserError as error:
            raise UserError(f"{self.file}: tokenizer_dir: {error}") from error
        try:
            return evaluation_rows(tokenizer, text, self.eval_len, self.max_rows, self.eval_stride)
        except UserError as error:
            raise UserError(f"{self.file}: eval_len: {error}") from error

    def _key(self, text: str, trust_remote_code: bool) -> str:
        """What the rows depend on, as sha256 (hex)."""
        digest = hashlib.sha256()
        numbers = [self.eval_stride, self.eval_len, self.max_rows, trust_remote_code]
        digest.update(json.dumps([transformers.__version__, *numbers]).encode())
        for path in sorted(self.tokenizer_dir.iterdir()):
            if path.suffix in TOKENIZER_FILES and path.is_file():
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f"{path.name} {content}\n".encode())
        digest.update(text.encode())
        return digest.hexdigest()


def load_dataspec(path: str | Path) -> DataSpec:
    """Reads and checks a spec. UserError, one sentence with file and key, for what is wrong."""
    path = Path(path)
    raw = {SPELLINGS.get(key, key): value for key, value in _read_object(path).items()}
    values = {key: _value(path, raw, key) for key in KEYS}
    given = {key: value for key, value in values.items() if value is not None}
    _check_tokenizer(path, given.pop("tokenize_fn"))
    given["tokenizer_dir"] = _tokenizer_dir(path, given["tokenizer_dir"])
    given["dataset"] = _dataset(path, given["dataset"])
    given["max_rows"] = given.get("max_rows") or None  # 0: all of them, too
    return DataSpec(path, **given, notes=_notes(path, raw))


def check_context(spec: DataSpec, config: PreTrainedConfig) -> None:
    """UserError if the rows are longer than what the model was made for."""
    context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context and spec.eval_len > context:
        raise UserError(
            f"{spec.file}: eval_len: rows of {spec.eval_len} tokens are longer than the context "
            f"of {config.name_or_path or 'the model'}, {context} tokens (max_position_embeddings "
            "in its config.json); make them shorter"
        )


# Reading and checking


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; give a dataset spec (JSON)") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); check commas and quotes") from None
    if isinstance(value, list):
        raise UserError(
            f"{path}: a list, as model specs are; a dataset spec is one object, with the keys "
            f"{', '.join(name for name, key in KEYS.items() if key.required)}"
        )
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object, as a dataset spec must be")
    return value


def _value(path: Path, raw: dict[str, Any], name: str) -> str | int | None:
    """The value of a key; None for one that is missing and may be."""
    key, value = KEYS[name], raw.get(name)
    if value is None and not key.required:
        return None
    if value is None:
        raise UserError(f"{path}: {name} is missing; it is {key.meaning}")
    if type(value) is not key.kind:  # not isinstance: true is no number
        wanted = "a whole number" if key.kind is int else "a text in quotes"
        raise UserError(f"{path}: {name} is {json.dumps(value)}, but must be {wanted}")
    if key.kind is int and value < key.least:
        raise UserError(f"{path}: {name} is {value}, but must be at least {key.least}")
    if key.kind is str and not value.strip():
        raise UserError(f"{path}: {name} is empty; it is {key.meaning}")
    return value


def _check_tokenizer(path: Path, name: str) -> None:
    if name == "transformers":
        return
    if name in ENGINES:
        raise UserError(
            f"{path}: tokenize_fn: {name} is an engine that runs models; rows are tokenized by "
            'the original model\'s tokenizer: "tokenize_fn": "transformers"'
        )
    raise UserError(
        f'{path}: tokenize_fn: {name} is not known; "transformers" is, for any tokenizer that '
        "transformers loads"
    )


def _tokenizer_dir(path: Path, name: str) -> Path:
    found = _find(path, name, Path.is_dir)
    if found is None:
        raise UserError(
            f"{path}: tokenizer_dir: there is no folder {name}, neither beside the spec nor in "
            "the current folder; give that of the original model"
        )
    return found


def _dataset(path: Path, name: str) -> str:
    """The path of what is on the disk, else the name as it is."""
    if name in KNOWN_DATASETS:
        return name
    found = _find(path, name, Path.exists)
    if found is not None:
        return str(found)
    if Path(name).suffix.lower() in READERS or name.startswith((".", "/", "~")):
        raise UserError(
            f"{path}: dataset: there is no file {name}, neither beside the spec nor in the "
            "current folder"
        )
    return name


def _find(spec: Path, name: str, there: Callable[[Path], bool]) -> Path | None:
    """What a path in a spec means: beside the spec, else in the current folder."""
    own = Path(name).expanduser()
    return next((place for place in (spec.parent / own, own) if there(place)), None)


def _notes(path: Path, raw: dict[str, Any]) -> tuple[str, ...]:
    """A line for what is left aside."""
    differing = [key for key in NOT_DONE if raw.get(key)]
    unknown = [key for key in raw if key not in KEYS and key not in NOT_DONE]
    lines = []
    if differing:
        lines.append(
            f"Warning: {path}: {', '.join(differing)}: not done here, so the numbers are not "
            "those of scripts that do it"
        )
    if unknown:
        lines.append(f"{path}: {', '.join(unknown)}: not known here, and ignored")
    return tuple(lines)


# The cache


def _read_rows(path: Path) -> torch.Tensor | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("rows")
    except (OSError, SafetensorError):
        return None  # made again


def _keep_rows(path: Path, rows: torch.Tensor) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(path, [LazyTensor.of("rows", rows)])
    except OSError:
        pass  # a full disk, a home that cannot be written: it works without
