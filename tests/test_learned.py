"""What measured wholes teach about the options they are made of."""

import itertools

import numpy as np
import pytest
from tiny_quants import measurement

from exl3.jobs.candidates import Problem
from exl3.learned import learned
from exl3.splice import Quant


def total(klds, picks):
    return sum(own[i] for own, i in zip(klds, picks, strict=True))


LADDERS = [[4.0, 1.0, 0.25]] * 3
APART = [0, 1, 2]  # families of their own
TURNS = [(0, 1, 2), (1, 2, 0), (2, 0, 1)]  # alike by what is predicted


def test_sums_come_out_as_measured():
    klds = [5.00, 5.01, 5.02]
    found = learned(LADDERS, APART, TURNS, klds)
    for pick, kld in zip(TURNS, klds, strict=True):
        assert total(found, pick) == pytest.approx(kld, rel=1e-3)


def test_worse_wholes_are_believed_less():
    klds = [5.0, 5.5, 8.0]
    found = [total(learned(LADDERS, APART, TURNS, klds), pick) for pick in TURNS]
    before = np.exp(np.log(klds).mean())  # of all, for they were predicted alike
    left = [abs(own - kld) / abs(before - kld) for own, kld in zip(found, klds, strict=True)]
    assert left == sorted(left)
    assert left[0] < 0.01 < 0.05 < left[2]


def test_a_common_factor_is_no_news():
    predicted = [[4.0, 1.0], [8.0, 2.0]]
    found = learned(predicted, [0, 1], [(0, 1), (1, 0)], [3 * 6.0, 3 * 9.0])
    assert np.allclose(found, [[12.0, 3.0], [24.0, 6.0]])


def test_what_was_in_the_worse_whole_is_thought_worse():
    predicted = [[4.0, 1.0], [4.0, 1.0], [4.0, 1.0]]
    found = learned(predicted, APART, [(0, 1, 1), (1, 0, 1)], [7.0, 5.0])
    ratios = np.array(found) / np.array(predicted)
    assert ratios[0, 0] > ratios[2, 0] > ratios[1, 0]


def test_what_is_worse_makes_its_family_worse():
    """Two groups that no whole tells apart from others, but one is kin of what was worse."""
    predicted = [[4.0, 1.0]] * 4
    picks, klds = [(0, 1, 1, 1), (1, 1, 1, 0)], [9.0, 7.0]
    found = learned(predicted, ["a", "a", "b", "b"], picks, klds)
    assert found[0][0] > found[1][0] > found[2][0] > found[3][0]
    apart = learned(predicted, range(4), picks, klds)
    assert apart[1] == pytest.approx(apart[2])


def test_a_factor_can_be_large():
    """An option does five times the harm that was predicted of it."""
    predicted = [[4.0, 1.0]] * 6
    truth = [[20.0, 5.0], *predicted[1:]]
    picks = [tuple(int(g != i) for g in range(6)) for i in range(6)]
    found = learned(predicted, range(6), picks, [total(truth, pick) for pick in picks])
    assert found[0][0] / found[1][0] > 2.5


def test_nothing_is_less_than_nothing():
    found = learned([[1.0, 0.1], [1.0, 0.1]], [0, 1], [(0, 1), (1, 0), (0, 0)], [10.0, 0.1, 0.2])
    assert min(itertools.chain(*found)) >= 0


def test_no_whole_and_no_harm():
    with pytest.raises(ValueError, match="nothing was measured"):
        learned([[1.0, 0.1]], [0], [], [])
    assert learned([[1.0, 0.0]], [0], [(1,)], [0.3]) == [[1.0, 0.0]]
    assert learned([[1.0, 0.5]], [0], [(1,)], [0.0]) == [[1.0, 0.5]]


def test_what_is_learned_is_nearer_to_the_truth():
    """Of other wholes than were measured, as far as they differ among themselves."""

    def gain(seed):
        rng = np.random.default_rng(seed)
        truth = np.exp(0.5 * rng.normal(size=(20, 1))) * np.array([1.0, 0.25, 0.06])
        predicted = truth * np.exp(0.3 * rng.normal(size=truth.shape))
        picks = np.ones((60, 20), dtype=int)
        picks[:, :8] = rng.integers(0, 3, (60, 8))
        picks = sorted(picks.tolist(), key=lambda pick: total(truth, pick))[:40]
        rng.shuffle(picks)
        sums = [total(truth, pick) for pick in picks]

        def error(klds):
            off = [total(klds, p) / of - 1 for p, of in zip(picks[20:], sums[20:], strict=True)]
            return np.std(off)

        found = learned(predicted.tolist(), range(20), picks[:20], sums[:20])
        return error(found) / error(predicted)

    assert np.mean([gain(seed) for seed in range(20)]) < 0.8


def test_choices_taught_are_new_and_fit(tiny):
    problem = Problem(measurement(tiny, level=1, parts=True), tuple(map(Quant, tiny.quants)), 0)
    tried = problem.candidates(2.8)
    trials = [(c, c.predicted) for c in tried]
    found = problem.taught(trials, 2.8, ["a", "b", "c"])
    assert [c.name for c in found] == ["a", "b", "c"]
    origins = [c.splice.origin for c in (*tried, *found)]
    assert all(a != b for i, a in enumerate(origins) for b in origins[:i])
    assert all(c.splice.bpw <= 2.8 for c in found)
    assert problem.taught(trials, 2.8, ["a", "b", "c"]) == found


def test_taught_choices_find_what_the_measurement_missed(tiny):
    """One projection does ten times the harm that is predicted of it."""
    problem = Problem(measurement(tiny, level=1, parts=True), tuple(map(Quant, tiny.quants)), 0)
    missed = "model.layers.0.mlp.up_proj"

    def harm(candidate):
        origin = candidate.splice.origin
        return sum(
            (10 if missed in group.layers else 1) * own[origin[group.layers[0]]].kld
            for group, own in zip(problem.groups, problem.options, strict=True)
        )

    trials = [(c, harm(c)) for c in problem.candidates(2.8)]
    first = min(kld for _, kld in trials)
    for _ in range(3):
        trials += [(c, harm(c)) for c in problem.taught(trials, 2.8, ["a", "b", "c"])]
    best, kld = min(trials, key=lambda trial: trial[1])
    assert kld < 0.9 * first
    assert best.splice.origin[missed] > 0
