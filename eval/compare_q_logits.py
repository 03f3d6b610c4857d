#!/usr/bin/env python3
"""Writes the logits of a model for the rows of a dataset spec: the reference of compare_q."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exl3.commands import run

if __name__ == "__main__":
    run("compare-logits")
