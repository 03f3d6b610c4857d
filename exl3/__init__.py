"""EXL3 quants from Hugging Face models."""

from pathlib import Path

__version__ = (Path(__file__).parent / "VERSION").read_text().strip()
