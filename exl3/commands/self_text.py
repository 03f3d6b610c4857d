"""Text that a model writes itself, to calibrate on (convert.py -c)."""

import argparse
from pathlib import Path

from exl3.cli import Parser


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    # What is not given is left to the job's defaults.
    p = Parser(prog, description=__doc__, argument_default=argparse.SUPPRESS)
    p.add_argument(
        "-i", "--in_dir", dest="model", type=Path, required=True, metavar="DIR", help="the model"
    )
    p.add_argument(
        "-o", "--out_file", dest="out", type=Path, required=True, metavar="FILE",
        help="the text, .jsonl",
    )  # fmt: skip
    p.add_argument("-r", "--rows", type=int, metavar="N", help="rows (256)")
    p.add_argument("-l", "--length", type=int, metavar="N", help="tokens a row (2048)")
    p.add_argument("--seed", type=int, metavar="N", help="of the draws (0)")
    p.add_argument("-d", "--device", metavar="N", help="a GPU, or cpu (0)")
    p.add_argument("--trust_remote_code", action="store_true", help="run code of the model")
    given = vars(p.parse_args(argv))

    from exl3.jobs.self_text import Request, write_self_text

    write_self_text(Request(**given))
