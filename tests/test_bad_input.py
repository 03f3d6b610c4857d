"""A typo in every path, every flag, every file: one sentence, exit code 2, nothing left behind."""

import json

import pytest
from jobs_helpers import flags
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, save_tokenizer

from exl3 import cli, commands

SIZES = {"hidden_size": 128, "intermediate_size": 192, "vocab_size": 300, "num_hidden_layers": 2}


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    save_tiny("llama", folder, **SIZES)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Runs convert.py as a user; returns what it says on stderr."""
    monkeypatch.chdir(tmp_path)

    def refused(*arguments):
        with pytest.raises(SystemExit) as end:
            cli.run(lambda: commands.convert.main([str(a) for a in arguments], "convert.py"))
        said = capsys.readouterr().err
        assert end.value.code == 2, said
        assert "Traceback" not in said
        assert not (tmp_path / "out").exists()
        return said

    return refused


def job(model, tmp_path, **more):
    return flags(model, tmp_path / "out", tmp_path / "work", **more)


def test_a_typo_in_every_path(model, tmp_path, refused):
    (tmp_path / "file").write_text("not a folder")
    for changed, message in (
        ({"-i": tmp_path / "modle"}, "-i"),
        ({"-i": tmp_path / "file"}, "is no folder; give the folder of a Hugging Face model"),
        ({"-o": tmp_path / "file"}, "is a file; give a folder that does not exist yet"),
        ({"-o": tmp_path / "file" / "x"}, "cannot be written to"),
        ({"-w": tmp_path / "file" / "x"}, "cannot be written to"),
        ({"-o": model}, "-i and -o are the same folder"),
        ({"-w": model}, "holds something that is no job"),
        ({"-c": tmp_path / "missing.txt"}, "is no file"),
        ({"-c": tmp_path / "file"}, "cannot read this kind of file"),
    ):
        assert message in refused(*job(model, tmp_path, **changed))


def test_a_typo_in_every_flag(model, tmp_path, refused):
    from exl3.jobs.flags import convert_parser

    for action in convert_parser()._actions:
        for spelling in action.option_strings:
            if spelling.startswith("--"):
                said = refused(*job(model, tmp_path), spelling[:-2] + spelling[-1])
                assert said.startswith(f"Error: there is no flag {spelling[:-2]}{spelling[-1]}")
                assert said.count("\n") == 1
    assert "(did you mean --head_bits?)" in refused(*job(model, tmp_path), "--head_bit", "3")
    assert "invalid float value: 'three'" in refused(*job(model, tmp_path, bits="three"))


@pytest.mark.parametrize("text", ["", "  \n", "a\0b"])
def test_empty_and_binary_calibration_files(model, tmp_path, refused, text):
    (tmp_path / "cal.txt").write_text(text)
    said = refused(*job(model, tmp_path, **{"-c": tmp_path / "cal.txt"}))
    assert "cal.txt: " in said
    assert "the file holds no text" in said or "a binary file" in said


def test_too_short_a_calibration_file(model, tmp_path, refused):
    (tmp_path / "cal.txt").write_text("too short")
    said = refused(*job(model, tmp_path, **{"-c": tmp_path / "cal.txt"}))
    assert "less than one row of 64; give a longer one or shorter rows" in said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 10**12),
        ("hidden_size", -1),
        ("hidden_size", "many"),
        ("num_attention_heads", 0),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 0),
        ("vocab_size", 10**15),
        ("intermediate_size", None),
        ("model_type", "unheard_of"),
        ("model_type", 7),
        ("rope_parameters", "yes"),
        ("max_position_embeddings", "long"),
    ],
)
def test_absurd_configs(model, tmp_path, refused, key, value):
    config = json.loads((model / "config.json").read_text())
    config[key] = value
    (model / "config.json").write_text(json.dumps(config))
    assert "config.json" in refused(*job(model, tmp_path))


@pytest.mark.parametrize("content", ["", "[]", "{", "null", "\xff"])
def test_broken_configs(model, tmp_path, refused, content):
    (model / "config.json").write_text(content, encoding="latin-1")
    assert "config.json" in refused(*job(model, tmp_path))


def test_damaged_shards(model, tmp_path, refused):
    path = model / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors is truncated: " in refused(*job(model, tmp_path))
    path.write_bytes(b"")
    assert "model.safetensors" in refused(*job(model, tmp_path))
    path.unlink()
    assert "safetensors" in refused(*job(model, tmp_path))


def test_missing_and_misshapen_tensors(model, tmp_path, refused):
    path = model / "model.safetensors"
    tensors = load_file(path)
    gone = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, path, {"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refused(*job(model, tmp_path))
    save_file({**tensors, "model.layers.1.mlp.up_proj.weight": gone[:64].clone()}, path)
    assert "model.layers.1.mlp.up_proj.weight is (64, 128)" in refused(*job(model, tmp_path))


def test_no_tokenizer(model, tmp_path, refused):
    for path in model.glob("tokenizer*"):
        path.unlink()
    assert "the tokenizer of" in refused(*job(model, tmp_path))


def test_an_index_that_leaves_the_folder(model, tmp_path, refused):
    save_tiny("llama", model, shard_size="200KB", **SIZES)
    (model / "model.safetensors").unlink(missing_ok=True)
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    key = next(iter(content["weight_map"]))
    content["weight_map"][key] = "../../etc/passwd"
    index.write_text(json.dumps(content))
    assert "../../etc/passwd" in refused(*job(model, tmp_path))
