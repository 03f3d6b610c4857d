"""The knapsack solver, and bits under an average."""

import itertools
import random
from types import SimpleNamespace

import pytest

from exl3.allocate import Option, ends_first, solution, solve, sure_gains
from exl3.jobs.plan import Module, allocate, average_bits
from exl3.sensitivity import share_of_tokens

NAMES = (("attn.q_proj", 4096), ("attn.k_proj", 1024), ("mlp.down_proj", 12288))
MODULES = [
    Module(f"layers.{block}.{name}", block, weights)
    for block in range(6)
    for name, weights in NAMES
]
TOTAL = sum(m.weights for m in MODULES)


def random_groups(chance, groups=5):
    return [
        [
            Option(16 * chance.choice((1, 3, 7)) * k, chance.uniform(0.5, 1) * 4.0**-k, 0.01 * k)
            for k in chance.sample(range(1, 6), 3)
        ]
        for _ in range(chance.randint(1, groups))
    ]


def every_choice(groups, budget):
    for picked in itertools.product(*(range(len(options)) for options in groups)):
        if sum(options[i].bits for options, i in zip(groups, picked, strict=True)) <= budget:
            yield picked


def total(gains, picked):
    return sum(own[i] for own, i in zip(gains, picked, strict=True))


@pytest.mark.parametrize("caution", [0.0, 1.0])
def test_the_solver_finds_the_best_of_all_choices(caution):
    chance = random.Random(0)
    for _ in range(60):
        groups = random_groups(chance)
        low, high = (sum(f(o.bits for o in own) for own in groups) for f in (min, max))
        budget = chance.randint(low, high)
        gains = sure_gains(groups, caution)
        best = max(total(gains, picked) for picked in every_choice(groups, budget))
        found = solve(groups, budget, caution=caution)
        assert found.bits <= budget
        assert total(gains, found.picked) == pytest.approx(best, rel=1e-6, abs=1e-12)
        assert found == solve(groups, budget, caution=caution)


def test_a_budget_below_everything_has_no_solution():
    groups = [[Option(16, 1.0), Option(32, 0.5)]]
    assert solve(groups, 15) is None
    assert ends_first(groups, [0], 15) is None


def test_a_sure_gain_outranks_a_greater_one_within_its_error():
    groups = [
        [Option(2, 1.0), Option(3, 0.0, error=1.0)],
        [Option(2, 1.0), Option(3, 0.9, error=0.01)],
    ]
    assert solve(groups, 5).picked == (0, 1)
    assert solve(groups, 5, caution=0.0).picked == (1, 0)
    assert solve(groups, 6).picked == (1, 1)  # what is left goes to unsure gains


def test_more_bits_are_never_worse_whatever_was_measured():
    groups = [[Option(2, 1.0), Option(3, 1.1), Option(4, 0.2)]]
    assert sure_gains(groups, 1.0) == [[0.0, 0.0, 0.8]]
    assert solve(groups, 4).picked == (2,)
    assert solve([[Option(2, 1.0), Option(3, 1.1)]], 3).picked == (1,)


def test_of_equals_the_first_wins():
    groups = [[Option(2, 1.0), Option(3, 0.5)] for _ in range(8)]
    assert solve(groups, 19).picked == (1, 1, 1, 0, 0, 0, 0, 0)


def test_least_is_kept_where_it_can_be():
    # The first gains most for its bits and leaves 30 unused.
    groups = [
        [Option(0, 1.0), Option(70, 0.0)],
        [Option(0, 1.0), Option(50, 0.6)],
        [Option(0, 1.0), Option(50, 0.7)],
    ]
    assert solve(groups, 100, caution=0).bits == 70
    found = solve(groups, 100, least=90)
    assert (found.picked, found.bits) == ((0, 1, 1), 100)
    assert solve(groups, 80, least=75).bits == 70  # not possible


def test_excluded_choices_stay_away():
    groups = [[Option(2, 1.0), Option(3, 0.9 - 0.01 * i)] for i in range(10)]
    best = solve(groups, 25)
    other = solve(groups, 25, excluded=[best.picked], apart=4)
    assert sum(a != b for a, b in zip(best.picked, other.picked, strict=True)) >= 4
    assert other.bits == best.bits and other.kld > best.kld


