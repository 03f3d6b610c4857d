"""What the bits of each group of modules are worth: the JSON that measure.py writes and
optimize.py and convert.py read. docs/optimize.md describes the fields.

Files of exllamav3's own measure.py are read too: they are swaps, and what they do not tell
(errors, weights, which model) is None.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from exl3 import __version__
from exl3.errors import UserError
from exl3.files import write_json

FORMAT = "exl3-measurement"
VERSION = 1
METHODS = ("isolate", "swap")


@dataclass(frozen=True)
class Quant:
    """A quant that was measured as a whole."""

    dir: str | None  # None: there is no quant, groups were quantized by themselves
    bpw: float | None  # as stored, of the decoder
    kld: float | None = None  # KL divergence from the original, mean per token, in nats
    kld_error: float | None = None  # its standard error


@dataclass(frozen=True)
class Candidate:
    """A group's tensors of another quant in the place of the base's."""

    dkld: float  # KLD with them minus KLD with the base's: negative is better
    dbits: int  # 8 * (their bytes - those of the base's)
    dkld_error: float | None = None  # standard error of dkld
    error: float | None = None  # relative squared error of these layers
    k: tuple[int, ...] = ()  # K of the layers, each number once


@dataclass(frozen=True)
class Part:
    """A tensor of a group, or its experts of one kind, and what gradients say of it."""

    name: str
    layers: tuple[str, ...]
    weights: int  # padded
    share: float  # of the group's KLD at equal relative errors; 1 in all
    bits: tuple[int, ...]  # 8 * bytes in the base and in every alternative quant
    k: tuple[tuple[int, ...], ...]  # likewise


@dataclass(frozen=True)
class MeasuredGroup:
    """Modules that get their bits together."""

    idx: int
    layers: tuple[str, ...]
    candidates: tuple[Candidate, ...]  # one for each alternative quant
    block: int | None = None  # None: the head
    name: str = ""
    weights: int | None = None  # padded
    kld: float | None = None  # isolate: of the base's tensors in the original model
    kld_error: float | None = None
    bits: int | None = None  # 8 * bytes of the base's tensors
    k: tuple[int, ...] = ()  # K of the layers in the base; 16: not quantized
    error: float | None = None  # relative squared error of the base's layers
    parts: tuple[Part, ...] = ()  # none: not known, or the group is a single part
    sensitivity: float | None = None  # by gradients: KLD per unit of relative squared error


@dataclass(frozen=True)
class Original:
    """The model that all was measured against."""

    dir: str | None = None
    fingerprint: str | None = None
    codebook: str | None = None  # of the quants, None where they differ


@dataclass(frozen=True)
class Rows:
    """The text it was measured on."""

    rows: int
    cols: int
    hash: str
    source: str


@dataclass(frozen=True)
class Measurement:
    """A whole measurement."""

    arch_string: str
    base: Quant
    alts: tuple[Quant, ...]
    groups: tuple[MeasuredGroup, ...]
    head: MeasuredGroup | None = None
    method: str = "swap"
    level: int | None = None
    model: Original = field(default_factory=Original)
    rows: Rows | None = None
    complete: bool = True
    base_kld: float | None = None  # = base.kld, where exllamav3 has it
    job: str | None = None  # a hash of all that the numbers depend on

    @property
    def has_quants(self) -> bool:
        """Whether there are quants to splice."""
        return self.base.dir is not None

    @property
    def layers(self) -> tuple[str, ...]:
        """Keys of all of the decoder's layers, by group."""
        return tuple(key for group in self.groups for key in group.layers)

    def to_json(self) -> dict[str, Any]:
        """The object for the file."""
        producer = {"name": "exl3", "version": __version__}
        order = ("arch_string", "method", "level", "model", "rows", "job", "complete")
        order += ("base", "alts")
        content = asdict(self)
        rest = {name: content[name] for name in (*order, "base_kld", "groups", "head")}
        return {"format": FORMAT, "version": VERSION, "producer": producer} | rest

    @staticmethod
    def from_json(content: object) -> "Measurement":
        """The measurement of a parsed file; ValueError says what is wrong with it."""
        return _read(_Object(content, "the file"))


def write_measurement(path: Path, measurement: Measurement) -> None:
    """Writes the file, atomically."""
    write_json(path, measurement.to_json())


