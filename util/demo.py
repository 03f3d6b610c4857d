#!/usr/bin/env python3
"""Converts a small real model at 4, 3 and 2 bits and shows what each quant is worth."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from exl3 import cli  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("-i", "--in_dir", type=Path, help="another model than the one it trains")
    parser.add_argument("-o", "--out_dir", type=Path, default=ROOT / "demo", help="(%(default)s)")
    args = parser.parse_args()

    from exl3.demo import demo

    demo(args.in_dir, args.out_dir)


if __name__ == "__main__":
    cli.run(main)
