#!/usr/bin/env python3
"""Checks that a folder is a sound EXL3 model: its files, what they say, and what they decode to."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exl3.commands import run

if __name__ == "__main__":
    run("verify")
