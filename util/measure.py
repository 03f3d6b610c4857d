#!/usr/bin/env python3
"""Measures what the bits of each group of modules are worth, in KL divergence from the original."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exl3.commands import run

if __name__ == "__main__":
    run("measure")
