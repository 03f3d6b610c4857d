"""A measurement in words: every group, whether their effects add up, and what comes next."""

import math
from collections.abc import Sequence
from pathlib import Path

from exl3.measurement import Candidate, MeasuredGroup, Measurement

WIDTH = 100
Column = list[str]  # title, then a cell for each group


def report(m: Measurement, path: Path) -> str:
    """Table, sums and the next step, at most WIDTH columns wide but for paths."""
    return "\n".join(["", *table(m), "", *sums(m), "", *_next_step(m, path)])


def table(m: Measurement) -> list[str]:
    """A line a group; what does not fit is left out, errors of candidates first."""
    groups = [*m.groups, *([m.head] if m.head else [])]
    base = [_column("group", map(_name, groups)), _column("bits", (_ks(g.k) for g in groups))]
    if m.method == "isolate":
        base.append(_column("KLD", (_number(g.kld) for g in groups)))
        base.append(_column("±", (_number(g.kld_error) for g in groups)))
        base.append(_column("error", (_number(g.error) for g in groups)))
    alts = [[g.candidates[q] for g in groups] for q in range(len(m.alts))]
    for with_errors, count in [(True, len(alts)), *((False, n) for n in range(len(alts), -1, -1))]:
        more = [c for alt in alts[:count] for c in _candidate_columns(alt, with_errors)]
        lines = _lines([*base, *more])
        if len(lines[0]) <= WIDTH:
            break
    return lines if count == len(alts) else [*lines, "(the file has the rest)"]


def _candidate_columns(alt: Sequence[Candidate], with_errors: bool) -> list[Column]:
    columns = [
        _column("to", (_ks(c.k) for c in alt)),
        _column("dKLD", (_number(c.dkld) for c in alt)),
    ]
    if with_errors:
        columns.append(_column("±", (_number(c.dkld_error) for c in alt)))
    return columns


def _column(title: str, cells: object) -> Column:
    return [title, *cells]


def _lines(columns: Sequence[Column]) -> list[str]:
    widths = [max(map(len, column)) for column in columns]
    first, *others = (
        [cell.ljust(w) if i == 0 else cell.rjust(w) for cell in column]
        for i, (column, w) in enumerate(zip(columns, widths, strict=True))
    )
    return ["  ".join(cells) for cells in zip(first, *others, strict=True)]


def _name(g: MeasuredGroup) -> str:
    return g.name if g.block is None else f"{g.block} {g.name}"


def _ks(k: tuple[int, ...]) -> str:
    return "/".join(map(str, k)) or "-"


def _number(x: float | None) -> str:
    return "-" if x is None or not math.isfinite(x) else f"{x:.2e}"


def sums(m: Measurement) -> list[str]:
    """What the groups' numbers promise together beside what whole quants have: nearly the same
    where effects add up."""
    parts = [*m.groups, *([m.head] if m.head else [])]
    if not m.has_quants:
        total = sum(g.kld for g in parts)
        return [f"Sum over all groups: {total:.5f}"]
    lines = []
    for q, alt in enumerate(m.alts):
        gain = sum(g.candidates[q].dkld for g in parts)
        if m.method == "isolate":
            lines.append((alt, sum(g.kld for g in parts) + gain))
        else:
            lines.append((alt, m.base.kld + gain))
    if m.method == "isolate":
        lines.insert(0, (m.base, sum(g.kld for g in parts)))
    word = "its groups' together" if m.method == "isolate" else "base with all groups' gains"
    return [
        f"{quant.dir} ({quant.bpw:.2f} bpw): KLD {quant.kld:.5f} ± {quant.kld_error or 0:.5f}, "
        f"{word} {total:.5f} ({total / quant.kld:.2f} times)"
        for quant, total in lines
    ]


def _next_step(m: Measurement, path: Path) -> list[str]:
    if m.has_quants:
        command = f"python util/optimize.py -m {path} -r {m.model.dir} -o OUT -b BITS"
        what = "splices the best of these quants for a size"
    else:
        command = f"python convert.py -m {path} -i {m.model.dir} -o OUT -w WORK -b BITS"
        what = "converts with the best bits for every group"
    return [f"Wrote {path}. Next,", f"  {command}", what]
