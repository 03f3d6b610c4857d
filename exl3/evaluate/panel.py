"""One panel of a chart: a measure over size, a line a group, labels that cover nothing."""

import itertools
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from exl3.evaluate.names import drawn
from exl3.evaluate.palette import Theme
from exl3.evaluate.placement import Scene, along, around, place
from exl3.evaluate.result import Result

LOG_RATIO = 20  # largest over smallest value, from which an axis is logarithmic
MARKER = 6.5  # points across
LABEL_SIZE = 8.5
WRAP = 30  # characters of a label in a line
AIR = 2.5  # points around a label that stay free


@dataclass(frozen=True)
class Measure:
    """What a panel shows of a model."""

    name: str
    value: Callable[[Result], float]  # NaN where it is not known
    error: Callable[[Result], float]
    from_zero: bool  # a linear axis starts there
    references: bool  # lines for models that are not quantized


PPL = Measure(
    "perplexity, ± standard error",
    lambda r: r.ppl,
    lambda r: r.ppl_error,
    from_zero=False,
    references=True,
)
KLD = Measure(
    "KL divergence from the original (nats), ± 95%",
    lambda r: math.nan if r.divergence is None else r.divergence.mean,
    lambda r: math.nan if r.divergence is None else r.divergence.ci95,
    from_zero=True,
    references=False,
)


@dataclass(frozen=True)
class Content:
    """What stands in a panel."""

    measure: Measure
    quants: list[Result]
    references: list[Result]


@dataclass(frozen=True)
class Look:
    """How a group is drawn in this chart."""

    color: str
    marker: str


@dataclass(frozen=True)
class Mark:
    """A model in a panel."""

    label: str
    group: str
    x: float
    y: float
    low: float  # ends of its error bar
    high: float
    color: str


@dataclass(frozen=True)
class Panel:
    """What is drawn in one panel, and where labels are wanted."""

    axes: Any
    marks: list[Mark]
    lines: list[tuple[str, float]]  # of references: text and height
    theme: Theme

    def write_labels(self, renderer: Any) -> int:
        """Writes all labels; the layout must be final. Returns how many found no free place."""
        texts = [self._text(text, self.theme.faint) for text, _ in self.lines]
        texts += [self._text(m.label, _between(m.color, self.theme.ink)) for m in self.marks]
        sizes = [self._size(text, renderer) for text in texts]
        scene, heights = self._scene(), self._heights()
        left, _, right, _ = scene.bounds
        gap = scene.radius + AIR
        choices = [
            along(y, left, right, size, gap) for y, size in zip(heights, sizes, strict=False)
        ]
        of_points = zip(scene.points, sizes[len(heights) :], strict=True)
        choices += [around(point, size, scene.radius) for point, size in of_points]
        places = place(choices, scene)
        for text, found in zip(texts, places, strict=True):
            text.xyann = tuple(found.box[:2] + AIR)
            if found.leader is not None:
                self._leader(found.leader, text.get_color())
        return sum(found.conflict for found in places)

    def _text(self, text: str, color: Any) -> Any:
        """A label whose lower left corner is given in points from the axes' lower left corner."""
        return self.axes.annotate(
            text,
            (0, 0),
            xycoords="axes points",
            ha="left",
            va="bottom",
            color=color,
            fontsize=LABEL_SIZE,
            annotation_clip=False,
            zorder=5,
        )

    def _leader(self, ends: np.ndarray, color: Any) -> None:
        line = {"arrowstyle": "-", "color": color, "alpha": 0.6, "lw": 0.7}
        self.axes.annotate(
            "",
            ends[:2],
            ends[2:],
            xycoords="axes points",
            textcoords="axes points",
            annotation_clip=False,
            arrowprops=line | {"shrinkA": 0, "shrinkB": 0},
            zorder=4,
        )

    def _size(self, text: Any, renderer: Any) -> tuple[float, float]:
        box = text.get_window_extent(renderer)
        scale = 72 / self.axes.figure.dpi
        return box.width * scale + 2 * AIR, box.height * scale + 2 * AIR

    def _scene(self) -> Scene:
        to_points = self._to_points
        lines = [
            [*to_points(a.x, a.y), *to_points(b.x, b.y)]
            for _, marks in by_group(self.marks)
            for a, b in itertools.pairwise(marks)
        ]
        lines += [[*to_points(m.x, m.low), *to_points(m.x, m.high)] for m in self.marks]
        width, height = self._extent()
        lines += [[0, y, width, y] for y in self._heights()]
        points = np.array([to_points(m.x, m.y) for m in self.marks]).reshape(-1, 2)
        bounds = (2.0, 2.0, width - 2, height - 2)
        return Scene(bounds, points, MARKER / 2 + 1, np.array(lines).reshape(-1, 4))

    def _to_points(self, x: float, y: float) -> np.ndarray:
        corner = self.axes.transAxes.transform((0, 0))
        return (self.axes.transData.transform((x, y)) - corner) * (72 / self.axes.figure.dpi)

    def _extent(self) -> np.ndarray:
        low, high = self.axes.transAxes.transform([(0, 0), (1, 1)])
        return (high - low) * (72 / self.axes.figure.dpi)

    def _heights(self) -> list[float]:
        return [self._to_points(0, y)[1] for _, y in self.lines]