def read_measurement(path: str | Path, partial: bool = False) -> Measurement:
    """A measurement from its file; UserError if it is damaged or, without `partial`, not
    finished."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        found = Measurement.from_json(json.loads(text))
    except FileNotFoundError:
        raise UserError(f"-m {path} does not exist; make it with util/measure.py") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"-m {path} is no whole measurement ({error}); make it again with util/measure.py"
        ) from None
    if not (found.complete or partial):
        raise UserError(
            f"-m {path} is not finished; run the same measure.py command again, it goes on where "
            "it was"
        )
    return found


# -- Reading what may be damaged -----------------------------------------------------------------


class _Object:
    """A JSON object and where it stands in the file."""

    def __init__(self, content: object, where: str) -> None:
        if not isinstance(content, dict):
            raise ValueError(f"{where} is no JSON object")
        self.content, self.where = content, where

    def value(self, name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        """A field of a type; the default where it is missing or null, if there is one."""
        found = self.content.get(name)
        if found is None and default is not ...:
            return default
        right = isinstance(found, kind) and (kind is bool or not isinstance(found, bool))
        if not right or (isinstance(found, float) and not math.isfinite(found)):
            what = "missing" if name not in self.content else f"{found!r:.40}"
            raise ValueError(f"{name} of {self.where} is {what}")
        return found

    def number(self, name: str, default: Any = ..., least: float = -math.inf) -> Any:
        found = self.value(name, (int, float), default)
        if found is not None and found < least:
            raise ValueError(f"{name} of {self.where} is {found}")
        return found

    def whole(self, name: str, default: Any = ..., least: int | None = None) -> Any:
        found = self.value(name, int, default)
        if found is not None and least is not None and found < least:
            raise ValueError(f"{name} of {self.where} is {found}")
        return found

    def text(self, name: str, default: Any = ...) -> Any:
        return self.value(name, str, default)

    def items(self, name: str, kind: type, default: Any = ...) -> tuple:
        found = self.value(name, (list, tuple), default)
        if not all(isinstance(item, kind) and not isinstance(item, bool) for item in found):
            raise ValueError(f"{name} of {self.where} holds something else than expected")
        return tuple(found)

    def object(self, name: str) -> "_Object | None":
        """An object, None where it is missing or null."""
        found = self.content.get(name)
        return None if found is None else _Object(found, f"{name} of {self.where}")

    def objects(self, name: str, default: Any = ...) -> "list[_Object]":
        found = self.value(name, (list, tuple), default)
        return [_Object(item, f"{name}[{i}] of {self.where}") for i, item in enumerate(found)]


def _read(o: _Object) -> Measurement:
    own = o.text("format", None) is not None
    if own and (o.text("format") != FORMAT or o.whole("version") != VERSION):
        raise ValueError(f"its format is {o.text('format')!r:.40} {o.content.get('version')!r:.10}")
    method = o.text("method", "swap")
    if method not in METHODS:
        raise ValueError(f"method is {method!r:.40}")
    alts = tuple(_quant(alt) for alt in o.objects("alts"))
    base = o.object("base")
    if base is None:
        raise ValueError("base is missing")
    head = o.object("head")
    found = Measurement(
        arch_string=o.text("arch_string"),
        base=_quant(base),
        alts=alts,
        groups=tuple(_group(group) for group in o.objects("groups")),
        head=None if head is None else _group(head),
        method=method,
        level=o.whole("level", None),
        model=_original(o.object("model")),
        rows=_rows(o.object("rows")),
        complete=o.value("complete", bool, not own),
        base_kld=o.number("base_kld", None, least=0),
        job=o.text("job", None),
    )
    _check(found, own)
    return found


def _quant(o: _Object) -> Quant:
    return Quant(
        o.text("dir", None),
        o.number("bpw", None, least=0),
        o.number("kld", None, least=0),
        o.number("kld_error", None, least=0),
    )


def _original(o: _Object | None) -> Original:
    if o is None:
        return Original()
    return Original(o.text("dir", None), o.text("fingerprint", None), o.text("codebook", None))


def _rows(o: _Object | None) -> Rows | None:
    if o is None:
        return None
    return Rows(o.whole("rows"), o.whole("cols"), o.text("hash"), o.text("source"))


def _group(o: _Object) -> MeasuredGroup:
    group = MeasuredGroup(
        idx=o.whole("idx"),
        layers=o.items("layers", str),
        candidates=tuple(_candidate(c) for c in o.objects("candidates")),
        block=o.whole("block", None, least=0),
        name=o.text("name", ""),
        weights=o.whole("weights", None, least=1),
        kld=o.number("kld", None),
        kld_error=o.number("kld_error", None, least=0),
        bits=o.whole("bits", None, least=1),
        k=_ks(o),
        error=o.number("error", None, least=0),
        parts=tuple(_part(part) for part in o.objects("parts", [])),
        sensitivity=o.number("sensitivity", None, least=0),
    )
    if not group.layers:
        raise ValueError(f"layers of {o.where} is empty")
    if group.parts:
        keys = [key for part in group.parts for key in part.layers]
        if sorted(keys) != sorted(group.layers) or not sum(part.share for part in group.parts) > 0:
            raise ValueError(f"parts of {o.where} are not those of its layers")
    return group


def _part(o: _Object) -> Part:
    part = Part(
        name=o.text("name"),
        layers=o.items("layers", str),
        weights=o.whole("weights", least=1),
        share=o.number("share", least=0),
        bits=o.items("bits", int),
        k=tuple(_known_ks(k, o.where) for k in o.items("k", list)),
    )
    if not (part.layers and len(part.bits) == len(part.k) and all(part.k) and min(part.bits) > 0):
        raise ValueError(f"{o.where} is no whole part")
    return part


def _candidate(o: _Object) -> Candidate:
    return Candidate(
        dkld=o.number("dkld"),
        dbits=o.whole("dbits"),
        dkld_error=o.number("dkld_error", None, least=0),
        error=o.number("error", None, least=0),
        k=_ks(o),
    )


def _ks(o: _Object) -> tuple[int, ...]:
    return _known_ks(o.items("k", int, []), o.where)


def _known_ks(found: Sequence[object], where: str) -> tuple[int, ...]:
    if not all(type(k) is int and (1 <= k <= 8 or k == 16) for k in found):
        raise ValueError(f"k of {where} is no list of numbers from 1 to 8, or 16")
    return tuple(found)


def _check(found: Measurement, own: bool) -> None:
    """ValueError if the parts of a finished measurement do not fit together."""
    keys = found.layers
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice} is in two groups")
    if not found.complete:
        return
    if not found.groups:
        raise ValueError("groups is empty")
    for group in found.groups:
        if len(group.candidates) != len(found.alts):
            raise ValueError(
                f"group {group.idx} has {len(group.candidates)} candidates for "
                f"{len(found.alts)} quants"
            )
        if any(len(part.k) != 1 + len(found.alts) for part in group.parts):
            raise ValueError(f"parts of group {group.idx} are of another number of quants")
        needed = ("weights", "kld", "bits") if own and found.method == "isolate" else ()
        for name in needed:
            if getattr(group, name) is None:
                raise ValueError(f"{name} of group {group.idx} is missing")
