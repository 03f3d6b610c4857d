#!/usr/bin/env python3
"""What each part of a conversion is worth: KLD of quants made with and without it.

    python bench/fidelity.py MODEL --text TRAIN --judge TEXT --out results.json
        [--bits 2 3 4] [--variants baseline both] [--seeds 3] [--chart fidelity.png] [--table]

TEXT must not be part of TRAIN. Every result goes to the JSON as it comes; what is there already is
not made again, so that the study can be stopped and go on (bench/results has what docs/fidelity.md
tells). Prints a table: mean KLD over the seeds, its 95% interval (bootstrap over evaluation rows),
the ratio to the baseline, CPU seconds. A GPU's quants (`-d`) are as good and not the same: they
want a file of their own.
"""

import argparse
import contextlib
import io
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from exl3.data.rows import evaluation_rows
from exl3.data.tokenizer import load_tokenizer
from exl3.devices import pick_device
from exl3.evaluate.metrics import row_kld
from exl3.evaluate.stream import stream_logits
from exl3.files import atomic_file
from exl3.jobs.block import Block
from exl3.jobs.blocks import convert_block
from exl3.jobs.convert import convert
from exl3.jobs.flags import convert_parser
from exl3.jobs.job import Job
from exl3.jobs.settings import read_request
from exl3.jobs.streams import Streams, run_block
from exl3.model.quantized import open_model
from exl3.quant.correction import trust

PLAIN = ["--no_correction", "--hessian", "input"]
# Variant: flags of convert.py on top of the study's own. At bits that are no whole number all share
# out bits, and `UNIFORM` is left out.
UNIFORM = "--uniform"
VARIANTS = {
    "baseline": PLAIN,  # the ones of this name: without what `plain` switches off besides
    "refit": PLAIN,
    "correction": ["--hessian", "input", UNIFORM],
    "output Hessians": ["--no_correction"],
    "both": [UNIFORM],
    "correction, bits shared out": ["--hessian", "input"],
    "default": [],
    "default, tuned": ["--tune", "40"],
    "baseline, tuned": [*PLAIN, "--tune", "40"],
    "default, tuned block by block": ["--tune", "40"],
    "default, three quarters of the correction": [],
    "default, half of the correction": [],
    "default, 64 rows of gradients": ["--hessian_rows", "64"],
    "default, 256 rows": ["-cr", "256"],
    "baseline, 256 rows": [*PLAIN, "-cr", "256"],
    "default, mcg": ["-cb", "mcg"],
    "default, 3inst": ["-cb", "3inst"],
    "default, head as it is": ["-hb", "16"],
    "baseline, head as it is": [*PLAIN, "-hb", "16"],
}
STRENGTHS = {
    "default, three quarters of the correction": 0.75,
    "default, half of the correction": 0.5,
}
MAIN = ("baseline", "correction", "output Hessians", "both", "default")
RESAMPLES = 2000


