#!/usr/bin/env python3
"""Trains a small language model on this machine, to try everything without a download."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exl3.commands import run

if __name__ == "__main__":
    run("make-demo-model")
