"""The main job on a small real model, from nothing to a table and a chart."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from exl3.data.builtin import builtin_texts
from exl3.data.rows import evaluation_rows
from exl3.errors import JobError
from exl3.evaluate.compare import compare
from exl3.evaluate.metrics import Scores
from exl3.evaluate.plot import Point, draw_quants
from exl3.evaluate.table import text_table
from exl3.jobs.source import load_tokenizer

BITS = (4, 3, 2)
ROWS, LENGTH = 32, 512  # of the evaluation
ROOT = Path(__file__).resolve().parents[1]


def demo(model: Path | None, out: Path) -> None:
    """Makes a small model (unless one is given), converts it at 4, 3 and 2 bits, compares.

    Everything is written below `out`; what is there already is not done again.
    """
    if model is None:
        from exl3.demo_model import make_demo_model

        model = out / "pydoc-1m"
        print(f"1. A small language model, trained on Python's documentation: {model}", flush=True)
        make_demo_model(model)
    else:
        print(f"1. The model {model}", flush=True)
    quants = {bits: out / f"{model.resolve().name}-exl3-{bits}.0bpw" for bits in BITS}
    seconds = {}
    print("2. Conversion at 4, 3 and 2 bits", flush=True)
    for bits, quant in quants.items():
        seconds[bits] = _convert(model, quant, out / f"work-{bits}", bits)
    print("3. What each is worth, on text that none of this has seen", flush=True)
    text = "\n\n".join(text for _, text in builtin_texts("prose", held_out=True))
    rows = evaluation_rows(load_tokenizer(model), text, LENGTH, ROWS)
    scores = compare(model, list(quants.values()), rows, quiet=False)
    _show(out, model, quants, scores, seconds)


def _convert(model: Path, quant: Path, work: Path, bits: int) -> float:
    """Runs `exl3 convert` as a user would. Returns its seconds."""
    flags = ["-i", model, "-o", quant, "-w", work, "-b", bits, "-cr", 64, "-cc", 512, "-d", "cpu"]
    command = ["-m", "exl3", "convert", *map(str, flags)]
    print("$ python " + shlex.join(command), flush=True)
    # A clone that is not installed is found from any folder.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    began = time.monotonic()
    if subprocess.run([sys.executable, *command], env=os.environ | {"PYTHONPATH": path}).returncode:
        raise JobError(f"the conversion at {bits} bits failed; its message stands above")
    return time.monotonic() - began


def _show(
    out: Path, model: Path, quants: dict[int, Path], scores: list[Scores], seconds: dict[int, float]
) -> None:
    """Prints the table and draws the chart."""
    header = ("model", "bpw", "MiB", "perplexity", "KLD", "top-1", "seconds")
    table = [(model.resolve().name, "16", _mib(model), f"{scores[0].perplexity:.3f}", "", "", "")]
    points = []
    for (bits, quant), score in zip(quants.items(), scores[1:], strict=True):
        bpw = json.loads((quant / "config.json").read_text())["quantization_config"]["bits"]
        points.append(Point(f"{bpw:.2f}", bpw, score.kld, score.perplexity))
        numbers = (f"{score.perplexity:.3f}", f"{score.kld:.5f}", f"{score.top1:.1%}")
        table.append((quant.name, f"{bpw:.2f}", _mib(quant), *numbers, f"{seconds[bits]:.0f}"))
    chart = out / "chart.png"
    draw_quants(chart, f"EXL3 quants of {model.resolve().name}", points, scores[0].perplexity)
    print()
    print(text_table(header, table))
    print(f"\nKLD: mean KL divergence from the original, in nats a token. Chart: {chart}")


def _mib(folder: Path) -> str:
    return f"{sum(f.stat().st_size for f in folder.glob('*.safetensors')) / 2**20:.2f}"
