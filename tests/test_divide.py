"""Coarse measurements divided by what gradients say of the tensors."""

import json
from dataclasses import replace

import pytest
from test_optimize import run
from tiny_quants import measurement, save_measurement, worth

from exl3.divide import divided, undivided
from exl3.errors import UserError
from exl3.jobs.candidates import Problem
from exl3.measurement import Measurement, read_measurement
from exl3.recipe import read_recipe
from exl3.splice import Quant


@pytest.mark.parametrize("method", ["isolate", "swap"])
@pytest.mark.parametrize("level", [0, 1, 3])
def test_with_true_shares_a_coarse_measurement_is_the_fine_one(tiny, level, method):
    fine = {g.layers: g for g in measurement(tiny, method=method).groups}
    coarse = divided(measurement(tiny, level=level, method=method, parts=True))
    assert [g.idx for g in coarse.groups] == [*range(len(fine))]
    for g in coarse.groups:
        true = fine[g.layers]
        assert (g.block, g.weights, g.bits, g.k) == (true.block, true.weights, true.bits, true.k)
        assert g.sensitivity == pytest.approx(sum(map(worth, g.layers)))
        assert g.kld == (None if method == "swap" else pytest.approx(true.kld))
        for c, expected in zip(g.candidates, true.candidates, strict=True):
            assert (c.dbits, c.k) == (expected.dbits, expected.k)
            assert c.dkld == pytest.approx(expected.dkld)


def test_parts_of_other_bits_lose_by_their_error(tiny):
    """Of a tensor that has as many bits in both quants nothing is gained."""
    (first, *_), told = (m := measurement(tiny, numbers=(0, 1), level=0, parts=True)).groups, 0.01
    same, *others = first.parts
    parts = (replace(same, k=((3,), (3,))), *others)
    group = replace(first, parts=parts, kld=told, kld_error=told / 10)
    found = divided(replace(m, groups=(group,))).groups
    assert sum(g.kld for g in found) == pytest.approx(told)
    assert sum(g.kld_error for g in found) == pytest.approx(told / 10)
    assert found[0].candidates[0].dkld == 0
    gain = sum(g.candidates[0].dkld for g in found)
    assert gain == pytest.approx(group.candidates[0].dkld)
    for g, part in zip(found[1:], others, strict=True):
        ratio = part.share / same.share
        assert g.kld / found[0].kld == pytest.approx(ratio / 0.2225, rel=0.01)  # of 2 and 3 bits


def test_a_measurement_without_parts_stays_as_it_is(tiny):
    told = measurement(tiny, level=1)
    assert divided(told) == told
    known = undivided(measurement(tiny, level=1, parts=True))
    assert tuple(replace(g, sensitivity=None) for g in known.groups) == told.groups


def test_parts_survive_the_file(tiny):
    told = measurement(tiny, level=1, parts=True)
    assert Measurement.from_json(json.loads(json.dumps(told.to_json()))) == told


def test_single_tensors_are_chosen_by_a_coarse_measurement(tiny, tmp_path):
    path = save_measurement(tmp_path / "m.json", tiny, level=0, parts=True)
    assert run("-m", path, "-b", 2.8, "-o", tmp_path / "out") == 0
    bits = {name: layer.bits for name, layer in Quant(tmp_path / "out").layers.items()}
    assert bits["model.layers.1.mlp.down_proj"] > bits["model.layers.1.mlp.up_proj"]
    assert 2.8 - 0.1 < Quant(tmp_path / "out").bpw <= 2.8


def test_whole_groups_are_among_what_is_tried(tiny, tmp_path):
    path = save_measurement(tmp_path / "m.json", tiny, level=1, parts=True)
    quants = tuple(map(Quant, tiny.quants))
    found = {c.name: c for c in Problem(read_measurement(path), quants, 0).candidates(2.8)}
    assert found["the solution"].predicted < found["whole groups"].predicted
    for group in measurement(tiny, level=1).groups:
        assert len({found["whole groups"].splice.origin[key] for key in group.layers}) == 1


def test_a_recipe_of_a_coarse_measurement_is_fine(tiny, tmp_path):
    for name, kind in (("fine", {"level": 4}), ("coarse", {"level": 0, "parts": True})):
        path = save_measurement(tmp_path / f"{name}.json", tiny, **kind)
        assert run("-m", path, "-b", 2.8, "--recipe", tmp_path / f"{name}.yaml") == 0
    fine, coarse = (read_recipe(tmp_path / f"{name}.yaml") for name in ("fine", "coarse"))
    assert (fine.bits, fine.layers) == (coarse.bits, coarse.layers)
    assert fine.kld == pytest.approx(coarse.kld)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ["a.b"]}, "not those of its layers"),
        ({"k": [[2], [3]]}, "no whole part"),
        ({"k": [[2], [3], [9]]}, "from 1 to 8"),
        ({"k": [[2], [3], []]}, "no whole part"),
        ({"bits": [1, 2, -3]}, "no whole part"),
        ({"share": -1}, "share of parts"),
        ({"weights": 0}, "weights of parts"),
    ],
)
def test_damaged_parts(tiny, tmp_path, change, message):
    path = save_measurement(tmp_path / "m.json", tiny, level=0, parts=True)
    content = json.loads(path.read_text())
    content["groups"][0]["parts"][0] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        run("-m", path, "-b", 3, "-o", tmp_path / "out")
