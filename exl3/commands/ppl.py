"""Perplexity of one model, original or EXL3, for a quick look."""

from pathlib import Path

from exl3.cli import Parser
from exl3.errors import UserError


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    p = Parser(prog, description=__doc__)
    p.add_argument("-m", "--model_dir", type=Path, required=True, metavar="DIR", help="the model")
    p.add_argument(
        "-c", "--text", type=Path, metavar="FILE",
        help=".txt, .jsonl or .parquet (default: built-in text that no calibration rows hold)",
    )  # fmt: skip
    p.add_argument("-r", "--rows", type=int, default=10, metavar="N", help="rows (10)")
    p.add_argument("-l", "--length", type=int, default=512, metavar="N", help="tokens a row (512)")
    p.add_argument("-dev", "--device", default="0", metavar="N", help="a GPU, or cpu (0)")
    p.add_argument("--trust_remote_code", action="store_true", help="run code of the model")
    args = p.parse_args(argv)
    if args.rows < 1 or args.length < 2:
        raise UserError("give at least one row (-r) of at least two tokens (-l)")

    from exl3.jobs.perplexity import print_perplexity

    print_perplexity(
        args.model_dir, args.text, args.rows, args.length, args.trust_remote_code, args.device
    )