def test_many_groups_of_large_layers_stay_within_the_budget():
    chance = random.Random(1)
    sizes = [4096 * chance.choice((1024, 4096, 14336)) for _ in range(400)]
    groups = [
        [Option(n * k + 16 * 8192, chance.lognormvariate(0, 1) * n * 4.0**-k) for k in (2, 3, 4)]
        for n in sizes
    ]
    budget = int(2.6 * sum(sizes))
    found = solve(groups, budget, least=budget - sum(sizes) // 50)
    assert budget - sum(sizes) // 50 <= found.bits <= budget
    assert found.gap < 1e-3
    assert found == solution(groups, found.picked, found.gap)


def test_ends_of_the_stack_come_first():
    options = [[Option(k * m.weights, 0.0) for k in (2, 3)] for m in MODULES]
    found = ends_first(options, [m.block for m in MODULES], 2 * TOTAL + TOTAL // 3)
    raised = {m.block for m, i in zip(MODULES, found.picked, strict=True) if i}
    assert raised == {0, 5}
    assert found.bits == 2 * TOTAL + TOTAL // 3


# -- Bits of a conversion ------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 1.1, 2, 2.25, 2.5, 3.33, 4.9, 7.99, 8])
def test_average_is_met_and_never_exceeded(bits):
    chosen = allocate(MODULES, bits)
    average = average_bits(MODULES, chosen)
    assert bits - 0.02 <= average <= bits + 1e-9
    assert list(chosen) == [m.key for m in MODULES]
    around = range(max(1, int(bits) - 1), min(8, int(bits) + 2) + 1)
    assert set(chosen.values()) <= set(around)


def test_sensitive_layers_get_more():
    worth = {m.key: m.weights * (20.0 if "layers.3" in m.key else 1.0) for m in MODULES}
    for bits in (3, 3.3):
        chosen = allocate(MODULES, bits, worth)
        assert bits - 0.02 <= average_bits(MODULES, chosen) <= bits
        raised = [chosen[m.key] for m in MODULES if "layers.3" in m.key]
        others = [chosen[m.key] for m in MODULES if "layers.3" not in m.key]
        assert min(raised) >= max(others)
        assert max(raised) > min(others)


def test_whole_bits_are_shared_out_within_a_bit_below_and_two_above():
    worth = {m.key: 100.0**m.block for m in MODULES}
    chosen = allocate(MODULES, 4, worth).values()
    assert (min(chosen), max(chosen)) == (3, 6)
    assert set(allocate(MODULES, 1, worth).values()) == {1}
    assert set(allocate(MODULES, 8, worth).values()) == {8}


def test_experts_of_a_kind_are_alike():
    modules = [
        Module(f"layers.{block}.{name}", block, 16384)
        for block in range(4)
        for name in (
            *(f"self_attn.{x}_proj" for x in "qkvo"),
            *(f"mlp.experts.{e}.{x}_proj" for e in range(8) for x in ("gate", "up", "down")),
        )
    ]
    chance = random.Random(0)
    worth = {m.key: chance.lognormvariate(0, 2) for m in modules}
    chosen = allocate(modules, 2.56, worth)
    assert 2.54 <= average_bits(modules, chosen) <= 2.56
    for block in range(4):
        for x in ("gate", "up", "down"):
            experts = (f"layers.{block}.mlp.experts.{e}.{x}_proj" for e in range(8))
            assert len({chosen[key] for key in experts}) == 1
    assert len(set(chosen.values())) > 2


def test_the_share_of_tokens_that_an_expert_gets():
    assert share_of_tokens(SimpleNamespace()) == 1.0
    assert share_of_tokens(SimpleNamespace(num_experts_per_tok=2, num_local_experts=8)) == 0.25
    assert share_of_tokens(SimpleNamespace(num_experts_per_tok=9, n_routed_experts=8)) == 1.0


def test_average_by_hand():
    modules = [Module("a", 0, 300), Module("b", 1, 100)]
    assert average_bits(modules, {"a": 2, "b": 4}) == 2.5


def test_random_sizes_come_within_two_hundredths_where_any_choice_does():
    chance = random.Random(0)
    for _ in range(40):
        modules = [
            Module(f"{i // 3}.x{i}_proj", i // 3, 16384 * chance.randint(1, 40))
            for i in range(chance.randint(2, 12))
        ]
        bits = chance.uniform(1, 8)
        weights = sum(m.weights for m in modules)
        average = average_bits(modules, allocate(modules, bits))
        best = max(
            sum(m.weights for i, m in enumerate(modules) if choice >> i & 1)
            for choice in range(1 << len(modules))
            if sum(m.weights for i, m in enumerate(modules) if choice >> i & 1)
            <= (bits - int(bits)) * weights + 1e-6
        )
        assert average <= bits + 1e-9
        assert bits - average <= max(0.02, bits - int(bits) - best / weights + 1e-9)
