#!/usr/bin/env python3
"""Compares quants: perplexity, KL divergence from the original, size; as tables and a chart."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exl3.commands import run

if __name__ == "__main__":
    run("compare")
