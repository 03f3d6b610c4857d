"""Trains a small language model on this machine, to try everything without a download."""

import argparse

from exl3.cli import Parser


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    # What is not given is left to the function's defaults.
    parser = Parser(prog, description=__doc__, argument_default=argparse.SUPPRESS)
    parser.add_argument("-o", "--out_dir", required=True, help="new folder for the model")
    parser.add_argument("--steps", type=int, help="training steps; fewer make a worse model")
    parser.add_argument("--seed", type=int, help="of the weights and the order of rows (0)")
    args = parser.parse_args(argv)

    from exl3.demo_model import make_demo_model

    make_demo_model(**vars(args))