def draw_panel(
    axes: Any,
    content: Content,
    x_of: Callable[[Result], float],
    looks: dict[str, Look],
    theme: Theme,
) -> Panel:
    """Axes, lines, error bars and points; labels are left to the panel that is returned."""
    measure = content.measure
    marks = [_mark(r, measure, x_of(r), looks[r.group]) for r in content.quants]
    lines = []
    if measure.references:
        lines = [(drawn(r), measure.value(r)) for r in content.references]
    axes.set_ylabel(measure.name)
    _scale_x(axes, [m.x for m in marks])
    _scale_y(axes, measure, marks, [y for _, y in lines])
    _dress(axes, theme)
    if axes.get_yscale() == "log":
        marks = [_above_floor(m, *axes.get_ylim()) for m in marks]
    for _, y in lines:
        axes.axhline(y, color=theme.faint, linestyle=(0, (5, 4)), linewidth=1, zorder=1.5)
    for group, members in by_group(marks):
        _draw_group(axes, members, looks[group], theme)
    return Panel(axes, marks, [(f"{text}: {y:.4g}", y) for text, y in lines], theme)


def legend_line(group: str, look: Look, theme: Theme) -> Any:
    """A group's entry in the legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=group, color=look.color, linewidth=1.5, **_marker(look, theme))


def by_group(marks: Sequence[Mark]) -> list[tuple[str, list[Mark]]]:
    """Marks of each group, from left to right."""
    names = dict.fromkeys(m.group for m in marks)
    ordered = sorted(marks, key=lambda m: (m.x, m.y, m.label))
    return [(name, [m for m in ordered if m.group == name]) for name in names]


def _mark(result: Result, measure: Measure, x: float, look: Look) -> Mark:
    y, error = measure.value(result), measure.error(result)
    error = error if math.isfinite(error) else 0.0
    label = _wrapped(drawn(result))
    return Mark(label, result.group, x, y, y - error, y + error, result.color or look.color)


def _wrapped(text: str) -> str:
    """A long label in lines of about the same length."""
    width = WRAP
    count = len(textwrap.wrap(text, width))
    while len(textwrap.wrap(text, width - 1)) == count and width > 8:
        width -= 1
    return textwrap.fill(text, width)


def _above_floor(mark: Mark, floor: float, top: float) -> Mark:
    """A mark on a logarithmic axis. One at zero stands just above the floor, and says so."""
    if mark.y > 0:
        return replace(mark, low=max(mark.low, floor))
    y = floor * (top / floor) ** 0.03
    return replace(mark, label=f"{mark.label} (0)", y=y, low=y, high=y)


def _draw_group(axes: Any, marks: list[Mark], look: Look, theme: Theme) -> None:
    xs, ys = [m.x for m in marks], [m.y for m in marks]
    axes.plot(xs, ys, color=look.color, linewidth=1.5, alpha=0.7, zorder=2)
    for m in marks:
        if m.high > m.low:
            axes.plot([m.x, m.x], [m.low, m.high], color=m.color, linewidth=1.5, zorder=2.5)
        axes.plot(m.x, m.y, color=m.color, zorder=3, **_marker(look, theme))


def _marker(look: Look, theme: Theme) -> dict[str, Any]:
    return {
        "marker": look.marker,
        "markersize": MARKER,
        "markeredgecolor": theme.ground,
        "markeredgewidth": 0.8,
    }


def _scale_y(axes: Any, measure: Measure, marks: list[Mark], lines: list[float]) -> None:
    """Chooses scale and limits, with room for labels."""
    values = [m.y for m in marks] + lines
    positive = [v for v in values if v > 0]
    high = max([*values, *(m.high for m in marks)])
    if positive and max(positive) > LOG_RATIO * min(positive):
        _log_scale(axes, min(positive), high, zeros=len(positive) < len(values))
        return
    if measure.from_zero:
        axes.set_ylim(0, 1.14 * high or 1.0)
    else:
        low, high = _widened(min([*values, *(m.low for m in marks)]), high, 0.03)
        axes.set_ylim(low - 0.1 * (high - low), high + 0.14 * (high - low))
    _linear_ticks(axes.yaxis, 8)


def _log_scale(axes: Any, low: float, high: float, zeros: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    decades = math.log10(high / low)
    below = 0.1 * decades + (0.4 if zeros else 0)
    axes.set_yscale("log")
    axes.set_ylim(low / 10**below, high * 10 ** (0.12 * decades))
    subs = (1, 2, 5) if decades < 3.5 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=50))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def _linear_ticks(axis: Any, count: int) -> None:
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    axis.set_major_locator(MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]))
    formatter = ScalarFormatter(useOffset=False)
    formatter.set_scientific(False)
    axis.set_major_formatter(formatter)


def _scale_x(axes: Any, values: list[float]) -> None:
    low, high = _widened(min(values), max(values), 0.3)
    axes.set_xlim(max(low - 0.12 * (high - low), 0), high + 0.16 * (high - low))
    _linear_ticks(axes.xaxis, 9)


def _widened(low: float, high: float, share: float) -> tuple[float, float]:
    """A range no narrower than a share of its end: a single point is not all there is to see."""
    missing = max(share * high - (high - low), 0) / 2
    return low - missing, high + missing


def _dress(axes: Any, theme: Theme) -> None:
    axes.set_facecolor(theme.ground)
    axes.grid(True, color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.faint, length=0, labelsize=9.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.faint)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=theme.ink, fontsize=10.5)


def plain(value: float) -> str:
    """A number without exponent or trailing zeros."""
    return f"{value:.12f}".rstrip("0").rstrip(".")


def _between(color: str, ink: str) -> tuple[float, ...]:
    """A colour between two: a label's, near its point's and easy to read."""
    from matplotlib.colors import to_rgb

    return tuple((a + b) / 2 for a, b in zip(to_rgb(color), to_rgb(ink), strict=True))
