"""Colours and markers of a chart: told apart by people who see few colours, and on both grounds."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """How a group is drawn. The marker tells it apart where colours do not."""

    light: str  # colour on white
    dark: str  # on dark grey
    marker: str


@dataclass(frozen=True)
class Theme:
    """Everything that is not data."""

    dark: bool
    ground: str
    ink: str
    faint: str  # ticks, the reference
    grid: str

    def color(self, style: Style) -> str:
        """A group's colour on this ground."""
        return style.dark if self.dark else style.light


LIGHT = Theme(False, ground="#ffffff", ink="#1b1f24", faint="#5b636d", grid="#e6e8eb")
DARK = Theme(True, ground="#15181d", ink="#e8eaed", faint="#a3abb5", grid="#2b3037")

# Okabe and Ito's colours, some a little darker for lines on white, lighter for dark grey.
BLUE, ORANGE, GREEN = ("#0072b2", "#4ba3e3"), ("#d55e00", "#ff8a4a"), ("#009e73", "#35c795")
PURPLE, AMBER, SKY = ("#b35a90", "#e59ac6"), ("#c98a00", "#f0b93a"), ("#4aa8dc", "#a5dcff")
GREY = ("#6b7178", "#b4bac2")

STYLES = {
    "EXL3": Style(*BLUE, "o"),
    "EXL2": Style(*SKY, "s"),
    "GGUF": Style(*ORANGE, "^"),
    "imat": Style(*AMBER, "v"),
    "AWQ": Style(*GREEN, "D"),
    "GPTQ": Style(*GREY, "P"),
    "QTIP": Style(*PURPLE, "X"),
    "AQLM": Style(*GREEN, "<"),
    "VPTQ": Style(*PURPLE, ">"),
    "BNB": Style(*GREY, "p"),
    "HQQ": Style(*AMBER, "h"),
}


def group_styles(groups: Iterable[str]) -> dict[str, Style]:
    """A style for each group, in the order of a legend: known ones as above, others by name.

    The same groups get the same styles, whatever the order they come in.
    """
    names = set(groups)
    known = {name: style for name, style in STYLES.items() if name in names}
    free = [style for name, style in STYLES.items() if name not in known]
    # Colours that stand in the chart already come last.
    used = {style.light for style in known.values()}
    free.sort(key=lambda style: style.light in used)
    free += STYLES.values()
    others = sorted(names - known.keys())
    return known | {name: free[i % len(free)] for i, name in enumerate(others)}
