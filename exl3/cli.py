"""How every command reads its flags and ends: exit code 0, 2 for bad input, 1 for a failure."""

import argparse
import difflib
import os
import sys
from collections.abc import Callable

from exl3.errors import JobError, UserError


class Parser(argparse.ArgumentParser):
    """Flags are never abbreviated; what is wrong with them is one sentence, not a page of usage."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> None:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            known = [s for action in self._actions for s in action.option_strings]
            if not unknown.startswith("-"):
                _leave(f"there is no use for {unknown}; try --help", 2)
            near = difflib.get_close_matches(unknown.split()[0], known, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            message = f"there is no flag {unknown}{hint}"
        _leave(f"{message}; try --help", 2)


def run(command: Callable[[], None]) -> None:
    """Runs a command; what went wrong is one plain sentence on stderr, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that knows no ± or ü shows an escape
            stream.reconfigure(errors="backslashreplace")
    try:
        command()
    except UserError as error:
        _leave(str(error), 2)
    except JobError as error:
        _leave(str(error), 1)
    except KeyboardInterrupt:
        _leave("interrupted; the same command goes on from here", 130)
    except BrokenPipeError:
        # Nothing more can be printed to it, not even by Python's own farewell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave("the output was closed; the same command goes on from here", 1)
    except OSError as error:
        _leave(f"{error.filename or 'a file'}: {error.strerror or error}", 1)


def _leave(message: str, code: int) -> None:
    print(f"Error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)
