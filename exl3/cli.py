"""How every command ends: exit code 0, 2 for bad input, 1 for a failure while running."""

import sys
from collections.abc import Callable

from exl3.errors import JobError, UserError


def run(command: Callable[[], None]) -> None:
    """Runs a command; what went wrong is one plain sentence on stderr, never a traceback."""
    try:
        command()
    except UserError as error:
        _leave(str(error), 2)
    except JobError as error:
        _leave(str(error), 1)
    except KeyboardInterrupt:
        _leave("interrupted; the same command goes on from here", 130)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        _leave(f"{error.filename or 'a file'}: {error.strerror or error}", 1)


def _leave(message: str, code: int) -> None:
    print(f"Error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)
