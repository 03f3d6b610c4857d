"""compare_q.py whole: spec files in, tables, JSON and chart out; killed, it goes on."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from jobs_helpers import flags, run
from safetensors.torch import load_file
from tiny_models import save_tiny, save_tokenizer
from transformers import AutoModelForCausalLM

from exl3.commands.compare_q import main
from exl3.errors import UserError
from exl3.evaluate.dataspec import load_dataspec
from exl3.format import decode_layer
from exl3.jobs import compare as job

SCRIPT = Path(__file__).resolve().parents[1] / "eval" / "compare_q.py"
SIZES = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 300, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """An original and its quants at 3 and 8 bits."""
    base = tmp_path_factory.mktemp("models")
    save_tiny("llama", base / "original", initializer_range=0.1, **SIZES)
    save_tokenizer(base / "original")
    for bits in ("3", "8"):
        work = base / f"work{bits}"
        run(*flags(base / "original", base / f"q{bits}", work, bits, **{"-hb": 8}))
    return base


@pytest.fixture
def specs(models, tmp_path, monkeypatch):
    """Spec files as a user writes them; the cache is the test's own."""
    monkeypatch.setenv("EXL3_CACHE", str(tmp_path / "cache"))
    words = random.Random(0).choices(["the", "quick", "brown", "fox", "lazy", "dog"], k=600)
    (tmp_path / "text.txt").write_text(" ".join(words))
    data = {
        "tokenize_fn": "transformers",
        "tokenizer_dir": str(models / "original"),
        "dataset": "text.txt",
        "eval_stride": 32,
        "eval_len": 48,
        "max_rows": 6,
    }
    (tmp_path / "data.json").write_text(json.dumps(data))
    entry = {"load_fn": "exllamav3", "fwd_fn": "exllamav3"}
    original = {**entry, "label": "FP32 original", "model_dir": str(models / "original")}
    original["out_logits"] = str(tmp_path / "logits")
    quants = [
        {**entry, "label": f"EXL3 {bits}.0 bpw [new]", "model_dir": str(models / f"q{bits}")}
        for bits in (3, 8)
    ]
    (tmp_path / "models.json").write_text(json.dumps([*quants, original]))
    return tmp_path


def arguments(specs, *more):
    return ["-d", str(specs / "data.json"), "-m", str(specs / "models.json"), "-dev", "cpu", *more]


def results(specs, *more):
    main(arguments(specs, "--reference_rows", "4", "--json", str(specs / "out.json"), *more))
    return json.loads((specs / "out.json").read_text())


def plain_model(models, quant):
    """A stock model with the weights that a quant's layers decode to."""
    model = AutoModelForCausalLM.from_pretrained(models / "original", dtype=torch.float32).eval()
    if quant is None:
        return model
    stored = load_file(models / quant / "model.safetensors")
    for key in [key for key in stored if key.endswith(".trellis")]:
        name = key.removesuffix(".trellis")
        leaves = {a: stored[f"{name}.{a}"] for a in ("trellis", "suh", "svh", "mul1")}
        module = model.get_submodule(name)
        out, into = module.weight.shape
        module.weight.data = decode_layer(leaves)[:into, :out].T
    for key, tensor in stored.items():
        if key.endswith("norm.weight") or key == "model.embed_tokens.weight":
            model.get_parameter(key).data = tensor.float()
    return model


@torch.no_grad()
def plain_numbers(models, rows, quant):
    """Perplexity on all rows and KLD on the first 4, in float64."""
    original, model = plain_model(models, None), plain_model(models, quant)
    log_q = torch.log_softmax(model(rows).logits.double(), -1)
    log_p = torch.log_softmax(original(rows[:4]).logits.double(), -1)
    nll = -log_q[:, :-1].gather(-1, rows[:, 1:, None]).mean()
    kld = (log_p.exp() * (log_p - log_q[:4])).sum(-1).mean()
    return nll.exp().item(), kld.item()


def test_numbers_are_those_of_plain_transformers(models, specs):
    found = results(specs)
    rows = load_dataspec(specs / "data.json").rows()
    assert [entry["label"] for entry in found] == [
        "FP32 original",
        "EXL3 3.0 bpw [new]",
        "EXL3 8.0 bpw [new]",
    ]
    for entry, quant in zip(found, (None, "q3", "q8"), strict=True):
        ppl, kld = plain_numbers(models, rows, quant)
        assert entry["ppl"] == pytest.approx(ppl, rel=1e-4)
        assert entry["kld"] == pytest.approx(kld, rel=5e-3, abs=1e-6)  # float16 logits
    three, eight = found[1:]
    assert 3 < three["layer_bpw"] < 3.5
    assert 8 < eight["head_bpw"] < 8.5
    assert three["vram_gb"] < eight["vram_gb"] < found[0]["vram_gb"]
    assert three["kld"] > 10 * eight["kld"] > 0


def test_engines_agree(models, specs):
    content = json.loads((specs / "models.json").read_text())
    ours = results(specs)
    for entry in content:
        entry["load_fn"] = entry["fwd_fn"] = "transformers"
    (specs / "models.json").write_text(json.dumps(content))
    stock = results(specs)
    for a, b in zip(ours, stock, strict=True):
        assert a["ppl"] == pytest.approx(b["ppl"], rel=1e-4)
        assert a["kld"] == pytest.approx(b["kld"], rel=2e-3, abs=1e-6)


