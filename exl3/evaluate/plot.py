"""Charts, drawn without a display."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exl3.files import atomic_file


@dataclass(frozen=True)
class Point:
    """A quant in a chart."""

    label: str
    bits: float  # per weight
    kld: float
    perplexity: float


def draw_quants(path: Path, title: str, points: Sequence[Point], original_ppl: float) -> None:
    """KL divergence and perplexity over bits per weight, side by side, as a PNG."""
    # Here: importing matplotlib takes a second. No pyplot: it looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    figure.suptitle(title)
    _panel(left, points, [p.kld for p in points], "KL divergence from the original (nats)")
    left.set_yscale("log")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(NullFormatter())
    _panel(right, points, [p.perplexity for p in points], "perplexity")
    right.axhline(original_ppl, color="#888", linestyle="--", linewidth=1)
    right.annotate(
        "original",
        (0.99, original_ppl),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        color="#666",
    )
    with atomic_file(path) as file:
        figure.savefig(file, format="png")


def _panel(axes: object, points: Sequence[Point], values: list[float], name: str) -> None:
    bits = [p.bits for p in points]
    axes.plot(bits, values, color="#1f6fb4", marker="o", markersize=6)
    for point, value in zip(points, values, strict=True):
        axes.annotate(point.label, (point.bits, value), xytext=(6, 6), textcoords="offset points")
    axes.set_xlabel("bits per weight")
    axes.set_ylabel(name)
    axes.margins(x=0.18, y=0.15)
    axes.grid(True, color="#ddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
