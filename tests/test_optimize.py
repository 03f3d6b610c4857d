"""util/optimize.py on tiny quants: what is chosen, checked, written, refused."""

import hashlib
import json
import math
import shutil
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny
from tiny_quants import BITS, convert, measurement, save_measurement, save_model

from exl3.commands.optimize import main
from exl3.errors import UserError
from exl3.evaluate.compare import compare
from exl3.format.verify import verify
from exl3.jobs import splice_check
from exl3.jobs.candidates import Problem
from exl3.jobs.splice_check import held_out_rows, measure, notes_of
from exl3.measurement import Measurement, read_measurement, write_measurement
from exl3.model.rope import Rope
from exl3.model.spliced import SplicedCheckpoint
from exl3.model.streamed import StreamedModel
from exl3.splice import Quant, Splice


def run(*arguments) -> int:
    """The command; its exit code."""
    try:
        main([str(a) for a in arguments])
    except SystemExit as left:
        return left.code
    return 0


def tree(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def file(tiny, tmp_path):
    return save_measurement(tmp_path / "measurement.json", tiny)


# -- What is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("bitrate", [2.6, 3.0, 3.7])
def test_a_splice_is_sound_within_its_budget_and_tells_its_origin(tiny, file, tmp_path, bitrate):
    out = tmp_path / "out"
    assert run("-m", file, "-b", bitrate, "-o", out) == 0
    report = verify(out)
    assert report.problems == []
    found = Quant(out)
    assert bitrate - 0.1 < found.bpw <= bitrate
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["bits"] == round(found.bpw, 2)
    assert config["head_bits"] == found.head_bits == 4
    record = json.loads((out / "splice.json").read_text())
    assert record["target"] == bitrate and record["predicted_kld"] > 0
    stored = {p.name: load_file(p / "model.safetensors") for p in tiny.quants}
    for key, tensor in load_file(out / "model.safetensors").items():
        module = record["layers"][key.rpartition(".")[0]]
        source = record["sources"][module["source"]]
        assert torch.equal(tensor, stored[source["name"]][key]), key
        assert source["fingerprint"] == Quant(tiny.quants[module["source"]]).fingerprint
    chosen = {layer["bits"] for key, layer in record["layers"].items() if "_proj" in key}
    assert len(chosen) > 1
    assert not (tmp_path / "out.exl3-verified").exists()
    assert not (tmp_path / "out.exl3-partial").exists()


def test_what_matters_gets_the_bits(tiny, file, tmp_path):
    assert run("-m", file, "-b", 3.0, "-o", tmp_path / "out") == 0
    bits = {name: layer.bits for name, layer in Quant(tmp_path / "out").layers.items()}
    assert bits["model.layers.1.mlp.down_proj"] > bits["model.layers.0.mlp.up_proj"]


def test_the_head_is_chosen_by_its_bits(tiny, file, tmp_path, capsys):
    assert run("-m", file, "-b", 2.8, "-o", tmp_path / "out", "-hb", 8) == 0
    assert Quant(tmp_path / "out").head_bits == 8
    with pytest.raises(UserError, match=r"none of the quants has such a head \(they have 4, 6, 8"):
        run("-m", file, "-b", 2.8, "-o", tmp_path / "other", "-hb", 5)


def test_a_head_without_bits_of_its_own(tiny, tmp_path):
    plain = convert(tiny.model, tmp_path / "plain", 3, head_bits=16)
    path = save_measurement(tmp_path / "m.json", tiny, numbers=(0, 1))
    given = ("-i", tiny.quants[0], plain, "-m", path, "-b", 2.7)
    assert run(*given, "-o", tmp_path / "a", "-hb", 16) == 0
    assert verify(tmp_path / "a").problems == []
    assert Quant(tmp_path / "a").head_bits == 16


def test_shards_hold_the_same_tensors(tiny, file, tmp_path):
    for name, size in (("one", 0), ("many", 1)):
        assert run("-m", file, "-b", 3, "-o", tmp_path / name, "-ss", size) == 0
    assert verify(tmp_path / "many").problems == []


def test_the_same_command_again_says_that_all_is_there(tiny, file, tmp_path, capsys):
    given = ("-m", file, "-b", 3, "-o", tmp_path / "out")
    assert run(*given) == 0
    before = tree(tmp_path / "out")
    assert run(*given) == 0
    assert "complete already" in capsys.readouterr().out
    assert tree(tmp_path / "out") == before
    with pytest.raises(UserError, match="result of another job"):
        run("-m", file, "-b", 3.1, "-o", tmp_path / "out")


@pytest.mark.parametrize("place", ["write_weights", "write_configs", "copy_small_files"])
def test_killed_and_started_again_it_ends_in_the_same_bytes(
    tiny,
    file,
    tmp_path,
    monkeypatch,
    place,
):
    given = ("-m", file, "-b", 3, "-o", tmp_path / "out")
    assert run(*given) == 0
    whole = tree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(f"exl3.splice.{place}", _killed)
        with pytest.raises(KeyboardInterrupt):
            run(*given)
    assert not (tmp_path / "out").exists()
    assert run(*given) == 0
    assert tree(tmp_path / "out") == whole


def _killed(*args, **more):
    raise KeyboardInterrupt


# -- Measured for real ---------------------------------------------------------------------------


def test_splices_measured_in_place_are_as_those_written(tiny, file, tmp_path):
    rows = held_out_rows(tiny.model, 4, None, False)
    problem = Problem(read_measurement(file), tuple(map(Quant, tiny.quants)), 0)
    best = problem.candidates(3.0)[0]
    plain = problem.plain(1)
    with notes_of(tmp_path / "x") as notes:
        found = measure(tiny.model, [best.splice, plain.splice], rows, notes, quiet=True)
    assert run("-m", file, "-b", 3, "-o", tmp_path / "out") == 0
    (_, written) = compare(tiny.model, [tmp_path / "out"], rows)
    assert found[0].kld == pytest.approx(written.kld, rel=1e-9)
    assert found[1].kld != found[0].kld


def test_the_original_runs_once_for_all_rounds(tiny, file, tmp_path, monkeypatch):
    rows = held_out_rows(tiny.model, 4, None, False)
    problem = Problem(read_measurement(file), tuple(map(Quant, tiny.quants)), 0)
    splices = [problem.plain(i).splice for i in range(3)]
    loaded, kept, own = [], [], StreamedModel.load_block

    def load_block(model, i):
        loaded.append(model.checkpoint)
        return own(model, i)

    monkeypatch.setattr(StreamedModel, "load_block", load_block)
    with notes_of(tmp_path / "x") as notes:
        found = [measure(tiny.model, [s], rows, notes, quiet=True, kept=kept) for s in splices]
    originals = [c for c in loaded if not isinstance(c, SplicedCheckpoint)]
    assert len(loaded) == 2 * 4 and len(originals) == 2  # blocks, of the original and three splices
    with notes_of(tmp_path / "y") as notes:
        assert measure(tiny.model, splices, rows, notes, quiet=True) == [one for (one,) in found]


def test_the_original_is_measured_with_the_quants_rotary_embeddings(tiny, file, tmp_path, capsys):
    quants = []
    for quant in tiny.quants:
        quants.append(tmp_path / quant.name)
        shutil.copytree(quant, quants[-1])
        config = json.loads((quants[-1] / "config.json").read_text())
        config["rope_parameters"] |= {"rope_type": "linear", "factor": 2.0}  # as of -rs 2
        (quants[-1] / "config.json").write_text(json.dumps(config))
    given = ("-m", file, "-b", 3, "-r", tiny.model, "--verify", 2, "--force", "-i", *quants)
    assert run(*given, "-o", tmp_path / "out") == 0
    assert "the original is run with them" in capsys.readouterr().out
    rows = held_out_rows(tiny.model, 2, None, False)
    (_, alike) = compare(tiny.model, [tmp_path / "out"], rows, rope=Rope(scale=2.0))
    (_, other) = compare(tiny.model, [tmp_path / "out"], rows)
    record = json.loads((tmp_path / "out" / "splice.json").read_text())
    assert record["kld"] == pytest.approx(alike.kld, rel=1e-6)
    assert other.kld != pytest.approx(alike.kld, rel=1e-3)
    given = ("-m", file, "-b", 3, "-i", tiny.quants[0], *quants[1:], "-o", tmp_path / "no")
    with pytest.raises(UserError, match=r"rope_parameters of config\.json is"):
        run(*given)


def test_the_best_measured_is_written_and_recorded(tiny, file, tmp_path, capsys):
    given = ("-m", file, "-b", 3.5, "-r", tiny.model, "--verify", 3, "--force")
    assert run(*given, "-o", tmp_path / "out") == 0
    text = capsys.readouterr().out
    assert "On 3 held-out rows of 128 tokens" in text and "straight line" in text
    record = json.loads((tmp_path / "out" / "splice.json").read_text())
    tried = {trial["name"]: trial for trial in record["tried"]}
    assert {"q2", "q3", "q4", "the solution"} <= set(tried)
    assert "learned 1" in tried
    splices = [trial for name, trial in tried.items() if not name.startswith("q")]
    assert record["kld"] == min(trial["kld"] for trial in splices)
    low, high = tried["q3"], tried["q4"]
    share = (Quant(tmp_path / "out").bpw - low["bpw"]) / (high["bpw"] - low["bpw"])
    line = low["kld"] + share * (high["kld"] - low["kld"])
    assert record["straight_line"] == pytest.approx(line)


def test_no_rounds_no_more_choices(tiny, file, tmp_path, monkeypatch):
    tried = {}
    klds = count(100, -1)

    def measured(original, splices, *more, **options):  # every one better than those before
        return [splice_check.Measured(float(next(klds)), 0.1) for _ in splices]

    monkeypatch.setattr("exl3.jobs.optimize.measure", measured)
    for rounds in (0, 1, 2):
        given = ("-m", file, "-b", 3.5, "-r", tiny.model, "--verify", 2, "--rounds", rounds)
        assert run(*given, "-o", tmp_path / f"{rounds}") == 0
        record = json.loads((tmp_path / f"{rounds}" / "splice.json").read_text())
        tried[rounds] = [t["name"] for t in record["tried"] if t["name"].startswith("learned")]
    assert {rounds: len(names) for rounds, names in tried.items()} == {0: 0, 1: 3, 2: 6}


def test_what_was_measured_is_not_measured_again_after_a_kill(
    tiny,
    file,
    tmp_path,
    monkeypatch,
):
    given = ("-m", file, "-b", 3.5, "-r", tiny.model, "--verify", 2, "--force")
    assert run(*given, "-o", tmp_path / "whole") == 0
    with monkeypatch.context() as patched:
        patched.setattr("exl3.jobs.optimize.write_splice", _killed)
        with pytest.raises(KeyboardInterrupt):
            run(*given, "-o", tmp_path / "out")
    notes = tmp_path / "out.exl3-verified"
    notes.write_text(notes.read_text() + '{"key": "cut sho')
    with monkeypatch.context() as patched:
        patched.setattr(splice_check, "_measure", _killed)
        assert run(*given, "-o", tmp_path / "out") == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert not notes.exists()


def test_nothing_better_than_a_plain_quant_ends_with_code_3(
    tiny,
    file,
    tmp_path,
    monkeypatch,
    capsys,
):
    numbers = count()

    def measured(original, splices, *more, **options):
        return [splice_check.Measured(float(next(numbers)), 0.1) for _ in splices]

    monkeypatch.setattr("exl3.jobs.optimize.measure", measured)
    given = ("-m", file, "-b", 3.5, "-o", tmp_path / "out", "-r", tiny.model)
    assert run(*given) == 3
    assert "no choice of 3.5 bits beats" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    numbers = count()
    assert run(*given, "--force") == 0
    assert (tmp_path / "out").exists()


def _corrected(quant: Path, out: Path) -> Path:
    shutil.copytree(quant, out)
    for name in ("config.json", "quantization_config.json"):
        content = json.loads((out / name).read_text())
        inner = content.get("quantization_config", content)
        inner["producer"]["correction"] = True
        (out / name).write_text(json.dumps(content))
    return out


def test_corrected_quants_are_measured_or_refused(tiny, file, tmp_path, monkeypatch, capsys):
    quants = [_corrected(q, tmp_path / f"c{b}") for q, b in zip(tiny.quants, BITS, strict=True)]
    given = ("-i", *quants, "-m", file, "-b", 3.5)
    with pytest.raises(UserError, match="--no_correction"):
        run(*given, "-o", tmp_path / "out")
    # Better than the plain quant below it, but not than the line: refused for these alone.
    klds = {(0,): 1.0, (1,): 0.5, (2,): 0.1}

    def measured(original, splices, *more, **options):
        sources = [tuple({s.origin[key] for key in s.quants[0].decoder}) for s in splices]
        return [splice_check.Measured(klds.get(own, 0.49), 0.0) for own in sources]

    monkeypatch.setattr("exl3.jobs.optimize.measure", measured)
    assert run(*given, "-o", tmp_path / "out", "-r", tiny.model) == 3
    assert "mixed they lose more than they win" in capsys.readouterr().err
    assert run("-m", file, "-b", 3.5, "-o", tmp_path / "out", "-r", tiny.model) == 0
    assert "NOT below" in capsys.readouterr().out


# -- Other quants than those measured ------------------------------------------------------------


@pytest.mark.parametrize("method", ["isolate", "swap"])
def test_another_pair_is_predicted_with_a_warning(tiny, tmp_path, capsys, method):
    path = save_measurement(tmp_path / "m.json", tiny, numbers=(0, 1), method=method)
    out = tmp_path / "out"
    assert run("-i", *tiny.quants[1:], "-m", path, "-b", 3.6, "-o", out) == 0
    assert "Warning: measured at 2" in capsys.readouterr().out
    exact = save_measurement(tmp_path / "exact.json", tiny, numbers=(1, 2))
    assert run("-m", exact, "-b", 3.6, "-o", tmp_path / "exact") == 0
    assert "Warning" not in capsys.readouterr().out
    # Made by the same rule that predicts, so the choice is the same.
    layers = [
        json.loads((p / "splice.json").read_text())["layers"] for p in (out, tmp_path / "exact")
    ]
    assert layers[0] == layers[1]


def test_measurements_of_exllamav3_are_read(tiny, tmp_path):
    told = measurement(tiny, numbers=(0, 1)).to_json()
    foreign = {
        "base": {"dir": told["base"]["dir"], "bpw": 2.04},
        "alts": [{"dir": told["alts"][0]["dir"], "bpw": 3.04}],
        "base_kld": 0.1,
        "arch_string": "LlamaForCausalLM",
        "groups": [
            {
                "idx": g["idx"],
                "layers": g["layers"],
                "candidates": [{"dkld": c["dkld"], "dbits": c["dbits"]} for c in g["candidates"]],
            }
            for g in told["groups"]
        ],
    }
    path = tmp_path / "foreign.json"
    path.write_text(json.dumps(foreign))
    found = read_measurement(path)
    assert (found.method, found.complete, found.groups[0].weights) == ("swap", True, None)
    assert run("-m", path, "-b", 2.7, "-o", tmp_path / "out") == 0
    assert verify(tmp_path / "out").problems == []
    with pytest.raises(UserError, match="does not tell how many weights"):
        run("-m", path, "-b", 2.7, "--recipe", tmp_path / "r.yaml")


def test_a_measurement_survives_its_file(tiny, tmp_path):
    told = measurement(tiny, level=1)
    write_measurement(tmp_path / "m.json", told)
    assert read_measurement(tmp_path / "m.json") == told
    assert Measurement.from_json(told.to_json()) == told


# -- Bad input -----------------------------------------------------------------------------------


def test_bad_flags(tiny, file, tmp_path):
    for arguments, message in (
        (["-b", 2.5], "-o DIR, or --recipe FILE"),
        (["-b", 1.5, "-o", "x"], "-b 1.5 is below the smallest"),
        (["-b", 4.5, "-o", "x"], "-b 4.5 is above the largest"),
        (["-b", math.nan, "-o", "x"], "-b nan is"),
        (["-b", 3, "-o", "x", "--verify", "-1"], "from 0 on"),
        (["-b", 3, "-o", "x", "--rounds", "-1"], "from 0 on"),
        (["-b", 3, "-o", tiny.quants[0]], "overlap|holds the result of another job"),
        (["-b", 3, "-o", "x", "-i", tiny.quants[0]], "two or more quants"),
        (["-b", 3, "-o", "x", "-i", *tiny.quants[::-1]], "rising bitrate: .*q4 has 4"),
        (["-b", 3, "-o", "x", "-i", tiny.model, tiny.quants[0]], "no EXL3 quant"),
        (["-b", 3, "-o", "x", "-i", "nowhere", tiny.quants[0]], "nowhere is no folder"),
        (["-b", 3, "--recipe", tmp_path / "r", "-o", "x"], "-o: --recipe writes no model"),
    ):
        arguments = [tmp_path / a if a == "x" else a for a in arguments]
        with pytest.raises(UserError, match=message):
            run("-m", file, *arguments)
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "r").exists()


