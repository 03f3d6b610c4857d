"""Bits under an average."""

import pytest

from exl3.allocate import Module, allocate, average_bits

MODULES = [
    Module(f"{block}.{name}", block, weights)
    for block in range(6)
    for name, weights in (("q", 4096), ("k", 1024), ("down", 12288))
]


@pytest.mark.parametrize("bits", [1, 1.1, 2, 2.25, 2.5, 3.33, 4.9, 7.99, 8])
def test_average_is_met_and_never_exceeded(bits):
    chosen = allocate(MODULES, bits)
    average = average_bits(MODULES, chosen)
    assert average <= bits + 1e-9
    # No tensor is left that would still fit.
    unraised = [m.weights for m in MODULES if chosen[m.key] == int(bits)]
    assert bits == 8 or bits - average < min(unraised) / sum(m.weights for m in MODULES)
    assert set(chosen.values()) <= {int(bits), int(bits) + 1}


def test_ends_of_the_stack_come_first():
    chosen = allocate(MODULES, 2 + 2 / 6)
    assert {m.block for m in MODULES if chosen[m.key] == 3} == {0, 5}
    assert all(chosen[m.key] == 3 for m in MODULES if m.block in (0, 5))


def test_average_by_hand():
    modules = [Module("a", 0, 300), Module("b", 1, 100)]
    assert average_bits(modules, {"a": 2, "b": 4}) == 2.5
