#!/usr/bin/env python3
"""Text that a model writes itself, to calibrate on."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exl3.commands import run

if __name__ == "__main__":
    run("self-text")
