"""Charts: what is drawn, where labels stand, what the files are."""

import itertools
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from evaluate_results import ORIGINAL, TWELVE, curve, result

from exl3.errors import UserError
from exl3.evaluate.chart import View, draw_figure
from exl3.evaluate.names import drawn, is_unquantized
from exl3.evaluate.palette import DARK, LIGHT, STYLES, group_styles
from exl3.evaluate.panel import KLD, PPL, by_group
from exl3.evaluate.placement import boxes_overlap, segments_cross, segments_hit_boxes
from exl3.evaluate.plot import SETTINGS, draw_chart, matches

VIEW = View("A title", vram=False, theme=LIGHT, max_x=np.inf, max_y=np.inf)


@pytest.fixture(autouse=True)
def settings():
    with matplotlib.rc_context(SETTINGS):
        yield


def figure(results, *measures, **changes):
    return draw_figure(replace(VIEW, **changes), results, measures or [PPL])


def labels(panel):
    """Texts in a panel and their boxes in pixels, measured anew."""
    texts = [t for t in panel.axes.texts if t.get_text()]
    return texts, np.array([t.get_window_extent().extents for t in texts])


def test_labels_of_a_crowded_chart_cover_nothing():
    _, panels, conflicts = figure([ORIGINAL, *TWELVE], PPL, KLD)
    assert conflicts == 0
    for panel in panels:
        _, boxes = labels(panel)
        assert len(boxes) == 12 + (panel is panels[0])
        assert not np.triu(boxes_overlap(boxes, boxes), 1).any()
        to_pixels = panel.axes.transData.transform
        points = to_pixels([(m.x, m.y) for m in panel.marks])
        assert not boxes_overlap(boxes, np.hstack([points - 5, points + 5])).any()
        lines = [
            [*to_pixels((a.x, a.y)), *to_pixels((b.x, b.y))]
            for _, marks in by_group(panel.marks)
            for a, b in itertools.pairwise(marks)
        ]
        lines += [[*to_pixels((m.x, m.low)), *to_pixels((m.x, m.high))] for m in panel.marks]
        assert not segments_hit_boxes(np.array(lines), boxes).any()
        x0, y0, x1, y1 = panel.axes.bbox.extents
        assert (boxes > (x0, y0, x0, y0)).all() and (boxes < (x1, y1, x1, y1)).all()


def test_more_labels_make_a_larger_chart():
    bits = np.linspace(2, 4, 9).round(3)
    names = {b: f"{b} bpw of a quant" for b in bits}
    crowd = [q for i in range(4) for q in curve(f"group {i}", 1 + i / 10, names)]
    large, (panel,), conflicts = figure(crowd)
    assert conflicts == 0 and len(panel.marks) == 36
    assert large.get_figwidth() > figure(crowd[:3])[0].get_figwidth()


def test_axes_are_logarithmic_when_the_range_asks_for_it():
    wide = curve("EXL3", 1, {float(b): f"{b} bpw" for b in range(1, 9)})
    _, (ppl, kld), _ = figure(wide, PPL, KLD)
    assert (ppl.axes.get_yscale(), kld.axes.get_yscale()) == ("linear", "log")
    kld.axes.figure.canvas.draw()
    ticks = [t.get_text() for t in kld.axes.get_yticklabels()]
    assert "0.001" in ticks and not any("e" in t or "$" in t for t in ticks)
    _, (_, kld), _ = figure(wide[:3], PPL, KLD)
    assert kld.axes.get_yscale() == "linear" and kld.axes.get_ylim()[0] == 0
    # One that is the same as the original has a place, too.
    _, (kld,), conflicts = figure([*wide, result("EXL3 same", bpw=9, kld=0.0)], KLD)
    assert "same (0)" in [t.get_text() for t in labels(kld)[0]] and conflicts == 0


def test_an_original_is_a_line():
    _, (ppl, kld), _ = figure([ORIGINAL, *TWELVE], PPL, KLD)
    assert ppl.lines == [("FP16: 8.12", 8.12)] and not kld.lines
    assert ppl.axes.get_xlim()[1] < 6
    _, (alone,), _ = figure([ORIGINAL])
    assert [m.x for m in alone.marks] == [16]


def test_names():
    assert drawn(result("EXL3 4.00 bpw [mul1, 250 rows]")) == "4.00 bpw"
    assert drawn(result("EXL3")) == "EXL3" and drawn(result("EXL3-4.00")) == "EXL3-4.00"
    assert drawn(result("my own 3 bit", "My own")) == "3 bit"
    assert is_unquantized(result("Original [bf16]")) and is_unquantized(result("x", bpw=16))
    assert not is_unquantized(result("EXL3 8.00 bpw", bpw=8.05))


