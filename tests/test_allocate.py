"""Bits under an average."""

import random

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


def test_exact_filling_where_the_order_leaves_too_much():
    # In order: 60 fits and leaves 30, where nothing fits. 50 + 40 fill it.
    modules = [Module("a", 0, 60), Module("b", 1, 50), Module("c", 2, 40), Module("d", 3, 150)]
    chosen = allocate(modules, 2 + 90 / 300)
    assert chosen == {"a": 2, "b": 3, "c": 3, "d": 2}


def test_random_sizes_come_within_two_hundredths_where_any_choice_does():
    chance = random.Random(0)
    for _ in range(200):
        modules = [
            Module(str(i), i // 3, 16384 * chance.randint(1, 40))
            for i in range(chance.randint(2, 12))
        ]
        bits = chance.uniform(1, 8)
        total = sum(m.weights for m in modules)
        average = average_bits(modules, allocate(modules, bits))
        best = max(
            sum(m.weights for i, m in enumerate(modules) if choice >> i & 1)
            for choice in range(1 << len(modules))
            if sum(m.weights for i, m in enumerate(modules) if choice >> i & 1)
            <= (bits - int(bits)) * total + 1e-6
        )
        assert average <= bits + 1e-9
        assert bits - average <= max(0.02, bits - int(bits) - best / total + 1e-9)
