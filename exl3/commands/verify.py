"""Checks that a folder is a sound EXL3 model: its files, what they say, and what they decode to."""

from pathlib import Path

from exl3.cli import Parser
from exl3.errors import UserError


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    parser = Parser(prog, description=__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="the model's folder")
    parser.add_argument("--fast", action="store_true", help="do not decode layers or hash files")
    args = parser.parse_args(argv)

    from exl3.format.verify import shortened, verify

    report = verify(args.folder, decode=not args.fast, hashes=not args.fast)
    if report.notes:
        print(shortened(report.notes, "Note: "))
    if report.problems:
        raise UserError(f"{args.folder} is not sound:\n{shortened(report.problems)}")
    print(report.summary)
