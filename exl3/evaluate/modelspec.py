"""Which models are compared: JSON lists as users of exllamav3's compare_q.py have them."""

import glob
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exl3.errors import UserError

NEEDED = ("load_fn", "label", "model_dir")
KNOWN = (
    *NEEDED,
    "fwd_fn",
    "out_logits",
    "group",
    "color",
    "override_bpw_layer",
    "override_bpw_head",
    "override_vram_bits",
)
# In the order in which a label is searched for them; the first found names the group.
GROUPS = ("EXL3", "EXL2", "imat", "GGUF", "AWQ", "GPTQ", "QTIP", "AQLM", "VPTQ", "BNB", "HQQ")


@dataclass(frozen=True)
class ModelSpec:
    """One model of a comparison."""

    file: str  # the spec file, for messages
    load_fn: str  # the engine
    label: str
    model_dir: str | list[str]  # a folder, a GGUF file, or several folders of shards
    group: str
    color: str | None = None
    out_logits: str | None = None  # a folder: this model is the reference
    overrides: tuple[tuple[str, float], ...] = ()  # of what is measured from the files

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.file}: {self.label}"


def load_modelspecs(patterns: Sequence[str], mask: str | None = None) -> list[ModelSpec]:
    """All models of the spec files, which may be named with wildcards; the reference comes first.

    mask: keep labels that contain one of these strings, separated by semicolons. UserError for
    files and entries that cannot be used, naming file and key.
    """
    specs = [spec for path in _files(patterns) for spec in _load(path)]
    if mask:
        parts = [part.upper() for part in mask.split(";") if part]
        specs = [s for s in specs if s.out_logits or any(p in s.label.upper() for p in parts)]
        if not specs:
            raise UserError(f"-mask {mask}: no label of the model specs contains that")
    references = [spec for spec in specs if spec.out_logits]
    if len(references) > 1:
        both = " and ".join(spec.where for spec in references[:2])
        raise UserError(f"{both}: both have out_logits; only one model can be the reference")
    return references + [spec for spec in specs if not spec.out_logits]


def _files(patterns: Sequence[str]) -> list[Path]:
    found = []
    for pattern in patterns:
        matches = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
        if not matches:
            raise UserError(f"-m {pattern}: no file matches")
        found += [Path(match) for match in matches]
    return found


def _load(path: Path) -> list[ModelSpec]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"-m {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    entries = [content] if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} must be a list of models, each an object with {_list(NEEDED)}")
    return [_spec(path, number, entry) for number, entry in enumerate(entries, 1)]


def _spec(path: Path, number: int, entry: Any) -> ModelSpec:
    where = f"{path}, model {number}"
    if not isinstance(entry, dict):
        raise UserError(f"{where}: not an object with {_list(NEEDED)}")
    for key in NEEDED:
        if key not in entry:
            raise UserError(f"{where}: the key {key} is missing")
    for key in entry:
        if key not in KNOWN:
            raise UserError(f"{where}: the key {key} is not known; there are {_list(KNOWN)}")
    for key in ("load_fn", "label", "group", "color", "out_logits"):
        if entry.get(key) is not None and not isinstance(entry[key], str):
            raise UserError(f"{where}: {key} must be a text, not {entry[key]!r}")
    if entry.get("color") and not _is_color(entry["color"]):
        raise UserError(f"{where}: color {entry['color']!r} is none; write it as #2a7fff or blue")
    overrides = tuple((k, v) for k, v in entry.items() if k.startswith("override_"))
    for key, value in overrides:
        if type(value) not in (int, float):
            raise UserError(f"{where}: {key} must be a number, not {value!r}")
    return ModelSpec(
        str(path),
        entry["load_fn"],
        entry["label"],
        _places(path, where, entry["model_dir"]),
        entry.get("group") or _group(entry["label"]),
        entry.get("color"),
        _resolved(path, entry["out_logits"]) if entry.get("out_logits") else None,
        overrides,
    )


def _places(path: Path, where: str, value: Any) -> str | list[str]:
    places = [value] if isinstance(value, str) else value
    if not isinstance(places, list) or not places or not all(isinstance(p, str) for p in places):
        raise UserError(f"{where}: model_dir must be a folder or a list of folders")
    found = [_resolved(path, place) for place in places]
    for place in found:
        if not Path(place).exists():
            raise UserError(f"{where}: model_dir {place} does not exist")
    return found[0] if isinstance(value, str) else found


def _resolved(spec: Path, place: str) -> str:
    """A path seen from the spec file, or else from the current folder."""
    beside = spec.parent / Path(place).expanduser()
    return str(beside if beside.exists() else Path(place).expanduser())


def _is_color(text: str) -> bool:
    from matplotlib.colors import is_color_like  # here: it takes a second

    return is_color_like(text)


def _group(label: str) -> str:
    upper = label.upper()
    return next((name for name in GROUPS if name.upper() in upper), "other")


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)
