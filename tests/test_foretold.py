"""Choices by what gradients foretell, alone and together with what was measured."""

import json
from dataclasses import replace
from math import sqrt

import pytest
from tiny_quants import BITS, measurement

from exl3.divide import divided
from exl3.errors_by_bits import relative_error
from exl3.foretold import foretold
from exl3.jobs.candidates import Problem
from exl3.measurement import Measurement
from exl3.splice import Quant


def misled(measurement):
    """Gradients say that queries matter more than they do."""
    groups = [
        replace(g, sensitivity=g.sensitivity * (10 if "q_proj" in g.layers[0] else 1))
        for g in divided(measurement).groups
    ]
    return replace(measurement, groups=tuple(groups))


def klds(group):
    return [group.kld, *(group.kld + c.dkld for c in group.candidates)]


@pytest.mark.parametrize("method", ["isolate", "swap"])
def test_what_is_foretold_lies_between(tiny, method):
    told = misled(measurement(tiny, level=1, method=method, parts=True))
    true = divided(measurement(tiny, level=1, parts=True))
    alone, between = foretold(told, 1.0), foretold(told, 0.5)
    for g, t, a, b in zip(told.groups, true.groups, alone.groups, between.groups, strict=True):
        expected = [g.sensitivity * relative_error({k: 1}, "mul1") for k in BITS]
        assert klds(a) == pytest.approx(expected)
        means = [sqrt(x * y) for x, y in zip(expected, klds(t), strict=True)]
        assert klds(b) == pytest.approx(means)
        assert [(c.dbits, c.k) for c in b.candidates] == [(c.dbits, c.k) for c in g.candidates]


def test_what_is_not_known_foretells_nothing(tiny):
    assert foretold(measurement(tiny, level=1), 0.5) is None
    told = measurement(tiny, level=1, parts=True)
    (first, *others) = told.groups
    one = replace(told, groups=(replace(first, sensitivity=None), *others))
    assert foretold(one, 1.0) is None


def test_files_of_older_versions_choose_without_gradients(tiny):
    content = measurement(tiny, level=1, parts=True).to_json()
    for g in content["groups"]:
        del g["sensitivity"]
    old = Measurement.from_json(json.loads(json.dumps(content)))
    assert {g.sensitivity for g in old.groups} == {None}
    names = [c.name for c in Problem(old, tuple(map(Quant, tiny.quants)), 0).candidates(2.8)]
    assert "the solution" in names
    assert not {"by gradients", "between"} & set(names)


def test_other_views_make_candidates_judged_by_one_measure(tiny):
    """All KLDs are predicted by what was measured, whatever a choice was made by."""
    told = misled(measurement(tiny, level=1, parts=True))
    problem = Problem(told, tuple(map(Quant, tiny.quants)), 0)
    found = {c.name: c for c in problem.candidates(2.8)}
    assert {"the solution", "by gradients", "between"} <= set(found)
    queries = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert [found["by gradients"].splice.origin[key] for key in queries] == [2, 2]
    assert found["the solution"].predicted < found["between"].predicted
    assert found["between"].predicted < found["by gradients"].predicted
    for candidate in found.values():
        total = sum(klds(g)[candidate.splice.origin[g.layers[0]]] for g in divided(told).groups)
        assert candidate.predicted == pytest.approx(total)
        assert candidate.splice.bpw <= 2.8


def test_true_gradients_choose_as_a_true_measurement(tiny):
    """Then all views are one, and tried once."""
    told = measurement(tiny, level=1, parts=True)
    names = {c.name for c in Problem(told, tuple(map(Quant, tiny.quants)), 0).candidates(2.8)}
    assert "the solution" in names
    assert not {"by gradients", "between"} & names
