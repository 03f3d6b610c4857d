"""Converts a small real model at 4, 3 and 2 bits and shows what each quant is worth."""

from pathlib import Path

from exl3.cli import Parser


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    parser = Parser(prog, description=__doc__)
    parser.add_argument("-i", "--in_dir", type=Path, help="another model than the one it trains")
    parser.add_argument("-o", "--out_dir", type=Path, default=Path("demo"), help="(%(default)s)")
    args = parser.parse_args(argv)

    from exl3.demo import demo

    demo(args.in_dir, args.out_dir)