def test_known_rows_are_not_measured_again(models, specs, monkeypatch):
    first = results(specs)

    def never(*_):
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(job, "row_metrics", never)
        assert results(specs) == first
        with pytest.raises(AssertionError, match="measured again"):
            results(specs, "-cc")
    # A changed model is another one.
    content = json.loads((specs / "models.json").read_text())
    content[0]["model_dir"] = content[1]["model_dir"]
    (specs / "models.json").write_text(json.dumps(content))
    assert results(specs)[1]["kld"] == first[2]["kld"]


class Killed(BaseException):
    """Stands for the moment a process dies."""


def test_death_at_every_row_ends_in_the_same_numbers(specs, monkeypatch):
    whole = results(specs)
    monkeypatch.setenv("EXL3_CACHE", str(specs / "other"))
    for path in (specs / "logits").iterdir():
        path.unlink()
    save, lives = job._save, 0

    def dying(*arguments):
        nonlocal lives
        if lives == 0:
            raise Killed
        lives -= 1
        save(*arguments)

    monkeypatch.setattr(job, "_save", dying)
    deaths = 0
    while True:
        lives = 1 + deaths % 2
        try:
            again = results(specs)
            break
        except Killed:
            deaths += 1
    assert deaths > 5
    assert again == whole


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is not a signal of Windows")
def test_sigkill_at_random_moments(specs):
    whole = results(specs)
    chance = random.Random(0)
    environment = {**os.environ, "EXL3_CACHE": str(specs / "other")}
    command = [sys.executable, SCRIPT, *arguments(specs, "--reference_rows", "4")]
    command += ["--json", str(specs / "again.json")]
    for path in (specs / "logits").iterdir():
        path.unlink()
    for _ in range(6):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        time.sleep(chance.uniform(2, 7))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, env=environment, check=True)
    assert json.loads((specs / "again.json").read_text()) == whole


def test_everything_that_can_come_out(specs, capsys):
    out = {kind: specs / f"out.{kind}" for kind in ("csv", "json", "md", "png")}
    main(
        arguments(
            *(specs, "-p", "-kld", "-t", "Tiny", "-o", str(out["png"]), "--csv", str(out["csv"])),
            *("--json", str(out["json"]), "--markdown", str(out["md"])),
        )
    )
    assert out["png"].read_bytes().startswith(b"\x89PNG")
    assert len(out["csv"].read_text().splitlines()) == 4
    assert "|" in out["md"].read_text()
    assert "EXL3 3.0 bpw" in capsys.readouterr().out


def test_reference_file_of_compare_q_logits(models, specs):
    from exl3.commands.compare_q_logits import main as write_logits

    write_logits(
        [
            *("-m", str(models / "original"), "-d", str(specs / "data.json"), "-dev", "cpu"),
            *("-o", str(specs / "ref.safetensors"), "-r", "0", "--dtype", "float32"),
        ]
    )
    found = results(specs, "-lf", str(specs / "ref.safetensors"), "-mask", "3.0")
    # The model with out_logits stays, whatever the mask.
    assert [entry["label"] for entry in found] == ["FP32 original", "EXL3 3.0 bpw [new]"]
    assert found[0]["kld"] == pytest.approx(0, abs=1e-9)


def change(specs, name, edit):
    content = json.loads((specs / name).read_text())
    edit(content)
    (specs / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("models.json", lambda c: c[0].pop("label"), r"models\.json, model 1: the key label is"),
        ("models.json", lambda c: c[0].update(model_dir="nowhere"), "nowhere does not exist"),
        ("models.json", lambda c: c[0].update(model_dir=7), "model_dir must be a folder"),
        ("models.json", lambda c: c[0].update(lable="x"), "the key lable is not known"),
        ("models.json", lambda c: c[0].update(load_fn="qtip"), "qtip"),
        ("models.json", lambda c: c[0].update(load_fn="magic"), "magic"),
        ("models.json", lambda c: c[1].update(out_logits="x"), "only one model can be"),
        ("models.json", lambda c: c[2].update(color="redd"), "model 3: color 'redd' is none"),
        ("models.json", lambda c: c.clear(), "must be a list of models"),
        ("data.json", lambda c: c.pop("eval_len"), r"data\.json.*eval_len"),
        ("data.json", lambda c: c.update(dataset="missing.txt"), r"data\.json.*dataset"),
        ("data.json", lambda c: c.update(tokenize_fn="exllamav2"), r"data\.json.*tokenize_fn"),
        ("data.json", lambda c: c.update(eval_len=100000), r"(?s)data\.json|text"),
    ],
)  # fmt: skip
def test_bad_spec_files(specs, name, edit, message):
    change(specs, name, edit)
    with pytest.raises(UserError, match=message):
        results(specs)


def test_kld_without_a_reference_is_told_before_any_work(specs):
    change(specs, "models.json", lambda c: c.pop())
    with pytest.raises(UserError, match="-kld needs a reference"):
        results(specs, "-kld")


def test_bad_places(specs, tmp_path):
    with pytest.raises(UserError, match=r"-m .*nothing\*\.json: no file matches"):
        main(["-d", str(specs / "data.json"), "-m", str(tmp_path / "nothing*.json")])
    with pytest.raises(UserError, match=r"none\.json"):
        main(["-d", str(specs / "data.json"), "-m", str(tmp_path / "none.json")])
    with pytest.raises(UserError, match=r"the folder .* does not exist"):
        results(specs, "-o", str(tmp_path / "no" / "chart.png"))
