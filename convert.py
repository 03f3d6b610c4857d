#!/usr/bin/env python3
"""Converts a Hugging Face model to an EXL3 quant. See --help and README.md."""

from exl3.commands import run

if __name__ == "__main__":
    run("convert")
