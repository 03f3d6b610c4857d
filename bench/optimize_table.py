#!/usr/bin/env python3
"""Optimized quants against the straight line between plain ones, and against direct conversions.

    python bench/optimize_table.py MODEL --text TRAIN --judge TEXT --work FOLDER
        [--levels 0 1 2 3] [--targets 2.25 2.5 2.75 3.25 3.5] [--verify 32]
        [--choose_by judge] [--judge_rows 128] [--recipes]

Makes quants of MODEL at 2, 3 and 4 bits (`convert.py --no_correction`), measures them at each level
(`util/measure.py`), optimizes for each target (`util/optimize.py`; below 3 bits from a quant of one
bit too, above from one of five, for a direct conversion may use so many), and converts directly to
the same stored bits (`convert.py -b`). With --recipes also the corrected way: a recipe of the
finest measurement, converted. All but the last tenth of TRAIN is to calibrate and measure with.
All KLDs of the table are of the same rows of the first half of TEXT, which must not be part of
TRAIN. Splices are chosen by text of that kind, the second half of TEXT, or with `--choose_by train`
by what is left of TRAIN. What FOLDER has already is not made again, so a table can be made in
parts, for some levels or targets at a time.
Two at once need two folders.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from fidelity import Judge

from exl3.evaluate.storage import measure_storage

ROOT = Path(__file__).resolve().parents[1]
PLAIN = (2, 3, 4)
HELD_OUT = 0.1  # of the text


class Study:
    """The quants of one model, made when they are asked for."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work = args, args.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.calibration, left = self.divided(args.text, 1 - HELD_OUT, "calibration", "held_out")
        self.judging, kindred = self.divided(args.judge, 0.5, "judging", "choosing")
        self.choosing = left if args.choose_by == "train" else kindred
        self.judge: Judge | None = None

    def divided(self, text: Path, part: float, *names: str) -> list[Path]:
        """Two files of a text, divided at the end of a line."""
        files = [self.work / f"{name}.txt" for name in names]
        content = text.read_text()
        end = content.rindex("\n", 0, int(part * len(content))) + 1
        for file, of in zip(files, (content[:end], content[end:]), strict=True):
            file.write_text(of)
        return files

    def run(self, name: str, *command: object) -> str:
        """Runs a script, keeps what it says in FOLDER/name.log."""
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True
        )
        (self.work / f"{name}.log").write_text(done.stdout + done.stderr)
        if done.returncode not in (0, 3):
            sys.exit(f"{name} failed: {done.stderr[-2000:]}")
        return done.stdout

    def convert(self, name: str, *flags: object) -> Path:
        out = self.work / name
        if not out.exists():
            a = self.args
            self.run(
                name,
                *("convert.py", "-i", a.model, "-o", out, "-w", self.work / f"{name}.work"),
                *("-hb", 6, "-cr", 64, "-cc", 512, "-c", self.calibration, "--check_rows", 0),
                *flags,
            )
        return out

    def plain(self, bits: float) -> Path:
        return self.convert(f"q{bits:g}", "-b", f"{bits:g}", "--no_correction")

    def measurement(self, level: int, bits: tuple[int, ...] = PLAIN) -> Path:
        name = f"m{level}-{''.join(map(str, bits))}"
        out = self.work / f"{name}.json"
        if not (out.exists() and json.loads(out.read_text())["complete"]):
            quants = [self.plain(b) for b in bits]
            command = ("util/measure.py", "-i", *quants, "-r", self.args.model, "-l", level)
            self.run(name, *command, "-o", out, "-c", self.calibration, "-cc", 512, "-cr", 20)
        return out

    def optimized(self, measurement: Path, target: float, bits: tuple[int, ...]) -> Path:
        name = f"o{target:g}-{measurement.stem}-{self.args.choose_by}"
        out = self.work / name
        if not out.exists():
            command = ("util/optimize.py", "-m", measurement, "-b", target, "-o", out)
            quants = [self.plain(b) for b in bits]
            check = ("-r", self.args.model, "--verify", self.args.verify, "-c", self.choosing)
            self.run(name, *command, "-i", *quants, *check, "--force")
        return out

    def score(self, quant: Path) -> tuple[float, float]:
        """Stored bits and KLD."""
        path = quant.with_suffix(quant.suffix + ".kld.json")
        if not path.exists():
            if self.judge is None:
                self.judge = Judge(self.args.model, self.judging, self.args.judge_rows, 512)
            path.write_text(json.dumps(self.judge.kld(quant)))
        return measure_storage(quant).layer_bpw, float(np.mean(json.loads(path.read_text())))


def line(points: list[tuple[float, float]], bits: float) -> float:
    """KLD at these stored bits on the straight lines through the plain quants."""
    return float(np.interp(bits, *zip(*points, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--levels", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--targets", type=float, nargs="+", default=[2.25, 2.5, 2.75, 3.25, 3.5])
    parser.add_argument("--verify", type=int, default=32, help="rows that optimize.py chooses by")
    parser.add_argument("--choose_by", choices=("judge", "train"), default="judge")
    parser.add_argument("--judge_rows", type=int, default=128)
    parser.add_argument("--recipes", action="store_true", help="also convert by measurements")
    args = parser.parse_args()
    for name in ("model", "text", "judge", "work"):
        setattr(args, name, getattr(args, name).resolve())
    study = Study(args)
    points = [study.score(study.plain(bits)) for bits in PLAIN]
    scales = points[0][0] - PLAIN[0]  # what is stored besides the codes
    print("plain: " + ", ".join(f"{kld:.5f} at {bits:.3f} bits" for bits, kld in points))
    print("| target | level | stored bits | KLD | straight line | direct, same bits | KLD |")
    print("|---|---|---|---|---|---|---|")
    for target in args.targets:
        for level in args.levels:
            quants = (1, *PLAIN) if target < points[1][0] else (*PLAIN, 5)
            bits, kld = study.score(study.optimized(study.measurement(level), target, quants))
            direct = study.convert(f"d{bits:.4f}", "-b", f"{bits - scales:.4f}", "--no_correction")
            direct_bits, direct_kld = study.score(direct)
            print(
                f"| {target:g} | {level} | {bits:.3f} | {kld:.5f} | {line(points, bits):.5f} "
                f"| {direct_bits:.3f} | {direct_kld:.5f} |",
                flush=True,
            )
    print("\nthe measurement of 2 and 3 bits for quants of 3 and 4:")
    for target in (t for t in args.targets if t > points[1][0]):
        other = study.measurement(max(args.levels), PLAIN[:2])
        bits, kld = study.score(study.optimized(other, target, PLAIN[1:]))
        print(
            f"  {target:g}: KLD {kld:.5f} at {bits:.3f} bits, line {line(points, bits):.5f}",
            flush=True,
        )
    if args.recipes:
        print_recipes(study, args, scales)


def print_recipes(study: Study, args: argparse.Namespace, scales: float) -> None:
    """scales: bits a weight that are stored besides the codes."""
    print("\nrecipes of the finest measurement, converted with all corrections:")
    for target in args.targets:
        code_bits = f"{target - scales:.4f}"
        finest = study.measurement(max(args.levels))
        quant = study.convert(f"r{target:g}", "-b", code_bits, "-m", finest)
        bits, kld = study.score(quant)
        default = study.convert(f"c{target:g}", "-b", code_bits)
        default_bits, default_kld = study.score(default)
        print(
            f"  {target:g}: KLD {kld:.5f} at {bits:.3f} bits; without the measurement "
            f"{default_kld:.5f} at {default_bits:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