@contextlib.contextmanager
def long_tails() -> Iterator[None]:
    """Signs drawn once; the scale searched near the best for Gaussian weights, on an even sample of
    tiles."""

    def even(tails: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = torch.linspace(0, len(tails) - 1, min(64, len(tails))).long().to(tails.device)
        return numbers, torch.full_like(numbers, 1 / len(numbers), dtype=torch.float32)

    with (
        mock.patch("exl3.quant.incoherence._flattest", lambda weight, scales, draws: draws[0]),
        mock.patch("exl3.quant.linear.sample_tiles", even),
        mock.patch("exl3.quant.scale.FARTHEST", 0),
    ):
        yield


def convert_behind_quantized(job: Job, i: int, streams: Streams) -> None:
    """The next block is calibrated on what leaves this one quantized."""
    entering = streams.original

    def later(block: Block, streams: Streams) -> None:
        streams.original = block.behind(streams, None)

    with mock.patch.object(Block, "advance_original", later):
        convert_block(job, i, streams)
    block = Block.load(job.source.model, i)
    for key in block.linears:
        block.settle(key, job.work)
    run_block(block.model, i, streams.rows, entering, out=streams.original)
    block.free()


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """LDLQ as it is known: calibrated behind quantized blocks, tails stay long, scales are not
    fitted again, experts' tokens count alike."""

    def ones(wanted: torch.Tensor, decoded: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
        return wanted.new_ones(wanted.shape[1])

    with (
        long_tails(),
        mock.patch("exl3.jobs.convert.convert_block", convert_behind_quantized),
        mock.patch("exl3.quant.linear.refit_output_scales", ones),
        mock.patch("exl3.jobs.experts.own_weights", torch.zeros_like),
        mock.patch("exl3.jobs.experts.token_weights", lambda shares, _: torch.ones_like(shares)),
    ):
        yield


def changes(variant: str) -> contextlib.AbstractContextManager:
    """What a variant changes besides its flags."""
    if variant.startswith("baseline"):
        return plain()
    if variant == "default, tuned block by block":
        return mock.patch("exl3.jobs.tune_plan.whole_tuning_bytes", lambda *_: None)
    if variant in STRENGTHS:
        part = STRENGTHS[variant]
        return mock.patch("exl3.jobs.inputs.trust", lambda *given: part * trust(*given))
    return contextlib.nullcontext()


def make_quant(
    args: argparse.Namespace, variant: str, bits: float, seed: int, out: Path
) -> dict[str, float]:
    """Converts and returns the seconds it took."""
    flags = VARIANTS[variant]
    text = ["-c", str(args.text)] if args.text else []
    if bits != int(bits):
        flags = [flag for flag in flags if flag != UNIFORM]
    given = [
        *("-i", str(args.model), "-o", str(out / "quant"), "-w", str(out / "work")),
        *("-b", f"{bits:g}", "-hb", "6", "-cr", str(args.rows), "-cc", str(args.length), *text),
        *("--seed", str(seed), "--check_rows", "0", "-d", args.device, *flags),
    ]
    request = read_request(convert_parser().parse_args(given))
    cpu, wall = time.process_time(), time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()), changes(variant):
        convert(request)
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    return {"cpu": round(cpu, 1), "wall": round(wall, 1)}


class Judge:
    """The original's logits on the evaluation rows, and quants against them."""

    def __init__(self, args: argparse.Namespace) -> None:
        tokenizer, text = load_tokenizer(args.model), args.judge.read_text()
        self.rows = evaluation_rows(tokenizer, text, args.length, args.judge_rows)
        self.device, note = pick_device(args.device)
        if note:
            print(note, flush=True)
        self.expected = [logits for _, logits in self._logits(args.model)]

    def _logits(self, model: Path) -> Iterator[tuple[int, torch.Tensor]]:
        return stream_logits(open_model(model, device=self.device), self.rows)

    def kld(self, quant: Path) -> list[float]:
        """Mean KL(original || quant) of every row."""
        found = []
        for i, logits in self._logits(quant):
            found.append(float(row_kld(logits, self.expected[i]).mean()))
        return found


def write_results(path: Path, results: dict[str, dict]) -> None:
    """JSON, a result a line."""
    lines = (f"{json.dumps(name)}: {json.dumps(told)}" for name, told in results.items())
    with atomic_file(path) as file:
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())


def interval(rows: np.ndarray) -> tuple[float, float]:
    """95% bootstrap interval of the mean over rows; rows: (seeds, rows), seeds averaged."""
    means = rows.mean(0)
    picked = np.random.default_rng(0).integers(0, len(means), (RESAMPLES, len(means)))
    low, high = np.quantile(means[picked].mean(1), (0.025, 0.975))
    return float(low), float(high)


