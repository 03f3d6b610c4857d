"""The main job on a small real model, from nothing to a table and a chart."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from exl3.errors import JobError, UserError
from exl3.evaluate.plot import draw_chart
from exl3.evaluate.result import Result
from exl3.evaluate.table import text_table
from exl3.files import atomic_file, write_json
from exl3.jobs.compare import Request, compare_models
from exl3.jobs.perplexity import held_out_texts

BITS = (4, 3, 2)
ROWS, LENGTH = 32, 512  # of the evaluation
ROOT = Path(__file__).resolve().parents[1]


def demo(model: Path | None, out: Path) -> None:
    """Makes a small model (unless one is given), converts it at 4, 3 and 2 bits, compares.

    Everything is written below `out`; what is there already is not done again.
    """
    _refuse_other_folders(out)
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
    data, models = _write_specs(out, model, quants)
    chart = out / "chart.png"
    flags = ["-d", data, "-m", models, "-p", "-kld", "-o", chart, "-dev", "cpu"]
    print("$ python -m exl3 compare " + shlex.join(map(str, flags)), flush=True)
    results = compare_models(Request(data, (str(models),), device="cpu", reference_rows=0))
    title = f"EXL3 quants of {model.resolve().name}"
    draw_chart(chart, results, title=title, ppl=True, kld=True)
    _show(results, {_label(bits): took for bits, took in seconds.items()})
    print(f"KLD: mean KL divergence from the original, in nats a token. Chart: {chart}")


def _refuse_other_folders(out: Path) -> None:
    """UserError if the folder holds what no demo of ours has made."""
    mark = out / ".exl3-demo"
    if not mark.exists() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"-o {out} is there already; give a new or an empty folder")
    out.mkdir(parents=True, exist_ok=True)
    mark.touch()


def _write_specs(out: Path, model: Path, quants: dict[int, Path]) -> tuple[Path, Path]:
    """Spec files of the comparison, as a user would write them. Returns both paths."""
    text = out / "heldout.txt"
    with atomic_file(text) as file:
        file.write("\n\n".join(held_out_texts()).encode())
    data = {
        "tokenize_fn": "transformers",
        "tokenizer_dir": str(model.resolve()),
        "dataset": text.name,
        "eval_stride": LENGTH,
        "eval_len": LENGTH,
        "max_rows": ROWS,
    }
    entry = {"load_fn": "exl3", "fwd_fn": "exl3"}
    original = {"label": model.resolve().name, "group": "original", "out_logits": "logits"}
    models = [{**entry, **original, "model_dir": str(model.resolve())}]
    for bits, quant in quants.items():
        models.append({**entry, "label": _label(bits), "model_dir": str(quant.resolve())})
    (out / "logits").mkdir(exist_ok=True)
    paths = (out / "data.json", out / "models.json")
    for path, content in zip(paths, (data, models), strict=True):
        write_json(path, content)
    return paths


def _label(bits: int) -> str:
    return f"EXL3 {bits}.0 bpw"


def _convert(model: Path, quant: Path, work: Path, bits: int) -> float | None:
    """Runs `exl3 convert` as a user would. Returns its seconds, None if it was done before."""
    fresh = not quant.exists()
    flags = ["-i", model, "-o", quant, "-w", work, "-b", bits, "-cr", 64, "-cc", 512, "-d", "cpu"]
    command = ["-m", "exl3", "convert", *map(str, flags)]
    print("$ python " + shlex.join(command), flush=True)
    # A clone that is not installed is found from any folder.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    began = time.monotonic()
    if subprocess.run([sys.executable, *command], env=os.environ | {"PYTHONPATH": path}).returncode:
        raise JobError(f"the conversion at {bits} bits failed; its message stands above")
    return time.monotonic() - began if fresh else None


def _show(results: list[Result], seconds: dict[str, float | None]) -> None:
    """Prints the table, with the seconds that conversions took in this run."""
    header = ("model", "bpw", "head", "MiB", "perplexity", "KLD", "top-1", "seconds")
    table = []
    for r in results:
        took = seconds.get(r.label)
        table.append(
            (
                r.label,
                f"{r.storage.layer_bpw:.2f}",
                f"{r.storage.head_bpw:.2f}",
                f"{r.storage.directory_bytes / 2**20:.2f}",
                f"{r.ppl:.3f} ± {r.ppl_error:.3f}",
                f"{r.divergence.mean:.5f} ± {r.divergence.ci95:.5f}",
                f"{r.divergence.agreement[0]:.1%}",
                f"{took:.0f}" if took else "",
            )
        )
    print(f"\n{text_table(header, table)}\n")
