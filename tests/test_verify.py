"""The check of a finished model: a sound one passes, every damage has its sentence."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jobs_helpers import flags, run
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, save_tokenizer

from exl3 import cli
from exl3.commands.verify import main
from exl3.errors import JobError
from exl3.format.manifest import MANIFEST, read_manifest, write_manifest
from exl3.format.verify import shortened, verify
from exl3.jobs import output

SCRIPT = Path(__file__).resolve().parents[1] / "util" / "verify.py"
SIZES = {"hidden_size": 128, "intermediate_size": 192, "vocab_size": 300}
Q = "model.layers.1.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny Qwen2: biases, dimensions that want padding, a tied head."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny("qwen2", folder, tied=True, num_hidden_layers=2, **SIZES)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """Its quant, never to be touched."""
    base = tmp_path_factory.mktemp("whole")
    run(*flags(tiny, base / "out", base / "work"))
    return base / "out"


@pytest.fixture
def quant(whole, tmp_path):
    """A copy of the quant to be damaged."""
    shutil.copytree(whole, tmp_path / "quant")
    return tmp_path / "quant"


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(quant, change):
    path = quant / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def edit_configs(quant, change):
    """Changes the quantization config in both files that hold it."""
    edit_json(quant / "config.json", lambda config: change(config["quantization_config"]))
    edit_json(quant / "quantization_config.json", change)


def split_in_shards(quant):
    """The quant's tensors in two files and an index; the decoder's in the first."""
    tensors = load_file(quant / "model.safetensors")
    names = {key: f"model-0000{1 + ('lm_head' in key)}-of-00002.safetensors" for key in tensors}
    for name in {*names.values()}:
        save_file({k: t for k, t in tensors.items() if names[k] == name}, quant / name)
    (quant / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": names}
    (quant / "model.safetensors.index.json").write_text(json.dumps(index))
    write_manifest(quant)
    return sorted({*names.values()})


def script(*arguments):
    """Runs the command in this process, as util/verify.py does; its exit code."""
    try:
        cli.run(lambda: main([str(a) for a in arguments]))
    except SystemExit as end:
        return end.code
    return 0


def test_a_sound_model_passes(whole, capsys):
    report = verify(whole)
    assert report.problems == []
    assert report.notes == []
    assert script(whole) == 0
    told = capsys.readouterr().out
    assert told.count("\n") == 1
    assert "15 quantized layers, 2.50 bits per weight, head 6, mul1, " in told
    assert "not decoded" not in told
    assert script(whole, "--fast") == 0
    assert "(not decoded and not hashed)" in capsys.readouterr().out


@pytest.mark.parametrize(("codebook", "head", "told"), [("3inst", 16, ""), ("mcg", 3, ", head 3")])
def test_other_codebooks_and_heads_pass(tiny, tmp_path, codebook, head, told):
    more = {"-cb": codebook, "-hb": head, "-cr": 2}
    run(*flags(tiny, tmp_path / "out", tmp_path / "work", "1", **more))
    report = verify(tmp_path / "out")
    assert report.problems == report.notes == []
    assert f"1.00 bits per weight{told}, {codebook}, " in report.summary


def test_sound_shards_pass(quant):
    split_in_shards(quant)
    assert verify(quant).problems == verify(quant).notes == []


# -- Damage to tensors ---------------------------------------------------------------------------


def remove(key):
    return lambda tensors: tensors.pop(key)


def put(key, make):
    return lambda tensors: tensors.update({key: make(tensors)})


def nan_in(key):
    def change(tensors):
        tensors[key][3] = float("nan")

    return change


def reshaped_trellis(key, columns):
    """The trellis with another number of tiles or words in its last dimensions."""
    return put(key, lambda t: torch.zeros(*t[key].shape[: 3 - len(columns)], *columns).short())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (remove(f"{Q}.trellis"), f"{Q}.trellis is missing"),
        (remove(f"{Q}.suh"), f"{Q}.suh is missing"),
        (remove(f"{Q}.svh"), f"{Q}.svh is missing"),
        (remove(f"{Q}.mul1"), f"mul1_multiplier of {Q} is 2212286765, but by its tensors it is"),
        (remove(f"{Q}.bias"), f"{Q}.bias is in no file, but quantization_config.json lists it"),
        (remove("model.norm.weight"), "model.norm.weight is in no file, but"),
        (put("thesis", lambda t: torch.ones(3)), "thesis is not listed in quantization_config"),
        (put(f"{Q}.weight", lambda t: torch.ones(3)), f"{Q}.weight stands beside {Q}.trellis"),
        (put(f"{Q}.suh", lambda t: t[f"{Q}.suh"].float()), f"{Q}.suh is float32 (128,), but its"),
        (put(f"{Q}.suh", lambda t: t[f"{Q}.suh"][:64].clone()), f"{Q}.suh is float16 (64,), but"),
        (put(f"{Q}.bias", lambda t: t[f"{Q}.bias"][:9].clone()), f"{Q}.bias is float16 (9,), but"),
        (put(f"{Q}.trellis", lambda t: t[f"{Q}.trellis"].int()), "a trellis must be int16"),
        (put(f"{Q}.mul1", lambda t: t[f"{Q}.mul1"] + 1), "mul1 multiplier is not the one known"),
        (put(f"{Q}.mcg", lambda t: torch.tensor(-877912083).int()), "markers of two codebooks"),
        (reshaped_trellis(f"{UP}.trellis", (80,)), f"bits_per_weight of {UP} is 3, but by its"),
        (reshaped_trellis(f"{UP}.trellis", (40,)), "a trellis must be int16 of shape"),
        (reshaped_trellis(f"{UP}.trellis", (4, 48)), "dimensions must be multiples of 128"),
        (reshaped_trellis(f"{UP}.trellis", (0, 48)), "dimensions must be multiples of 128"),
        (nan_in(f"{Q}.suh"), f"{Q}.suh has 1 numbers that are not finite"),
        (nan_in(f"{Q}.bias"), f"{Q}.bias has 1 numbers that are not finite"),
        (nan_in("model.norm.weight"), "model.norm.weight has 1 numbers that are not finite"),
        (put("model.norm.weight", lambda t: torch.ones(3)), "model.norm.weight is float32 (3,)"),
        (lambda tensors: [tensors.pop(k) for k in [*tensors] if "_proj" in k or "head" in k], "no"),
    ],
)
def test_damaged_tensors(quant, capsys, change, sentence):
    edit_tensors(quant, change)
    problems = verify(quant, hashes=False).problems
    assert any(sentence in problem for problem in problems), problems
    assert all("; " in problem for problem in problems)  # each has a way out
    assert script(quant) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"Error: {quant} is not sound:\n")
    assert "Traceback" not in message
    assert message.count("\n") <= 12


def test_fast_does_not_decode(quant):
    edit_tensors(quant, nan_in(f"{Q}.suh"))
    assert verify(quant, decode=False, hashes=False).problems == []
    assert len(verify(quant, hashes=False).problems) == 1


def test_many_problems_are_shortened(quant, capsys):
    edit_json(quant / "quantization_config.json", lambda c: c.update(tensor_storage={}))
    assert script(quant, "--fast") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 12
    assert lines[-1].startswith("and ")
    assert shortened(["a", "b"], "- ") == "- a\n- b"


# -- Damage to the configs -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda q: q.pop("version"), "version of quantization_config is missing"),
        (lambda q: q.update(bits="3"), "bits of quantization_config is '3', not a number of bits"),
        (lambda q: q.update(bits=3.5), "config.json says 3.5 bits, but the decoder's layers have"),
        (lambda q: q.update(bits=float("nan")), "bits of quantization_config is nan, not a number"),
        (lambda q: q.update(bits=10**999), "bits of quantization_config is 1000000"),
        (lambda q: q.update(head_bits=8), "config.json says head_bits 8, but lm_head has 6"),
        (lambda q: q.update(head_bits=True), "head_bits of quantization_config is True, not a"),
        (lambda q: q.update(calibration={"rows": 6}), "calibration of quantization_config is"),
        (lambda q: q.pop("out_scales"), "out_scales of quantization_config is missing"),
        (lambda q: q.pop("codebook"), "codebook of quantization_config is missing"),
        (lambda q: q.update(codebook=["mcg"]), "codebook of quantization_config is ['mcg'], not"),
        (lambda q: q.update(codebook="mcg"), "has the codebook mul1, but config.json says mcg"),
        (lambda q: q.update(quant_method="gptq"), "config.json has the quant_method 'gptq', so"),
    ],
)
def test_wrong_quantization_configs(quant, change, sentence):
    edit_configs(quant, change)
    problems = verify(quant, decode=False, hashes=False).problems
    assert any(sentence in problem for problem in problems), problems


def test_mixed_codebooks_may_be_told(quant):
    edit_configs(quant, lambda q: q.update(codebook="mixed"))
    assert verify(quant, hashes=False).problems == []


def test_stored_bits_may_be_told(quant):
    """As spliced models do."""
    told = []
    for bits in (9, None):
        if bits is None:
            bits = float(told[0].split("(")[1].split(" ")[0])
        edit_configs(quant, lambda q, bits=bits: q.update(bits=bits))
        told = verify(quant, decode=False, hashes=False).problems
    assert told == []


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("config.json", lambda c: c.pop("quantization_config"), "has no quantization_config"),
        ("config.json", lambda c: c.update(hidden_size=256), "but by config.json it is"),
        (
            "config.json",
            lambda c: c.update(num_hidden_layers=3, layer_types=["full_attention"] * 3),
            "is in no file of",
        ),
        ("config.json", lambda c: c["quantization_config"].update(x=1), "is not the quantization_"),
        ("quantization_config.json", lambda c: c.pop("tensor_storage"), "has no tensor_storage"),
        ("quantization_config.json", lambda c: c.update(tensor_storage=[]), "no tensor_storage"),
        (
            "quantization_config.json",
            lambda c: c["tensor_storage"].update({Q: 3}),
            f"{Q} lists no tensors",
        ),
        (
            "quantization_config.json",
            lambda c: c["tensor_storage"][Q]["stored_tensors"][f"{Q}.suh"].update(n_bytes=1),
            f"{Q}.suh is float16 (128,), 256 bytes, but quantization_config.json lists something",
        ),
    ],
)
def test_configs_that_contradict_the_tensors(quant, name, change, sentence):
    edit_json(quant / name, change)
    problems = verify(quant, decode=False, hashes=False).problems
    assert any(sentence in problem for problem in problems), problems


@pytest.mark.parametrize("name", ["config.json", "quantization_config.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", None])
def test_unreadable_configs(quant, name, content):
    (quant / name).unlink()
    if content is not None:
        (quant / name).write_bytes(content)
    assert any(name in p for p in verify(quant, decode=False, hashes=False).problems)


# -- Damage to files -----------------------------------------------------------------------------


def test_a_flipped_bit(quant):
    path = quant / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    assert verify(quant, hashes=False).problems == []
    (problem,) = verify(quant).problems
    assert problem.startswith(f"model.safetensors is not what {MANIFEST} says (SHA-256 differs)")


def test_truncated_and_missing_shards(quant):
    _, last = split_in_shards(quant)
    content = (quant / last).read_bytes()
    (quant / last).write_bytes(content[:-7])
    problems = verify(quant).problems
    assert len(problems) == 2
    assert f"{last} is truncated" in problems[0]
    (quant / last).unlink()
    problems = verify(quant).problems
    assert f"{last} is missing, but model.safetensors.index.json names it" in problems[0]
    assert f"{last} is missing, but {MANIFEST} lists it" in problems[1]


def test_an_index_that_leaves_the_folder(quant):
    split_in_shards(quant)
    edit_json(
        quant / "model.safetensors.index.json",
        lambda index: index["weight_map"].update({f"{Q}.suh": "../evil.safetensors"}),
    )
    assert "is outside the model's folder" in verify(quant, hashes=False).problems[0]


def test_source_weights_left_over(quant):
    (quant / "pytorch_model.bin").write_bytes(b"")
    (quant / "model-00001-of-00001.safetensors").write_bytes(b"")
    problems = verify(quant).problems
    assert len(problems) == 2
    assert all("no part of the model; remove it" in problem for problem in problems)


def test_a_missing_tokenizer_is_a_note(quant, capsys):
    for path in quant.glob("tokenizer*"):
        path.unlink()
    report = verify(quant, hashes=False)
    assert report.problems == []
    assert "there is no tokenizer" in report.notes[0]
    assert script(quant, "--fast") == 0
    assert capsys.readouterr().out.startswith("Note: there is no tokenizer")


def test_folders_that_are_no_models(tmp_path, tiny, capsys):
    assert script(tmp_path / "none") == 2
    assert "is not a folder" in capsys.readouterr().err
    assert script(tmp_path) == 2
    assert "has no config.json" in capsys.readouterr().err
    assert script(tiny) == 2
    assert "has no quantization_config" in capsys.readouterr().err


def test_unknown_models_are_checked_as_far_as_they_go(quant):
    edit_json(quant / "config.json", lambda config: config.update(model_type="from_the_future"))
    report = verify(quant, hashes=False)
    assert report.problems == []
    assert "does not know the model type 'from_the_future'" in report.notes[0]


def test_models_of_other_programs(quant):
    """They have no producer, perhaps no lists, and may tell their bits in another way."""
    edit_configs(quant, lambda q: [q.pop(k) for k in ("producer", "out_scales", "calibration")])
    edit_configs(quant, lambda q: q.update(bits=9))
    edit_json(quant / "quantization_config.json", lambda q: q["tensor_storage"].popitem())
    (quant / MANIFEST).unlink()
    report = verify(quant)
    assert report.problems == []
    assert len(report.notes) > 4
    (quant / "quantization_config.json").unlink()
    assert verify(quant).problems == []
    edit_tensors(quant, remove(f"{Q}.svh"))
    assert f"{Q}.svh is missing" in verify(quant).problems[0]


# -- The manifest --------------------------------------------------------------------------------


def test_the_manifest_lists_every_file(whole, quant):
    sums = read_manifest(whole)
    files = {p.relative_to(whole).as_posix() for p in whole.rglob("*") if p.is_file()}
    assert sums.keys() == files - {MANIFEST}
    assert list(sums) == sorted(sums)
    before = (quant / MANIFEST).read_bytes()
    write_manifest(quant)
    assert (quant / MANIFEST).read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="names that Windows does not allow")
def test_sha256sum_accepts_it(quant):
    tool = shutil.which("sha256sum")
    if tool is None:
        pytest.skip("sha256sum is not installed")
    (quant / "a b").mkdir()
    for name in ("a b/odd\\name", "two\nlines", "ärger", ".hidden"):
        (quant / name).write_text(name)
    write_manifest(quant)
    done = subprocess.run([tool, "--strict", "-c", MANIFEST], cwd=quant, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b": OK") == len(read_manifest(quant))
    assert verify(quant, decode=False).problems == []


@pytest.mark.parametrize(
    "name", ["../thesis.txt", "/etc/passwd", "a/../../b", "C:\\b", "a\\..\\..\\b", "b\0"]
)
def test_a_manifest_that_leaves_the_folder(quant, name):
    with (quant / MANIFEST).open("a", newline="") as file:
        file.write(f"{64 * '0'}  {name}\n")
    (problem,) = verify(quant, decode=False).problems
    assert "which is outside the model's folder" in problem


def test_damaged_manifests(quant):
    (quant / MANIFEST).write_text("hello\n")
    assert f"{MANIFEST}: line 1 is no hash and name" in verify(quant, decode=False).problems[0]
    (quant / MANIFEST).write_bytes(bytes(1 << 24) + b"\n")
    assert "too large" in verify(quant, decode=False).problems[0]


def test_files_beside_the_manifest_are_a_note(quant):
    (quant / "README.md").write_text("A model card")
    (quant / ".gitattributes").write_text("")
    report = verify(quant, decode=False)
    assert report.problems == []
    assert report.notes == [f"{MANIFEST} does not list README.md"]


# -- Conversions check themselves ----------------------------------------------------------------


def test_a_conversion_does_not_publish_an_unsound_model(tiny, tmp_path, monkeypatch):
    def damaging(folder, *rest):
        write_weights(folder, *rest)
        edit_tensors(folder, nan_in(f"{Q}.suh"))

    write_weights = output.write_weights
    arguments = flags(tiny, tmp_path / "out", tmp_path / "work", "1")
    with monkeypatch.context() as patch:
        patch.setattr(output, "write_weights", damaging)
        with pytest.raises(JobError, match=r"(?s)out\S*partial .*suh has 1 numbers"):
            run(*arguments)
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.glob("out*partial"))) == 1
    run(*arguments)
    assert verify(tmp_path / "out").problems == []


def test_the_script(tmp_path):
    """util/verify.py runs from anywhere."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--fast", "none"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "Error: none is not a folder; give the folder of a model\n"
