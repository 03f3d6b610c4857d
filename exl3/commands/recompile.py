"""Splices a quant by hand: layers of a base replaced by those of other quants."""

import argparse
from pathlib import Path

from exl3.cli import Parser
from exl3.errors import UserError


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    # What is not given is left to the request's defaults.
    p = Parser(prog, description=__doc__, argument_default=argparse.SUPPRESS)
    add = p.add_argument
    add("-i", "--in_dir", dest="base", type=Path, required=True, metavar="DIR", help="the base")
    add("-o", "--out_dir", dest="out", type=Path, required=True, metavar="DIR", help="new folder")
    add(
        "-or", "--override", dest="overrides", type=Path, required=True, metavar="FILE",
        help="YAML: sources and overrides (docs/optimize.md)",
    )  # fmt: skip
    add(
        "-ss", "--shard_size", type=int, metavar="MB",
        help="largest output file; 0: a single file (8192)",
    )  # fmt: skip
    given = vars(p.parse_args(argv))
    if given.get("shard_size", 0) < 0:
        raise UserError("-ss takes numbers from 0 on")

    from exl3.jobs.recompile import Request, recompile

    recompile(Request(**given))
