"""A splice by hand: layers of a base replaced by those of other quants, as a YAML file says.

    sources:
      - {id: big, model_dir: /models/quant-4.0bpw}
    overrides:
      - {key: "*.down_proj", source: big}
      - {key: "model.layers.0.*", source: big}

The layout is exllamav3's; of several overrides of a layer the last counts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exl3 import parallel
from exl3.errors import UserError
from exl3.jobs import out_folder
from exl3.jobs.splice_check import notes_of
from exl3.recipe import matching, read_yaml
from exl3.splice import Quant, Splice, job_id, refuse_misfits, write_splice


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    base: Path
    out: Path
    overrides: Path
    shard_size: int = 8192  # MiB


def recompile(request: Request) -> None:
    """Writes the splice. UserError for bad input."""
    with parallel.one_thread_per_op():
        content = read_yaml(request.overrides, "-or")
        sources = _sources(request, content)
        out_folder.refuse_strangers(request.out)
        out_folder.refuse_overlap(request.out, [request.base, *sources.values()])
        quants = (Quant(request.base), *(Quant(path, "-or:") for path in sources.values()))
        refuse_misfits(quants)
        origin = _origin(request, content, quants, {id_: i for i, id_ in enumerate(sources, 1)})
        splice = Splice(quants, origin)
        splice.refuse_mixed_experts()
        job = job_id("recompile", [quant.fingerprint for quant in quants], origin)
        if out_folder.is_complete(request.out, job):
            print(f"{request.out} is complete already")
            return
        with notes_of(request.out):  # keeps a second process out
            write_splice(splice, request.out, request.shard_size, job, {})
        print(
            f"Wrote {request.out}: {splice.bpw:.3f} bits per weight as stored, "
            f"{len(origin)} modules not from {request.base}, head {splice.head_bits}"
        )


def _sources(request: Request, content: dict[str, Any]) -> dict[str, Path]:
    """The folders by their ids. Paths are those of the command line's folder."""
    found: dict[str, Path] = {}
    for entry in _entries(request, content, "sources", ("id", "model_dir")):
        name, folder = str(entry["id"]), entry["model_dir"]
        if name in found:
            raise UserError(f"-or {request.overrides}: two sources have the id {name}")
        if not isinstance(folder, str) or "\0" in folder:
            raise UserError(f"-or {request.overrides}: model_dir of {name} is no path")
        found[name] = Path(folder).expanduser()
    return found


def _origin(
    request: Request, content: dict[str, Any], quants: tuple[Quant, ...], numbers: dict[str, int]
) -> dict[str, int]:
    """The number of the quant of every layer that is not the base's."""
    layers = dict.fromkeys(name for quant in quants for name in quant.layers)
    origin: dict[str, int] = {}
    for entry in _entries(request, content, "overrides", ("key", "source")):
        pattern, source = str(entry["key"]), str(entry["source"])
        if source not in numbers:
            raise UserError(
                f"-or {request.overrides}: {pattern} wants the source {source}, "
                "which is not among the sources"
            )
        found = matching(pattern, list(layers))
        if not found:
            raise UserError(
                f"-or {request.overrides}: {pattern} matches no quantized layer of {request.base}"
            )
        if lacking := [name for name in found if name not in quants[numbers[source]].modules]:
            raise UserError(f"-or {request.overrides}: the source {source} has no {lacking[0]}")
        origin |= dict.fromkeys(found, numbers[source])
    return origin


def _entries(
    request: Request, content: dict[str, Any], name: str, fields: tuple[str, str]
) -> list[dict[str, Any]]:
    """A list of mappings that have the fields."""
    entries = content.get(name)
    if not isinstance(entries, list) or not entries:
        raise UserError(f"-or {request.overrides}: {name} is no list, or empty")
    for entry in entries:
        if not isinstance(entry, dict) or any(entry.get(field) is None for field in fields):
            raise UserError(
                f"-or {request.overrides}: an entry of {name} lacks {' or '.join(fields)}: "
                f"{entry!r:.80}"
            )
    return entries
