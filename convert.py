#!/usr/bin/env python3
"""Converts a Hugging Face model to an EXL3 quant. See --help and README.md."""

from exl3 import cli


def main() -> None:
    from exl3.jobs.settings import convert_parser, read_settings

    settings, resumed, notes = read_settings(convert_parser().parse_args())

    from exl3.jobs.convert import convert

    convert(settings, resumed, notes)


if __name__ == "__main__":
    cli.run(main)
