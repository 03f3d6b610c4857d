#!/usr/bin/env python3
"""Trains a small language model on this machine, to try everything without a download."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exl3.demo_model import STEPS, make_demo_model
from exl3.errors import UserError

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("-o", "--out_dir", required=True, help="new folder for the model")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of rows")
    args = parser.parse_args()
    try:
        make_demo_model(args.out_dir, args.steps, args.seed)
    except UserError as error:
        parser.exit(2, f"{error}\n")
