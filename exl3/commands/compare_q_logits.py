"""Writes the logits of a model for the rows of a dataset spec: the reference of compare_q."""

import argparse
from pathlib import Path

from exl3.cli import Parser


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    # What is not given is left to the request's defaults.
    parser = Parser(prog, description=__doc__, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("-m", "--model_dir", type=Path, required=True, help="the model, an original or a quant")
    add("-d", "--dataspec", type=Path, required=True, help="dataset spec (JSON)")
    add("-o", "--out_logits", type=Path, required=True, help="file to write (.safetensors)")
    add("-r", "--rows", type=int, metavar="N", help="at most so many rows; 0: all (10)")
    add(
        *("-rpb", "--rows_per_batch"),
        type=int,
        metavar="N",
        help="rows that go through the model together; fewer take less memory, more load the "
        "model less often, and the result is the same (as many as fit 2 GiB of hidden states)",
    )
    add("-dev", "--device", metavar="N", help="GPU number, or cpu (0)")
    add("--dtype", choices=("float16", "float32"), help="of the logits in the file (float16)")
    add("--trust_remote_code", action="store_true", help="run code that the model brings along")
    args = parser.parse_args(argv)

    from exl3.jobs.reference_logits import Request, write_reference_logits

    write_reference_logits(Request(**vars(args)))
