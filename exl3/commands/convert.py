"""Converts a Hugging Face model to an EXL3 quant."""

from exl3.jobs.flags import convert_parser
from exl3.jobs.settings import read_request


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    parser = convert_parser()
    parser.prog = prog or parser.prog
    request = read_request(parser.parse_args(argv))

    from exl3.jobs.convert import convert, dry_run

    (dry_run if request.dry_run else convert)(request)
