#!/usr/bin/env python3
"""Chooses the best layers of several quants for a size and writes the model they make."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exl3.commands import run

if __name__ == "__main__":
    run("optimize")
