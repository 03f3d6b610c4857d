"""How every command reads its flags and ends: exit code 0, 2 for bad input, 1 for a failure."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable

from exl3.errors import JobError, UserError

GPU = re.compile(r"(?:cuda:)?(\d{1,3})")


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


def read_devices(text: str, flag: str = "-d") -> tuple[int, ...]:
    """The GPUs that a flag names, in its order; none for the CPU. UserError for anything else."""
    names = [name.strip().lower() for name in str(text).split(",")]
    if names == ["cpu"]:
        return ()
    found = [GPU.fullmatch(name) for name in names]
    if not all(found):
        raise UserError(f"{flag} {text}: give device numbers like 0 or 0,1, or cpu")
    numbers = tuple(int(match[1]) for match in found)
    if len(set(numbers)) < len(numbers):
        raise UserError(f"{flag} {text} names a GPU twice; name each once")
    return numbers


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
    except RuntimeError as error:
        if not _is_full(error):
            raise
        what = str(error).partition(". ")[0]
        _leave(
            f"a GPU's memory is too short ({what}); free it of other programs, take a larger one, "
            "or work on the CPU (-d cpu)",
            1,
        )
    except OSError as error:
        _leave(f"{error.filename or 'a file'}: {error.strerror or error}", 1)


def _is_full(error: RuntimeError) -> bool:
    """Whether a GPU had no room. What has not imported torch has not used one."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _leave(message: str, code: int) -> None:
    print(f"Error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)
