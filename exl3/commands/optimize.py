"""Chooses the best layers of several quants for a size and writes the model they make."""

import argparse
import sys
from pathlib import Path

from exl3.cli import Parser
from exl3.errors import UserError

NOT_BETTER = 3  # exit code: nothing beats a plain quant


def parser(prog: str | None) -> Parser:
    # What is not given is left to the requests' defaults.
    p = Parser(prog, description=__doc__, argument_default=argparse.SUPPRESS)
    p.add_argument(
        "-i", "--in_dir", dest="quants", nargs="+", type=Path, metavar="DIR",
        help="quants of one model, rising bitrate (default: those of the measurement)",
    )  # fmt: skip
    p.add_argument("-o", "--out_dir", dest="out", type=Path, metavar="DIR", help="model to write")
    p.add_argument(
        "-m", "--measurement", type=Path, required=True, metavar="FILE",
        help="what util/measure.py has written",
    )  # fmt: skip
    p.add_argument(
        "-b", "--bitrate", type=float, required=True, metavar="BPW",
        help="bits per weight of the decoder as stored, scales included; never exceeded",
    )  # fmt: skip
    p.add_argument(
        "-hb", "--head_bits", type=int, metavar="K",
        help="take the head of the first quant that has it at K bits (default: the first quant's)",
    )  # fmt: skip
    p.add_argument(
        "-ss", "--shard_size", type=int, metavar="MB",
        help="largest output file; 0: a single file (8192)",
    )  # fmt: skip
    p.add_argument(
        "-r", "--ref_dir", dest="original", type=Path, metavar="DIR",
        help="the original model, to measure what choices are worth",
    )  # fmt: skip
    p.add_argument(
        "--verify", type=int, metavar="ROWS",
        help="held-out rows of 512 tokens to measure on, with -r; 0: do not measure (32)",
    )  # fmt: skip
    p.add_argument(
        "--rounds", type=int, metavar="N",
        help="with -r: rounds of three more choices, suggested by what was measured so far; fewer "
        "if they find nothing better (5)",
    )  # fmt: skip
    p.add_argument(
        "-c", "--text", type=Path, metavar="FILE",
        help="text of these rows: .txt, .jsonl or .parquet (default: built-in held-out text)",
    )  # fmt: skip
    p.add_argument(
        "--recipe", type=Path, metavar="FILE",
        help="write bits per layer for convert.py --recipe instead of a model",
    )  # fmt: skip
    p.add_argument(
        "--force", action="store_true", help="write the result even if a plain quant is as good"
    )
    p.add_argument("-d", "--device", metavar="N", help="a GPU, or cpu (0)")
    p.add_argument("--trust_remote_code", action="store_true", help="run code of the models")
    return p


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    given = vars(parser(prog).parse_args(argv))
    if "recipe" in given:
        return _recipe(given)
    if "out" not in given:
        raise UserError("where should the model go? Give -o DIR, or --recipe FILE")
    if min(given.get(name, 0) for name in ("verify", "rounds", "shard_size")) < 0:
        raise UserError("--verify, --rounds and -ss take numbers from 0 on")
    given["quants"] = tuple(given.get("quants", ()))

    from exl3.jobs.optimize import NotBetter, optimize
    from exl3.jobs.optimize_input import Request

    try:
        optimize(Request(**given))
    except NotBetter as found:
        print(f"{found}", file=sys.stderr, flush=True)
        sys.exit(NOT_BETTER)


def _recipe(given: dict) -> None:
    """A recipe concerns the original: flags about quants and writing a model contradict it."""
    known = {"recipe", "measurement", "bitrate", "head_bits", "original"}
    flags = {"quants": "-i", "out": "-o", "shard_size": "-ss", "text": "-c", "device": "-d"}
    if others := sorted(given.keys() - known):
        names = ", ".join(flags.get(name, f"--{name}") for name in others)
        raise UserError(f"{names}: --recipe writes no model and measures nothing; leave it out")

    from exl3.jobs.make_recipe import Request, make_recipe

    make_recipe(Request(**given))
