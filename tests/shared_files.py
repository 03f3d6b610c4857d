"""Development files beside the repository; tests that want them skip where they are not."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared(path: str) -> Path:
    """A file beside the repository, or the test skips."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"{path} is a development file that is not beside this repository")
    return found
