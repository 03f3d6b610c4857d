"""The three codebooks: 16-bit state -> float16 value, in exact float16 arithmetic."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from exl3.format.markers import MULTIPLIERS

STATES = 1 << 16


@dataclass(frozen=True)
class Codebook:
    """A codebook's name and what its layers store about it."""

    name: str
    multiplier: int | None  # stored beside the layer as an int32 scalar named like the codebook

    @property
    def marker(self) -> torch.Tensor | None:
        """int32 scalar that marks a layer of this codebook, None where absence marks it."""
        if self.multiplier is None:
            return None
        return torch.tensor(self.multiplier - (1 << 32), dtype=torch.int32)


CODEBOOKS = {
    book.name: book
    for book in (
        Codebook("3inst", None),
        Codebook("mcg", MULTIPLIERS["mcg"]),
        Codebook("mul1", MULTIPLIERS["mul1"]),
    )
}


def _sum_of_halves(x: np.ndarray) -> np.ndarray:
    """Low and high 16 bits of masked x as float16 numbers, added with one rounding."""
    x = (x & np.uint32(0x8FFF8FFF)) ^ np.uint32(0x3B603B60)
    low = (x & np.uint32(0xFFFF)).astype(np.uint16).view(np.float16)
    high = (x >> np.uint32(16)).astype(np.uint16).view(np.float16)
    # A float64 sum of two halves is exact, so the cast rounds once.
    return (low.astype(np.float64) + high.astype(np.float64)).astype(np.float16)


def _sum_of_bytes(x: np.ndarray) -> np.ndarray:
    """fma(half(0x6400 + sum of the bytes of x), half(0x1EEE), half(0xC931))."""
    total = sum((x >> np.uint32(8 * i)) & np.uint32(0xFF) for i in range(4)) + np.uint32(0x6400)
    t = total.astype(np.uint16).view(np.float16).astype(np.float64)
    a, b = np.array([0x1EEE, 0xC931], dtype=np.uint16).view(np.float16).astype(np.float64)
    return (t * a + b).astype(np.float16)  # exact in float64: one rounding


@cache
def codebook_table(name: str) -> torch.Tensor:
    """float16 (65536,): the value of every state of codebook `name` (KeyError if unknown)."""
    book = CODEBOOKS[name]
    s = np.arange(STATES, dtype=np.uint32)
    if name == "3inst":
        values = _sum_of_halves(s * np.uint32(89226354) + np.uint32(64248484))
    elif name == "mcg":
        values = _sum_of_halves(s * np.uint32(book.multiplier))
    else:
        values = _sum_of_bytes(s * np.uint32(book.multiplier))
    return torch.from_numpy(values)
