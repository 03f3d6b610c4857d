"""util/recompile.py: splices by hand."""

import hashlib
import json

import jobs_helpers
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import save_tiny, save_tokenizer

from exl3.commands.recompile import main
from exl3.errors import UserError
from exl3.format.verify import verify
from exl3.splice import Quant


def run(base, out, overrides, *more):
    main([str(a) for a in ("-i", base, "-o", out, "-or", overrides, *more)])


def write(path, sources, overrides):
    content = {
        "sources": [{"id": id_, "model_dir": str(folder)} for id_, folder in sources.items()],
        "overrides": [{"key": key, "source": source} for key, source in overrides],
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_patterns_and_the_last_word(tiny, tmp_path, capsys):
    q2, q3, q4 = tiny.quants
    overrides = [("*.down_proj", 4), ("model.layers.1.*", "three"), ("lm_head", 4)]
    file = write(tmp_path / "or.yaml", {"three": q3, 4: q4}, overrides)
    out = tmp_path / "out"
    run(q2, out, file, "-ss", 0)
    assert verify(out).problems == []
    found = Quant(out)
    for name, layer in found.layers.items():
        expected = 3 if ".1." in name else 4 if "down" in name else 2
        assert layer.bits == (8 if name == "lm_head" else expected), name
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["head_bits"]) == (round(found.bpw, 2), 8)
    record = json.loads((out / "splice.json").read_text())
    assert [source["name"] for source in record["sources"]] == ["q2", "q3", "q4"]
    assert record["layers"]["model.layers.1.mlp.down_proj"] == {"source": 1, "bits": 3}
    run(q2, out, file)
    assert "complete already" in capsys.readouterr().out


def converted_by(recipe, model, out, *more):
    """A plain quant by a recipe: layer patterns → bits."""
    file = out.with_suffix(".yaml")
    content = {"format": "exl3-recipe", "version": 1, "bits": 2.5, "layers": recipe}
    file.write_text(yaml.safe_dump(content))
    given = {"-i": model, "-o": out, "-w": out.with_suffix(".work"), "--recipe": file}
    given |= {"-cr": 3, "-cc": 32, "-hb": 4, "--check_rows": 0}
    jobs_helpers.run(*(str(x) for pair in given.items() for x in pair), "--no_correction", *more)
    return stored(out)


def stored(folder):
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def test_a_splice_is_what_a_conversion_with_its_bits_gives(tiny, tmp_path):
    """Without correction no layer depends on the bits of others."""
    q2, q3, q4 = tiny.quants
    overrides = [("*.down_proj", "four"), ("model.layers.1.*", "three")]
    run(q2, tmp_path / "out", write(tmp_path / "or.yaml", {"three": q3, "four": q4}, overrides))
    recipe = {"*": 2, "*.down_proj": 4, "model.layers.1.*": 3}
    direct = converted_by(recipe, tiny.model, tmp_path / "direct", "--hessian", "input")
    spliced = stored(tmp_path / "out")
    assert spliced.keys() == direct.keys()
    assert all(torch.equal(spliced[key], direct[key]) for key in direct)


@pytest.mark.slow
def test_likewise_experts_with_hessians_on_both_sides(tmp_path):
    model = tmp_path / "model"
    save_tiny("mixtral", model, num_hidden_layers=2, num_local_experts=4, vocab_size=300)
    save_tokenizer(model)
    plain = [converted_by({"*": bits}, model, tmp_path / f"q{bits}") for bits in (2, 3)]
    mixed = converted_by({"*": 2, "*layers.0.*": 3}, model, tmp_path / "mixed")
    for key, tensor in mixed.items():
        assert torch.equal(tensor, plain["layers.0." in key][key]), key


def test_the_same_splice_has_the_same_bytes(tiny, tmp_path):
    file = write(tmp_path / "or.yaml", {"a": tiny.quants[2]}, [("*.q_proj", "a")])
    for name in ("one", "two"):
        run(tiny.quants[0], tmp_path / name, file)
    one, two = (
        {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / n).iterdir()}
        for n in ("one", "two")
    )
    assert one == two


def test_mixed_codebooks_between_layers(tiny, tmp_path):
    from tiny_quants import convert

    mcg = convert(tiny.model, tmp_path / "mcg", 3, "-cb", "mcg")
    file = write(tmp_path / "or.yaml", {"m": mcg}, [("model.layers.0.*", "m")])
    run(tiny.quants[0], tmp_path / "out", file)
    assert verify(tmp_path / "out").problems == []
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["codebook"] == "mixed"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("*.nothing", "a")], r"\*\.nothing matches no quantized layer"),
        ([("*", "b")], "wants the source b, which is not among the sources"),
        ([], "overrides is no list, or empty"),
    ],
)
def test_overrides_that_mean_nothing(tiny, tmp_path, overrides, message):
    file = write(tmp_path / "or.yaml", {"a": tiny.quants[1]}, overrides)
    with pytest.raises(UserError, match=message):
        run(tiny.quants[0], tmp_path / "out", file)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no YAML mapping"),
        ("sources: 5", "sources is no list, or empty"),
        ("sources: [{id: a}]", "lacks id or model_dir"),
        ("sources: [{id: a, model_dir: x}, {id: a, model_dir: y}]", "two sources have the id a"),
        ("sources: [{id: a, model_dir: 5}]", "model_dir of a is no path"),
        ("sources: [{id: a, model_dir: /nowhere}]", "-or: /nowhere is no folder"),
    ],
)
def test_damaged_overrides(tiny, tmp_path, content, message):
    (tmp_path / "or.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        run(tiny.quants[0], tmp_path / "out", tmp_path / "or.yaml")


def test_nothing_is_written_over(tiny, tmp_path):
    file = write(tmp_path / "or.yaml", {"a": tiny.quants[1]}, [("*", "a")])
    with pytest.raises(UserError, match=r"overlap|holds the result of another job"):
        run(tiny.quants[0], tiny.quants[0], file)
    with pytest.raises(UserError, match="overlap"):
        run(tiny.quants[0], tiny.quants[1] / "out", file)
    with pytest.raises(UserError, match="from 0 on"):
        run(tiny.quants[0], tmp_path / "out", file, "-ss", "-1")