def ratio_interval(rows: np.ndarray, base: np.ndarray) -> tuple[float, float]:
    """95% bootstrap interval of a ratio of means over the same rows."""
    a, b = rows.mean(0), base.mean(0)
    picked = np.random.default_rng(0).integers(0, len(a), (RESAMPLES, len(a)))
    low, high = np.quantile(a[picked].mean(1) / b[picked].mean(1), (0.025, 0.975))
    return float(low), float(high)


def print_table(results: dict[str, dict], seeds: int) -> None:
    print("| bits | variant | seeds | KLD | 95% | of baseline | 95% | CPU s |")
    print("|---|---|---|---|---|---|---|---|")
    for bits in sorted({r["bits"] for r in results.values()}):
        tables: dict[str, list[dict]] = {}
        for r in results.values():
            if r["bits"] == bits and r["seed"] < seeds:
                tables.setdefault(r["variant"], []).append(r)
        base = tables.get("baseline")
        for variant in (v for v in VARIANTS if v in tables):
            rows = np.array([r["rows"] for r in tables[variant]])
            cpu = np.mean([r["cpu"] for r in tables[variant]])
            low, high = interval(rows)
            text = f"| {bits:g} | {variant} | {len(rows)} | {rows.mean():.5f} | "
            text += f"{low:.5f}–{high:.5f} | "
            if base:
                of = np.array([r["rows"] for r in base])
                low, high = ratio_interval(rows, of)
                text += f"{rows.mean() / of.mean():.3f} | {low:.3f}–{high:.3f} | "
            print(f"{text}{cpu:.0f} |")


def draw(results: dict[str, dict], path: Path, title: str) -> None:
    """KLD against whole bits, one line a variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=120)
    for variant in VARIANTS:
        found = [r for r in results.values() if r["variant"] == variant]
        bits = sorted({r["bits"] for r in found if r["bits"] == int(r["bits"])})
        rows = [np.array([r["rows"] for r in found if r["bits"] == b]) for b in bits]
        if bits:
            means = np.array([r.mean() for r in rows])
            ends = np.array([interval(r) for r in rows]).T
            axes.errorbar(bits, means, abs(ends - means), marker="o", capsize=3, label=variant)
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight (codes of the decoder)")
    axes.set_ylabel("KL divergence from the original")
    axes.set_title(title)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, help="calibration text (default: the built-in mix)")
    parser.add_argument("--judge", type=Path, required=True, help="evaluation text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", type=float, nargs="+", default=[2, 3, 4])
    parser.add_argument("--variants", nargs="+", default=list(MAIN), choices=VARIANTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--judge_rows", type=int, default=32)
    parser.add_argument("-d", "--device", default="0", help="a GPU, or cpu (0)")
    parser.add_argument("--chart", type=Path)
    parser.add_argument("--table", action="store_true", help="make nothing, show what is there")
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    wanted = [
        (f"{variant} {bits:g} {seed}", variant, bits, seed)
        for seed in range(args.seeds)
        for bits in args.bits
        for variant in args.variants
    ]
    missing = [entry for entry in wanted if entry[0] not in results and not args.table]
    judge = None
    if missing:
        judge = Judge(args)
    for name, variant, bits, seed in missing:
        folder = Path(tempfile.mkdtemp(prefix="fidelity-"))
        seconds = make_quant(args, variant, bits, seed, folder)
        rows = judge.kld(folder / "quant")
        told = {"variant": variant, "bits": bits, "seed": seed, **seconds}
        results[name] = told | {"rows": [float(f"{kld:.6g}") for kld in rows]}
        write_results(args.out, results)
        shutil.rmtree(folder)
        cost = f"{seconds['cpu']:.0f} CPU s, {seconds['wall']:.0f} s"
        print(f"{name}: KLD {np.mean(rows):.5f}, {cost}", flush=True)
    shown = {name: results[name] for name, *_ in wanted if name in results}
    print_table(shown, args.seeds)
    if args.chart:
        draw(shown, args.chart, args.model.name)


if __name__ == "__main__":
    main()
