"""Bits for every layer, as a YAML file that optimize.py writes and convert.py converts by."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from exl3.errors import UserError
from exl3.files import atomic_file

FORMAT = "exl3-recipe"
VERSION = 1
CODEBOOKS = ("mul1", "mcg", "3inst")


@dataclass(frozen=True)
class Recipe:
    """What a recipe says."""

    bits: float  # average of the decoder's codes, as `convert.py -b` counts
    layers: Mapping[str, int]  # key of a layer, or glob pattern → K; of several the last counts
    arch: str | None = None
    fingerprint: str | None = None  # of the original
    codebook: str | None = None
    head_bits: int | None = None
    target: float | None = None  # what was asked of optimize.py: bits as stored
    kld: float | None = None  # predicted


def write_recipe(path: Path, recipe: Recipe) -> None:
    """Writes the file, atomically."""
    model = {"arch": recipe.arch, "fingerprint": recipe.fingerprint}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "codebook": recipe.codebook,
        "head_bits": recipe.head_bits,
        "target": recipe.target,
        "bits": recipe.bits,
        "kld": recipe.kld,
        "layers": dict(recipe.layers),
    }
    content = {name: value for name, value in content.items() if value is not None}
    with atomic_file(path) as file:
        file.write(yaml.safe_dump(content, sort_keys=False).encode())


def read_recipe(path: str | Path) -> Recipe:
    """A recipe from its file; UserError for whatever is wrong with it."""
    content = read_yaml(path, "--recipe")
    try:
        return _recipe(content)
    except ValueError as error:
        raise UserError(f"--recipe {path}: {error}; docs/optimize.md shows a recipe") from None


def read_yaml(path: str | Path, flag: str) -> dict[str, Any]:
    """A YAML mapping from a file; UserError if it is anything else."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{flag} {path} does not exist") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        what = " ".join(str(error).split())
        raise UserError(f"{flag} {path} is no YAML file ({what})") from None
    if not isinstance(content, dict):
        raise UserError(f"{flag} {path} is no YAML mapping")
    return content


def _recipe(content: dict[str, Any]) -> Recipe:
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise ValueError(f"format and version must be {FORMAT} and {VERSION}")
    layers = content.get("layers")
    if not isinstance(layers, dict) or not layers:
        raise ValueError("layers is no mapping of keys to bits")
    for key, bits in layers.items():
        if not isinstance(key, str) or type(bits) is not int or not 1 <= bits <= 8:
            raise ValueError(f"layers has {key!r:.80}: {bits!r:.20}, not a key and 1 to 8 bits")
    model = content.get("model", {})
    if not isinstance(model, dict):
        raise ValueError("model is no mapping")
    head = content.get("head_bits")
    if head is not None and (type(head) is not int or head not in (*range(1, 9), 16)):
        raise ValueError(f"head_bits is {head!r:.20}, not 1 to 8 or 16")
    codebook = content.get("codebook")
    if codebook not in (None, *CODEBOOKS):
        raise ValueError(f"codebook is {codebook!r:.20}, not one of {', '.join(CODEBOOKS)}")
    return Recipe(
        _number(content, "bits", 1, 8),
        layers,
        _text(model, "arch"),
        _text(model, "fingerprint"),
        codebook,
        head,
        _number(content, "target", 1, 17, None),
        _number(content, "kld", -math.inf, math.inf, None),
    )


def _number(content: dict, name: str, low: float, high: float, default: Any = ...) -> Any:
    found = content.get(name, default)
    if found is default and default is not ...:
        return default
    if type(found) not in (int, float) or not low <= found <= high:
        raise ValueError(f"{name} is {'missing' if found is ... else f'{found!r:.20}'}")
    return found


def _text(content: dict, name: str) -> str | None:
    found = content.get(name)
    if found is not None and not isinstance(found, str):
        raise ValueError(f"{name} of model is {found!r:.20}")
    return found


def matching(pattern: str, keys: Sequence[str]) -> list[str]:
    """The keys that are a pattern itself or match it as file names match `*`, `?` and `[...]`."""
    return [key for key in keys if key == pattern or fnmatchcase(key, pattern)]


def bits_by_recipe(recipe: Recipe, keys: Sequence[str]) -> dict[str, int]:
    """K of every layer; UserError for layers without bits and for entries without layers."""
    chosen: dict[str, int] = {}
    known = set(keys)
    for pattern, bits in recipe.layers.items():
        found = [pattern] if pattern in known else matching(pattern, keys)
        if not found:
            raise UserError(f"the recipe gives bits to {pattern}, but the model has no such layer")
        chosen |= dict.fromkeys(found, bits)
    if missing := [key for key in keys if key not in chosen]:
        raise UserError(
            f"the recipe gives no bits to {missing[0]} ({len(missing)} layers in all); add them, "
            "or a pattern that matches them"
        )
    return {key: chosen[key] for key in keys}
