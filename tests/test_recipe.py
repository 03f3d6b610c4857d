"""Recipes: written, read, converted by; and conversions by a measurement."""

import json
import re
from dataclasses import replace

import pytest
from jobs_helpers import flags
from jobs_helpers import run as convert
from tiny_quants import measurement, save_measurement, save_model

from exl3.commands.optimize import main
from exl3.errors import UserError
from exl3.measurement import Quant, write_measurement
from exl3.recipe import Recipe, bits_by_recipe, read_recipe, write_recipe
from exl3.splice import Quant as SpliceQuant

PLAIN = ("--no_correction", "--hessian", "input")


def run(*arguments):
    main([str(a) for a in arguments])


def small(model, out, *more, bits="2.5"):
    """A conversion's command line; bits None: without -b."""
    given = flags(model, out, out.with_name(f"{out.name}-work"), bits, **{"-cr": 3, "-cc": 32})
    if bits is None:
        del given[given.index("-b") : given.index("-b") + 2]
    return [*given, *PLAIN, *map(str, more)]


def without_quants(tiny):
    """As measure.py writes it where only the original is given."""
    told = measurement(tiny, numbers=(0,))
    return replace(told, base=Quant(None, None))


def average(quant):
    layers = [quant.layers[name] for name in quant.decoder]
    return sum(x.bits * x.weights for x in layers) / sum(x.weights for x in layers)


def test_a_recipe_survives_its_file(tmp_path):
    recipe = Recipe(2.5, {"a": 2, "b.*": 3}, "LlamaForCausalLM", "f", "mcg", 6, 2.6, 0.1)
    write_recipe(tmp_path / "r.yaml", recipe)
    assert read_recipe(tmp_path / "r.yaml") == recipe


def test_keys_patterns_and_the_last_word():
    keys = ["layers.0.q", "layers.0.down", "layers.1.q", "layers.1.down"]
    recipe = Recipe(2.5, {"*": 2, "*.down": 3, "layers.1.*": 4, "layers.1.q": 5})
    assert bits_by_recipe(recipe, keys) == dict(zip(keys, (2, 3, 5, 4), strict=True))
    with pytest.raises(UserError, match=r"no bits to layers\.0\.q \(3 layers in all"):
        bits_by_recipe(Recipe(2, {"layers.1.q": 2}), keys)
    with pytest.raises(UserError, match="the model has no such layer"):
        bits_by_recipe(Recipe(2, {"*": 2, "layers.7.*": 3}), keys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "is no YAML file"),
        ("- 1", "is no YAML mapping"),
        ("format: other", "format and version"),
        ("format: exl3-recipe\nversion: 1\nbits: 2", "layers is no mapping"),
        ("format: exl3-recipe\nversion: 1\nbits: 2\nlayers: {a: 9}", "'a': 9, not a key"),
        ("format: exl3-recipe\nversion: 1\nlayers: {a: 2}", "bits is missing"),
        ("format: exl3-recipe\nversion: 1\nbits: .nan\nlayers: {a: 2}", "bits is nan"),
        (
            "format: exl3-recipe\nversion: 1\nbits: 2\nhead_bits: 9\nlayers: {a: 2}",
            "head_bits is 9",
        ),
        (
            "format: exl3-recipe\nversion: 1\nbits: 2\ncodebook: x\nlayers: {a: 2}",
            "codebook is 'x'",
        ),
        ("!!python/object/apply:os.getcwd []", "is no YAML file"),
    ],
)
def test_damaged_recipes(tmp_path, content, message):
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        read_recipe(tmp_path / "r.yaml")


def test_from_a_measurement_of_the_original_alone_to_a_quant(tiny, tmp_path, capsys):
    path, file = tmp_path / "m.json", tmp_path / "r.yaml"
    write_measurement(path, without_quants(tiny))
    with pytest.raises(UserError, match="was made without quants"):
        run("-m", path, "-b", 3, "-o", tmp_path / "out")
    run("-m", path, "-b", 3, "--recipe", file, "-hb", 5, "-r", tiny.model)
    assert "optimality gap 0.00%" in capsys.readouterr().out
    recipe = read_recipe(file)
    assert (
        recipe.layers["model.layers.1.mlp.down_proj"] > recipe.layers["model.layers.0.mlp.up_proj"]
    )
    convert(*small(tiny.model, tmp_path / "out", "--recipe", file, bits=None))
    quant = SpliceQuant(tmp_path / "out")
    assert {name: quant.layers[name].bits for name in quant.decoder} == recipe.layers
    assert quant.head_bits == 5
    assert average(quant) == pytest.approx(recipe.bits, abs=1e-4)
    assert 2.9 < quant.bpw <= 3
    with pytest.raises(UserError, match="is there already"):
        run("-m", path, "-b", 3, "--recipe", file)