def test_limits_and_mask(tmp_path):
    _, (panel,), _ = figure([ORIGINAL, *TWELVE], max_x=3.0, max_y=10.5)
    assert [m.label for m in panel.marks] == ["2.26 bpw h6", "2.50 bpw", "Q2_K"]
    assert panel.lines == [("FP16: 8.12", 8.12)]
    assert matches("exl3;awq", "EXL3 4.00 bpw") and not matches("exl3;awq", "GGUF Q4")
    assert matches(None, "x") and matches("", "x")
    with pytest.raises(UserError, match="nothing to show"):
        draw_chart(tmp_path / "a.png", TWELVE, title="t", mask="nobody")
    with pytest.raises(UserError, match="nothing to show"):
        draw_chart(tmp_path / "a.png", [result("x", kld=None)], title="t", ppl=False, kld=True)
    assert not list(tmp_path.iterdir())


def test_what_has_no_number_has_no_place():
    _, panels, _ = figure([*TWELVE[:2], result("x", ppl=float("nan"), kld=None)], PPL, KLD)
    assert [len(panel.marks) for panel in panels] == [2, 2]
    _, panels, _ = figure([result("EXL3 a", kld=None)], PPL, KLD)
    assert len(panels) == 1


def test_groups_keep_their_colours():
    some = group_styles(["zeta", "GGUF", "EXL3", "alpha"])
    assert list(some) == ["EXL3", "GGUF", "alpha", "zeta"]
    assert some["EXL3"] == STYLES["EXL3"]
    assert len({style.light for style in some.values()}) == 4
    assert group_styles(["alpha", "EXL3", "zeta", "GGUF"]) == some
    many = group_styles(f"group {i}" for i in range(30))
    assert len(many) == 30


def test_a_models_own_colour_wins(tmp_path):
    _, (panel,), _ = figure([TWELVE[0], replace(TWELVE[1], color="crimson"), TWELVE[2]])
    blue = STYLES["EXL3"].light
    assert [m.color for m in panel.marks] == [blue, "crimson", blue]
    red = [replace(quant, color="#ff0000") for quant in TWELVE[:2]]
    assert figure(red)[0].legends[0].get_lines()[0].get_color() == "#ff0000"
    _, (panel,), _ = figure(TWELVE[:1], theme=DARK)
    assert panel.marks[0].color == STYLES["EXL3"].dark
    with pytest.raises(UserError, match=r"EXL3 2.26.*no color 'blau'"):
        draw_chart(tmp_path / "a.png", [replace(TWELVE[0], color="blau")], title="t")


def test_files_are_what_they_say(tmp_path):
    for name, magic in {"a.png": b"\x89PNG\r\n", "a.SVG": b"<?xml", "a.pdf": b"%PDF"}.items():
        draw_chart(tmp_path / name, TWELVE, title="100 $ for $ a title", kld=True, vram=True)
        content = (tmp_path / name).read_bytes()
        assert content.startswith(magic) and len(content) > 10_000
    width, height = struct.unpack(">II", (tmp_path / "a.png").read_bytes()[16:24])
    assert width > 2000 and height > 800
    assert {p.name for p in tmp_path.iterdir()} == {"a.png", "a.SVG", "a.pdf"}
    with pytest.raises(UserError, match=r"a\.jpeg.*\.png, \.svg or \.pdf"):
        draw_chart(tmp_path / "a.jpeg", TWELVE, title="t")


@pytest.mark.parametrize("name", ["a.png", "a.svg", "a.pdf"])
def test_the_same_input_gives_the_same_bytes(tmp_path, name):
    contents = set()
    for order in (TWELVE, TWELVE):
        draw_chart(tmp_path / name, order, title="t", dark=True)
        contents.add((tmp_path / name).read_bytes())
    assert len(contents) == 1


def test_needs_no_display(tmp_path):
    code = (
        "import sys; from evaluate_results import TWELVE;"
        "from exl3.evaluate.plot import draw_chart;"
        "assert 'matplotlib' not in sys.modules;"
        "draw_chart('a.png', TWELVE[:3], title='t', show=True)"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    here = Path(__file__).resolve().parent
    env["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent)])
    env["MPLBACKEND"] = "TkAgg"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "a.png").stat().st_size > 10_000
    if sys.platform.startswith("linux"):
        assert run.stdout == "A window cannot be opened (no display); the chart is in a.png\n"


def test_geometry():
    boxes = np.array([[0, 0, 1, 1], [2, 2, 3, 3.0]])
    segments = np.array(
        [[-1, 0.5, 2, 0.5], [0.5, 5, 0.5, -5], [0.2, 0.2, 0.3, 0.3], [1.5, 0, 1.5, 9]]
    )
    hit = segments_hit_boxes(segments, boxes)
    assert hit.tolist() == [[True, False]] * 3 + [[False, False]]
    assert not segments_hit_boxes(segments * np.nan, boxes).any()
    assert boxes_overlap(boxes, boxes + 0.5).tolist() == [[True, False], [False, True]]
    crossings = segments_cross(segments, segments)
    assert crossings[0].tolist() == [False, True, False, True]
