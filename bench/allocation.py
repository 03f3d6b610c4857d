#!/usr/bin/env python3
"""The exact solver against simpler rules, on one measurement: predicted and real KLD.

    python bench/allocation.py -m measurement.json -r ORIGINAL [-b 2.25 2.5 ...] [-c TEXT]

Greedy is what other tools do: from the smallest quant on, again and again the step with the
greatest gain per bit that still fits. Real KLD is that of the spliced layers in memory, on
held-out rows; nothing is written.
"""

import argparse
import tempfile
from math import floor
from pathlib import Path

from exl3 import parallel
from exl3.allocate import TOLERANCE, Options, Solution, ends_first, solution, solve
from exl3.divide import undivided
from exl3.jobs.candidates import Problem
from exl3.jobs.splice_check import held_out_rows, measure, notes_of
from exl3.measurement import read_measurement
from exl3.splice import Quant


def greedy(groups: Options, budget: int) -> Solution:
    """Best gain per bit first; options must be in rising bits, as those of rising quants are."""
    picked = [0] * len(groups)
    room = budget - sum(options[0].bits for options in groups)
    while True:
        steps = []
        for g, (options, i) in enumerate(zip(groups, picked, strict=True)):
            for j in range(i + 1, len(options)):
                bits = options[j].bits - options[i].bits
                if 0 < bits <= room:
                    steps.append(((options[i].kld - options[j].kld) / bits, g, j, bits))
        if not steps:
            return solution(groups, picked)
        _, g, j, bits = max(steps, key=lambda step: (step[0], -step[1], -step[2]))
        picked[g], room = j, room - bits


def main() -> None:
    p = argparse.ArgumentParser(allow_abbrev=False)
    p.add_argument("-m", "--measurement", type=Path, required=True)
    p.add_argument("-r", "--ref_dir", type=Path, required=True)
    p.add_argument("-b", "--bitrates", type=float, nargs="+", default=[2.25, 2.5, 2.75, 3.25, 3.5])
    p.add_argument("-c", "--text", type=Path)
    p.add_argument("--rows", type=int, default=16)
    args = p.parse_args()
    with parallel.one_thread_per_op(), tempfile.TemporaryDirectory() as folder:
        # Groups as they were measured: where they are large the rules differ most.
        measurement = undivided(read_measurement(args.measurement))
        quants = tuple(Quant(q.dir) for q in (measurement.base, *measurement.alts))
        problem = Problem(measurement, quants, 0)
        rows = held_out_rows(args.ref_dir, args.rows, args.text, False)
        options, weights = problem.options, problem.plain(0).splice.weights
        blocks = [group.block for group in measurement.groups]
        trials = {(q.folder.name, ""): problem.plain(i) for i, q in enumerate(quants)}
        for bitrate in args.bitrates:
            budget = floor(bitrate * weights)
            least = budget - floor(TOLERANCE * weights)
            for name, found in (
                ("exact", solve(options, budget, least=least)),
                ("exact, no caution", solve(options, budget, least=least, caution=0.0)),
                ("greedy", greedy(options, budget)),
                ("ends first", ends_first(options, blocks, budget)),
            ):
                if found is not None:
                    trials[f"{bitrate:g}", name] = problem.candidate(name, found)
        with notes_of(Path(folder) / "bench") as notes:
            splices = [candidate.splice for candidate in trials.values()]
            real = measure(args.ref_dir, splices, rows, notes)
    for ((bitrate, name), candidate), found in zip(trials.items(), real, strict=True):
        print(
            f"{bitrate:>8}  {name:<18} {candidate.splice.bpw:.3f} bits  predicted "
            f"{candidate.predicted:.5f}  real {found.kld:.5f} ± {found.error:.5f}"
        )


if __name__ == "__main__":
    main()