def test_a_folder_with_other_things_is_refused(tiny, file, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        run("-m", file, "-b", 3, "-o", out)
    out = tmp_path / "new"
    (tmp_path / "new.exl3-verified").write_text("mine\n")
    with pytest.raises(UserError, match="is something else"):
        run("-m", file, "-b", 3, "-o", out)
    assert (tmp_path / "new.exl3-verified").read_text() == "mine\n"


def test_damaged_measurements(tiny, file, tmp_path):
    text = file.read_text()
    whole = json.loads(text)

    def changed(**more):
        return json.dumps(whole | more)

    group = whole["groups"][0]
    for content, message in (
        (text[: len(text) // 2], "no whole measurement"),
        ("[]", "no JSON object"),
        ("{}", "alts of the file is missing"),
        (changed(version=7), "its format"),
        (changed(complete=False), "is not finished"),
        (changed(groups=[]), "groups is empty"),
        (changed(groups=[group, group]), "is in two groups"),
        (changed(groups=[group | {"candidates": []}]), "0 candidates for 2 quants"),
        (changed(groups=[group | {"kld": "much"}]), "kld of groups"),
        (changed(groups=[group | {"kld": math.nan}]), "kld of groups"),
        (changed(groups=[group | {"sensitivity": -1}]), "sensitivity of groups"),
        (changed(groups=[group | {"k": [9]}]), "from 1 to 8"),
        (changed(groups=[group | {"layers": []}]), "is empty"),
        (changed(method="guess"), "method is 'guess'"),
        (changed(groups=whole["groups"][1:]), "did not measure"),
        (changed(arch_string="Qwen3ForCausalLM"), "is of Qwen3ForCausalLM"),
        (
            changed(groups=[group | {"layers": ["a.b"]}, *whole["groups"][1:]]),
            "measured a.b, which",
        ),
        (changed(model={"fingerprint": "0" * 64}), "different originals"),
    ):
        path = tmp_path / "damaged.json"
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            run("-m", path, "-b", 3, "-o", tmp_path / "out")
    with pytest.raises(UserError, match="does not exist"):
        run("-m", tmp_path / "none.json", "-b", 3, "-o", tmp_path / "out")


def test_quants_that_do_not_belong_together(tiny, file, tmp_path):
    other = convert(save_model(tmp_path / "other", seed=5), tmp_path / "other-3", 3)
    with pytest.raises(UserError, match=r"not made from the same model|different originals"):
        run("-i", tiny.quants[0], other, "-m", file, "-b", 2.5, "-o", tmp_path / "out")
    wide = convert(save_model(tmp_path / "wide", intermediate_size=384), tmp_path / "wide-3", 3)
    with pytest.raises(UserError, match=r"intermediate_size of config.json is 384 and not 256"):
        run("-i", tiny.quants[0], wide, "-m", file, "-b", 2.5, "-o", tmp_path / "out")
    save_tiny("gpt_neox", tmp_path / "neox", hidden_size=128, intermediate_size=256, vocab_size=300)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny.model / name, tmp_path / "neox" / name)
    neox = convert(tmp_path / "neox", tmp_path / "neox-3", 3)
    with pytest.raises(UserError, match="no quantized layer in common"):
        run("-i", tiny.quants[0], neox, "-m", file, "-b", 2.5, "-o", tmp_path / "out")
    with pytest.raises(UserError, match="different originals"):
        run("-m", file, "-b", 3, "-o", tmp_path / "out", "-r", tmp_path / "other")
    (tmp_path / "cut").mkdir()
    for path in tiny.quants[1].iterdir():
        content = path.read_bytes()
        (tmp_path / "cut" / path.name).write_bytes(
            content[:-9] if path.suffix == ".safetensors" else content
        )
    with pytest.raises(UserError, match="is truncated"):
        run("-i", tiny.quants[0], tmp_path / "cut", "-m", file, "-b", 2.5, "-o", tmp_path / "out")


def test_experts_of_a_kind_stay_alike(tiny):
    quants = tuple(map(Quant, tiny.quants))
    names = {"model.layers.0.mlp.up_proj": "model.layers.0.mlp.experts.{}.up_proj"}
    for quant in quants:
        for old, new in names.items():
            for expert in range(2):
                quant.modules[new.format(expert)] = quant.modules[old]
                quant.layers[new.format(expert)] = quant.layers[old]
    one, two = (names["model.layers.0.mlp.up_proj"].format(e) for e in range(2))
    Splice(quants, {one: 1, two: 1}).refuse_mixed_experts()
    with pytest.raises(UserError, match="the experts of one kind of a block alike"):
        Splice(quants, {one: 1, two: 2}).refuse_mixed_experts()
