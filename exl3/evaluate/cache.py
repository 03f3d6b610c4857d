"""Where evaluations keep what they have worked out."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder `evaluation` of $EXL3_CACHE, else of exl3 in $XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get("EXL3_CACHE"):
        return Path(named).expanduser() / "evaluation"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "exl3" / "evaluation"
