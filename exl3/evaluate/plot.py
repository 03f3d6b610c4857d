"""Charts of a comparison, drawn without a display."""

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exl3.errors import UserError
from exl3.evaluate.chart import View, draw_figure
from exl3.evaluate.palette import DARK, LIGHT
from exl3.evaluate.panel import KLD, PPL
from exl3.evaluate.result import Result
from exl3.files import atomic_file

# With each format: the metadata that would change from run to run.
FORMATS = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
SETTINGS = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same everywhere
    "text.parse_math": False,  # a $ in a label is a $
    "svg.hashsalt": "exl3",
}


def draw_chart(
    path: str | Path,
    results: Sequence[Result],
    *,
    title: str,
    ppl: bool = True,
    kld: bool = False,
    vram: bool = False,
    max_x: float | None = None,
    max_y: float | None = None,
    mask: str | None = None,
    dark: bool = False,
    show: bool = False,
) -> None:
    """Draws perplexity, KL divergence or both over size: PNG, SVG or PDF, by the path's ending.

    vram: size is GiB of decoder and head, not bits a weight. max_x, max_y: results beyond are not
    drawn. mask: only labels that contain one of these strings, separated by semicolons, are drawn.
    show: opens a window too, where there is a display. The same input gives the same bytes.
    """
    import matplotlib  # here: it takes a second

    path = check_path(path)
    theme = DARK if dark else LIGHT
    limits = (math.inf if limit is None else limit for limit in (max_x, max_y))
    view = View(title, vram, theme, *limits)
    measures = [m for m, wanted in ((PPL, ppl), (KLD, kld)) if wanted]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own styles are for other charts
        matplotlib.rcParams.update(SETTINGS)
        figure, _, _ = draw_figure(view, [r for r in results if matches(mask, r.label)], measures)
        with atomic_file(path) as file:
            kind = path.suffix.lower()
            figure.savefig(file, format=kind[1:], metadata=FORMATS[kind])
    if show:
        _show(path, figure)


def check_path(path: str | Path) -> Path:
    """The path; UserError unless its ending names a format."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path}: the name of a chart must end in .png, .svg or .pdf")
    return path


def matches(mask: str | None, label: str) -> bool:
    """Whether a label contains one of the mask's strings, in any case; without a mask all do."""
    parts = [part.casefold() for part in (mask or "").split(";") if part]
    return not parts or any(part in label.casefold() for part in parts)


def _show(path: Path, figure: Any) -> None:
    """Opens a window with the picture and waits until it is closed."""
    try:
        if not _has_display():
            raise RuntimeError("no display")
        import numpy as np
        from matplotlib import pyplot

        pyplot.switch_backend(pyplot.get_backend())  # now, not later: is there a toolkit?
        if pyplot.get_backend().lower() == "agg":
            raise RuntimeError("no toolkit for windows")
        window = pyplot.figure(figsize=figure.get_size_inches(), dpi=figure.dpi)
        window.figimage(np.asarray(figure.canvas.buffer_rgba()))
        pyplot.show()
    except Exception as error:  # of any toolkit; the chart is safe
        print(f"A window cannot be opened ({error}); the chart is in {path}")


def _has_display() -> bool:
    if not sys.platform.startswith("linux"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