def test_recipes_that_ask_for_too_little_or_too_much(tiny, tmp_path):
    path = tmp_path / "m.json"
    write_measurement(path, without_quants(tiny))
    for bits, word in ((1, "below"), (9, "above")):
        with pytest.raises(UserError, match=f"-b {bits} is {word} what layers can have"):
            run("-m", path, "-b", bits, "--recipe", tmp_path / "r.yaml")
    with pytest.raises(UserError, match="-hb 9 is out of range"):
        run("-m", path, "-b", 3, "--recipe", tmp_path / "r.yaml", "-hb", 9)
    with pytest.raises(UserError, match="its folder does not exist"):
        run("-m", path, "-b", 3, "--recipe", tmp_path / "none" / "r.yaml")
    other = save_model(tmp_path / "other", seed=3)
    with pytest.raises(UserError, match="made from other files"):
        run("-m", path, "-b", 3, "--recipe", tmp_path / "r.yaml", "-r", other)


@pytest.fixture
def recipe(tiny, tmp_path):
    path = save_measurement(tmp_path / "m.json", tiny)
    run("-m", path, "-b", 3, "--recipe", tmp_path / "r.yaml")
    return tmp_path / "r.yaml"


def test_a_recipe_defines_its_job(tiny, tmp_path, recipe):
    given = small(tiny.model, tmp_path / "out", "--recipe", recipe, bits=None)
    convert(*given)
    job = json.loads((tmp_path / "out-work" / "job.json").read_text())
    assert job["bits"] == read_recipe(recipe).bits
    convert("-w", str(tmp_path / "out-work"), "-r")  # complete already
    recipe.write_text(recipe.read_text() + "\n")
    with pytest.raises(UserError, match=r"different job \(--recipe was"):
        convert(*given)
    with pytest.raises(UserError, match="has changed since the job began"):
        convert("-w", str(tmp_path / "out-work"), "-o", str(tmp_path / "new"), "-r")


def test_what_contradicts_a_recipe_is_refused(tiny, tmp_path, recipe):
    for more, message in (
        (["-b", "2"], "-b 2 contradicts --recipe"),
        (["-hq"], "-hq changes bits"),
        (["-m", tmp_path / "m.json"], "give one of them"),
    ):
        with pytest.raises(UserError, match=message):
            convert(*small(tiny.model, tmp_path / "x", "--recipe", recipe, *more, bits=None))
    other = save_model(tmp_path / "other", seed=3)
    with pytest.raises(UserError, match="made from other files than those of"):
        convert(*small(other, tmp_path / "y", "--recipe", recipe, bits=None))
    recipe.write_text(recipe.read_text().replace("arch: Llama", "arch: Qwen3"))
    with pytest.raises(UserError, match="is of Qwen3ForCausalLM, but the model is Llama"):
        convert(*small(tiny.model, tmp_path / "z", "--recipe", recipe, bits=None))


def test_converting_by_a_measurement(tiny, tmp_path):
    path = save_measurement(tmp_path / "m.json", tiny)
    convert(*small(tiny.model, tmp_path / "out", "-m", path, bits="3"))
    quant = SpliceQuant(tmp_path / "out")
    assert 2.98 <= average(quant) <= 3
    bits = {name: layer.bits for name, layer in quant.layers.items()}
    assert bits["model.layers.1.mlp.down_proj"] > bits["model.layers.0.mlp.up_proj"]


def test_a_measurement_of_another_model_is_refused(tiny, tmp_path):
    told = measurement(tiny)
    cut = replace(told, groups=told.groups[1:])
    for wrong, message in (
        (replace(told, arch_string="Qwen3ForCausalLM"), "is of Qwen3ForCausalLM"),
        (replace(told, model=replace(told.model, fingerprint="0")), "their hashes differ"),
        (cut, f"the model has {re.escape(told.groups[0].layers[0])}, but the measurement"),
    ):
        path = tmp_path / "wrong.json"
        write_measurement(path, wrong)
        with pytest.raises(UserError, match=message):
            convert(*small(tiny.model, tmp_path / "out", "-m", path, "-nr"))
    assert not (tmp_path / "out").exists()
