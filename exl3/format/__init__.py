"""What an EXL3 file is: codebooks, packing, tile order, layers, model directories."""

from exl3.format.layer import decode_layer

__all__ = ["decode_layer"]
