#!/usr/bin/env python3
"""What the original's gradients say of every group of linears, beside what was measured of it.

    python bench/sensitivities.py WORK/sensitivities.json measurement.json

The first is left by `convert.py` (bits shared out), the second by `util/measure.py` (isolate, any
level). Prints the KLD of every group at the bits of the measurement's base: foretold and measured,
and how well the logarithms of both agree.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from exl3.errors_by_bits import relative_error
from exl3.measurement import read_measurement


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("sensitivities", type=Path)
    parser.add_argument("measurement", type=Path)
    args = parser.parse_args()
    blocks = json.loads(args.sensitivities.read_text())["blocks"].values()
    told = {key: kld for of in blocks for key, kld in of.items()}
    measurement = read_measurement(args.measurement)
    pairs = []
    print("| block | group | foretold | measured | ratio |")
    print("|---|---|---|---|---|")
    for group in measurement.groups:
        if group.kld is None:
            raise SystemExit("the measurement has swaps only; measure with --method isolate")
        error = np.mean([relative_error({k: 1}, measurement.model.codebook) for k in group.k])
        foretold = error * sum(told[key] for key in group.layers)
        pairs.append((foretold, group.kld))
        print(
            f"| {group.block} | {group.name} | {foretold:.6f} | {group.kld:.6f} "
            f"| {foretold / group.kld:.2f} |"
        )
    logs = np.log(np.array(pairs))
    away = logs[:, 0] - logs[:, 1]
    print(
        f"\ncorrelation of the logarithms {np.corrcoef(logs.T)[0, 1]:.3f}; the ratio is "
        f"{np.exp(away.mean()):.2f}, times or over {np.exp(away.std(ddof=1)):.2f} (one sigma)"
    )


if __name__ == "__main__":
    main()
