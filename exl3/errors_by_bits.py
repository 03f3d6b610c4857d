"""How the error of a quantized layer changes with its bits."""

from collections.abc import Mapping

from exl3.format.layer import UNQUANTIZED

# Mean squared error over variance of unit Gaussian weights at the best scale, K = 1 to 8, as
# `python bench/scale_table.py` measures it on 2,048 tiles (errors there are multiples of 4^-K).
RELATIVE_ERROR = {
    "3inst": (0.2666, 0.06882, 0.01779, 0.004616, 0.001202, 3.202e-4, 8.601e-5, 2.309e-5),
    "mcg": (0.2662, 0.06846, 0.01742, 0.004524, 0.001189, 3.164e-4, 8.556e-5, 2.307e-5),
    "mul1": (0.2722, 0.06834, 0.01740, 0.004451, 0.001146, 3.002e-4, 8.037e-5, 2.101e-5),
}
# With LDLQ, what is encoded are weights plus the errors fed back to them, so errors grow by a
# factor of about 1 + 3 E. Layers of a small Llama at 3 and 4 bits had 0.226 and 0.056 times their
# error at 2 bits (geometric means of proxy errors); this gives 0.222 and 0.055, the table alone
# 0.255 and 0.065.
FEEDBACK = 3.0
FLOAT16 = 1e-7  # relative error of what is stored as it was, about
DEFAULT = "mul1"  # where nothing tells the codebook


def relative_error(weights_by_bits: Mapping[int, float], codebook: str | None) -> float:
    """Relative squared error of layers of which so many weights have so many bits each.

    Only ratios are meant: layers differ, but two errors of one layer much less.
    """
    table = RELATIVE_ERROR.get(codebook or DEFAULT, RELATIVE_ERROR[DEFAULT])
    total = sum(weights_by_bits.values())

    def error(bits: int) -> float:
        if bits == UNQUANTIZED:
            return FLOAT16
        return table[bits - 1] * (1 + FEEDBACK * table[bits - 1])

    return sum(n * error(bits) for bits, n in weights_by_bits.items()) / total
