"""Results of a comparison as files: JSON, CSV, Markdown."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exl3 import files
from exl3.evaluate.result import Result
from exl3.evaluate.table import markdown_table

DIVERGENCE = ("kld", "kld_ci95", "kld_median", "kld_p90", "kld_p99", "kld_reversed")
COLUMNS = (
    *("label", "group", "layer_bpw", "head_bpw", "layer_gib", "head_gib", "vram_gb"),
    *("directory_bytes", "rows", "ppl", "ppl_error"),
    *DIVERGENCE,
    *(f"top{k}" for k in range(1, 6)),
)


def write_json(path: str | Path, results: Sequence[Result]) -> None:
    """Writes a list of objects; what is not a number is null."""
    files.write_json(Path(path), _finite([result.as_json() for result in results]))


def write_csv(path: str | Path, results: Sequence[Result]) -> None:
    """Writes a line for every model; what is not known is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_finite(_flat(result)) for result in results)
    _write(path, text.getvalue())


def write_markdown(path: str | Path, results: Sequence[Result]) -> None:
    """Writes the table of a model card."""
    _write(path, markdown_table(results) + "\n")


def _flat(result: Result) -> dict[str, Any]:
    line = {**vars(result.storage), "vram_gb": result.vram_gb}
    line |= {key: getattr(result, key) for key in ("label", "group", "rows", "ppl", "ppl_error")}
    if (d := result.divergence) is not None:
        values = (d.mean, d.ci95, d.median, d.p90, d.p99, d.reversed)
        line |= zip(DIVERGENCE, values, strict=True)
        line |= {f"top{k}": share for k, share in enumerate(d.agreement, 1)}
    return line


def _finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: str | Path, text: str) -> None:
    with files.atomic_file(Path(path)) as file:
        file.write(text.encode())
