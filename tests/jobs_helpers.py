"""Small conversions in this process, for tests of what comes of them."""

from pathlib import Path

from exl3.commands.convert import main


def flags(model: Path, out: Path, work: Path, bits: str = "2.5", **more: object) -> list[str]:
    """A small job's command line."""
    given = {"-i": model, "-o": out, "-w": work, "-b": bits, "-cr": 6, "-cc": 64, "-d": "cpu"}
    given["--check_rows"] = 0
    return [str(x) for pair in {**given, **more}.items() for x in pair]


def run(*arguments: str) -> None:
    """The job in this process, as convert.py runs it."""
    main(list(arguments))
