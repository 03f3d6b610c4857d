"""Tables of a comparison: aligned text for a terminal, Markdown for a model card."""

import math
from collections import Counter
from collections.abc import Sequence

from exl3.evaluate.names import is_unquantized, shown
from exl3.evaluate.result import Result

WIDTH = 120  # characters of a terminal
NONE = "-"
COLUMNS = ("bpw", "head", "GiB", "ppl", "KLD", "median", "p90", "p99", "reverse", "top-1", "top-5")
NOTE = """\
GiB: decoder and head. ppl: ± standard error. KLD: KL divergence from the original, nats a token;
mean ± 95%, median, percentiles; reverse: seen from the quant. top-k: same k likeliest tokens."""


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first to the left, numbers to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def text(line: Sequence[str]) -> str:
        first = line[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        return "  ".join((first, *rest)).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([text(header), rule, *map(text, rows)])


def result_table(results: Sequence[Result]) -> str:
    """All that is known of the models, in at most 120 columns.

    A label that leaves no room for its numbers stands on a line of its own, above them.
    """
    digits = _digits(results)
    rows = [_cells(result, digits) for result in results]
    room = WIDTH - len(text_table(("", *COLUMNS), [("", *row) for row in rows]).splitlines()[1])
    long = {result.label for result in results if len(result.label) > room}
    labels = ["" if result.label in long else result.label for result in results]
    lines = [(label, *row) for label, row in zip(labels, rows, strict=True)]
    header, rule, *numbers = text_table(("label", *COLUMNS), lines).splitlines()
    table = [header, rule]
    for result, line in zip(results, numbers, strict=True):
        table += [result.label, line] if result.label in long else [line]
    return "\n".join(table)


def print_table(results: Sequence[Result]) -> None:
    """Shows the table and what its columns are."""
    print(result_table(results))
    print(NOTE)


def markdown_table(results: Sequence[Result]) -> str:
    """For a model card. A size is that of the folder: what there is to download."""
    lines = ["| Quant | Size | KLD | PPL |", "|:--|--:|--:|--:|"]
    for result, name in zip(results, _names(results), strict=True):
        kld = math.nan if result.divergence is None else result.divergence.mean
        size, kld = _size(result.storage.directory_bytes), number(kld, _digits([result]))
        lines.append(f"| {name} | {size} | {kld} | {number(result.ppl, 3)} |")
    return "\n".join(lines)


def number(value: float, decimals: int) -> str:
    """A number with that many decimals; a dash for one that is not known."""
    if math.isnan(value):
        return NONE
    if abs(value) >= 1e5:
        return f"{value:.3g}"
    return f"{value:.{decimals if abs(value) < 1000 else 1}f}"


def _cells(result: Result, digits: int) -> tuple[str, ...]:
    storage, divergence = result.storage, result.divergence
    cells = (
        number(storage.layer_bpw, 2),
        number(storage.head_bpw, 2),
        number(result.vram_gb, 2 if result.vram_gb >= 1 else 4),
        _with_error(result.ppl, result.ppl_error, 3),
    )
    if divergence is None:
        return (*cells, *[NONE] * (len(COLUMNS) - len(cells)))
    d = divergence
    spread = (number(value, digits) for value in (d.median, d.p90, d.p99, d.reversed))
    top = (f"{share:.1%}" for share in (d.agreement[0], d.agreement[4]))
    return (*cells, _with_error(d.mean, d.ci95, digits), *spread, *top)


def _with_error(value: float, error: float, decimals: int) -> str:
    return f"{number(value, decimals)} ±{number(error, decimals)}"


def _digits(results: Sequence[Result]) -> int:
    """Decimals of divergences: two digits of the smallest mean, if they are to be had.

    An original's own divergence is nothing but rounding, and wants no digits.
    """
    means = [r.divergence.mean for r in results if r.divergence is not None]
    smallest = min((mean for mean in means if 1e-5 < mean < math.inf), default=1)
    return min(max(1 - math.floor(math.log10(smallest)), 4), 6)


def _size(count: int) -> str:
    """Bytes in the unit of model cards, or a smaller one for toys."""
    return f"{count / 2**30:.3f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.3f} MiB"


def _names(results: Sequence[Result]) -> list[str]:
    """What models are called in a card: `4.00 bpw h6`, with more where that is not enough."""
    several = len({r.group for r in results if not is_unquantized(r)}) > 1
    names = [_name(result, several) for result in results]
    count = Counter(names)
    for i, result in enumerate(results):
        if count[names[i]] > 1:
            names[i] = f"{result.label}, {_bits(result)}"
    return [name.replace("|", "\\|") for name in names]


def _name(result: Result, several: bool) -> str:
    label = shown(result.label)
    if is_unquantized(result):
        return label
    if not several:
        return _bits(result)
    return f"{result.group if 'bpw' in label.casefold() else label} {_bits(result)}"


def _bits(result: Result) -> str:
    head = result.storage.head_bpw
    return f"{result.storage.layer_bpw:.2f} bpw" + (f" h{round(head)}" if head > 0 else "")
