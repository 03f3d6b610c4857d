"""EXL3 quants from Hugging Face models."""

from pathlib import Path

__version__ = (Path(__file__).parent / "VERSION").read_text().strip()
__all__ = ["QuantizedLinear", "__version__", "quantize_linear"]


def __getattr__(name: str) -> object:
    # On demand: importing torch takes seconds, and a command line should answer at once.
    if name in ("QuantizedLinear", "quantize_linear"):
        from exl3.quant import linear

        return getattr(linear, name)
    raise AttributeError(f"module 'exl3' has no attribute {name!r}")
