#!/usr/bin/env python3
"""Converts a small real model at 4, 3 and 2 bits and shows what each quant is worth."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exl3.commands import run

if __name__ == "__main__":
    run("demo")
