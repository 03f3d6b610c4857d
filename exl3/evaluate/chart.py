"""A figure: title, legend, and a panel for every measure."""

import math
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from exl3.errors import UserError
from exl3.evaluate.names import is_unquantized
from exl3.evaluate.palette import Theme, group_styles
from exl3.evaluate.panel import Content, Look, Measure, Panel, draw_panel, legend_line
from exl3.evaluate.result import Result

DPI = 160
WIDTHS, HEIGHT = {1: 8.8, 2: 14.0}, 5.6  # inches of one and two panels, below title and legend
LEFT, RIGHT, BOTTOM, BETWEEN = 1.0, 0.3, 0.65, 1.1  # inches around the panels
GROWTH = (1, 1.2, 1.45, 1.75, 2.1)  # a crowded chart grows until its labels find room


@dataclass(frozen=True)
class View:
    """What of the results a chart shows, and how."""

    title: str
    vram: bool
    theme: Theme
    max_x: float
    max_y: float

    def x(self, result: Result) -> float:
        """Where a model stands."""
        return result.vram_gb if self.vram else result.storage.layer_bpw

    @property
    def x_name(self) -> str:
        """What that is."""
        return "GiB of decoder and head" if self.vram else "bits per weight of the decoder"


def draw_figure(
    view: View, results: Sequence[Result], measures: Sequence[Measure]
) -> tuple[Any, list[Panel], int]:
    """The figure, as large as its labels want; its panels; how many labels cover something."""
    contents = _contents(view, results, measures)
    for growth in GROWTH:
        figure, panels = _figure(view, contents, growth)
        conflicts = sum(panel.write_labels(figure.canvas.get_renderer()) for panel in panels)
        if not conflicts:
            break
    return figure, panels, conflicts


def _contents(view: View, results: Sequence[Result], measures: Sequence[Measure]) -> list[Content]:
    # On its own an original is a point like others, not a line.
    references = [r for r in results if is_unquantized(r)]
    quants = [r for r in results if not is_unquantized(r)] or references
    references = [r for r in references if r not in quants]
    quants = [r for r in quants if view.x(r) <= view.max_x]
    # NaN and infinity have no place in a chart.
    max_y = min(view.max_y, sys.float_info.max)

    def within(measure: Measure, candidates: Sequence[Result]) -> list[Result]:
        return [r for r in candidates if abs(measure.value(r)) <= max_y]

    contents = [Content(m, within(m, quants), within(m, references)) for m in measures]
    contents = [content for content in contents if content.quants]
    if not contents:
        raise UserError(
            "the chart has nothing to show: no result has such values within -mask, -mx and -my"
        )
    return contents


def _looks(theme: Theme, results: Sequence[Result]) -> dict[str, Look]:
    """Colour and marker of every group; the colour that all its models were given wins."""
    from matplotlib.colors import is_color_like

    given: dict[str, set[str | None]] = {}
    for r in results:
        if r.color is not None and not is_color_like(r.color):
            raise UserError(
                f"{r.label}: there is no color {r.color!r}; write it as #2a7fff or blue"
            )
        given.setdefault(r.group, set()).add(r.color)
    own = {group: next(iter(colors)) for group, colors in given.items() if len(colors) == 1}
    styles = group_styles(given)
    return {g: Look(own.get(g) or theme.color(s), s.marker) for g, s in styles.items()}


def _figure(view: View, contents: Sequence[Content], growth: float) -> tuple[Any, list[Panel]]:
    """Everything but the panels' labels."""
    # No pyplot: it looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    looks = _looks(view.theme, [r for content in contents for r in content.quants])
    width, height = WIDTHS[len(contents)] * growth, HEIGHT * growth
    title = textwrap.fill(view.title, int(width * 7.5))
    title_height = 0.32 + 0.25 * (title.count("\n") + 1) * bool(title)
    columns = max(int((width - LEFT - RIGHT) / (0.09 * max(map(len, looks)) + 0.75)), 1)
    total = height + title_height + 0.05 + 0.25 * math.ceil(len(looks) / columns)
    figure = Figure(figsize=(width, total), dpi=DPI, facecolor=view.theme.ground)
    FigureCanvasAgg(figure)
    font = {"color": view.theme.ink, "fontsize": 14, "fontweight": "bold"}
    figure.text(LEFT / width, 1 - 0.22 / total, title, va="top", **font)
    figure.legend(
        handles=[legend_line(name, look, view.theme) for name, look in looks.items()],
        loc="upper left",
        bbox_to_anchor=(LEFT / width, 1 - title_height / total),
        ncols=columns,
        frameon=False,
        borderaxespad=0,
        borderpad=0,
        fontsize=10,
        labelcolor=view.theme.ink,
    )
    panels = []
    span = (width - LEFT - RIGHT + BETWEEN) / len(contents)
    for i, content in enumerate(contents):
        box = (LEFT + i * span, BOTTOM, span - BETWEEN, height - BOTTOM)
        axes = figure.add_axes([box[0] / width, box[1] / total, box[2] / width, box[3] / total])
        axes.set_xlabel(view.x_name)
        panels.append(draw_panel(axes, content, view.x, looks, view.theme))
    return figure, panels
