"""What an EXL3 file is: codebooks, packing, tile order, layers, model directories."""

__all__ = ["decode_layer"]


def __getattr__(name: str) -> object:
    # On demand: a command line that only wants the codebooks' names should not import torch.
    if name == "decode_layer":
        from exl3.format.layer import decode_layer

        return decode_layer
    raise AttributeError(f"module 'exl3.format' has no attribute {name!r}")
