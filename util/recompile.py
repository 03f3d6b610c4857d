#!/usr/bin/env python3
"""Splices a quant by hand: layers of a base replaced by those of other quants."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exl3.commands import run

if __name__ == "__main__":
    run("recompile")
