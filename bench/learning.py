#!/usr/bin/env python3
"""What learning from measured splices is worth, on splices whose KLDs are sums that are known.

    python bench/learning.py --fine m4.json --coarse m0.json --quants Q2 Q3 Q4 Q5
        [--targets 3.25 3.5 3.75] [--noise 0.003] [--repeats 10]

FINE is a measurement of every tensor in each of QUANTS (`util/measure.py -l 4`); a splice costs the
sum of what it found, and measuring it adds some noise. COARSE is what optimize.py is given. Prints,
for every target and on average, the KLD of what is chosen over that of the best choice there is,
in percent: without learning, as it is, and with other beliefs (`WAYS`); and how many splices are
measured.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np

from exl3 import learned
from exl3.jobs.candidates import Candidate, Problem
from exl3.jobs.optimize import Trial, taught
from exl3.jobs.optimize_input import ROUNDS
from exl3.jobs.splice_check import Measured
from exl3.measurement import read_measurement
from exl3.splice import Quant

# Name → what is changed of `exl3.learned`.
WAYS = {
    "as it is": {},
    "families apart": {"FAMILY": 0.0},
    "half the spread": {"OPTION": 0.15, "GROUP": 0.25, "FAMILY": 0.25},
    "wider": {"OPTION": 0.4, "GROUP": 0.6, "FAMILY": 0.6},
    "wider still": {"OPTION": 0.5, "GROUP": 0.8, "FAMILY": 0.8},
    "bad splices believed less": {"FAR": 0.5},
    "bad splices believed more": {"FAR": 0.1},
    "measured splices believed more": {"UNSURE": 0.005},
}


class Simulation:
    """Splices of some quants for one target, and what they cost by the fine measurement."""

    def __init__(self, fine: Path, coarse: Path, quants: Sequence[Quant], target: float) -> None:
        self.problem = Problem(read_measurement(coarse), tuple(quants), 0)
        self.truth = Problem(read_measurement(fine), tuple(quants), 0)
        self.target = target
        self.first = self.problem.candidates(target)
        self.best = min(map(self.kld, self.truth.candidates(target)))

    def kld(self, candidate: Candidate) -> float:
        origin = candidate.splice.origin
        pairs = zip(self.truth.groups, self.truth.options, strict=True)
        return sum(own[origin[group.layers[0]]].kld for group, own in pairs)

    def chosen(self, rounds: int, noise: float, seed: int) -> tuple[float, int]:
        """KLD of what is chosen over the best, and how many splices were measured."""
        rng = np.random.default_rng(seed)

        def tried(candidates: Sequence[Candidate]) -> list[Trial]:
            found = (self.kld(c) * np.exp(noise * rng.standard_normal()) for c in candidates)
            return [Trial(c, Measured(k, 0.0)) for c, k in zip(candidates, found, strict=True)]

        trials = tried(self.first)
        trials += taught(self.problem, trials, self.target, rounds, tried)
        best = min(trials, key=lambda trial: trial.measured.kld)
        return self.kld(best.candidate) / self.best, len(trials)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--fine", type=Path, required=True)
    parser.add_argument("--coarse", type=Path, required=True)
    parser.add_argument("--quants", type=Path, nargs="+", required=True)
    parser.add_argument("--targets", type=float, nargs="+", default=[3.25, 3.5, 3.75])
    parser.add_argument("--noise", type=float, default=0.003, help="relative, of a measured splice")
    parser.add_argument("--repeats", type=int, default=10, help="with other noise")
    args = parser.parse_args()
    quants = [Quant(folder) for folder in args.quants]
    cases = [Simulation(args.fine, args.coarse, quants, target) for target in args.targets]
    print("| | " + " | ".join(f"{t:g}" for t in args.targets) + " | mean | splices |")
    print("|---" * (len(cases) + 3) + "|")
    for name, beliefs in {"not at all": {}, **WAYS}.items():
        rounds = 0 if name == "not at all" else ROUNDS
        with mock.patch.dict(vars(learned), beliefs):
            found = np.array(
                [
                    [case.chosen(rounds, args.noise, seed) for seed in range(args.repeats)]
                    for case in cases
                ]
            )  # (targets, repeats, 2)
        over = 100 * (found[..., 0].mean(1) - 1)
        cells = " | ".join(f"{x:.2f}%" for x in (*over, over.mean()))
        print(f"| {name} | {cells} | {found[..., 1].mean():.1f} |", flush=True)


if __name__ == "__main__":
    main()
