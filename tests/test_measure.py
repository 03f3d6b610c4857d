"""Measurements of tiny models: against a slow direct computation, through kills, in passes."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from jobs_helpers import flags
from jobs_helpers import run as convert
from safetensors.torch import load_file
from tiny_models import save_tiny, save_tokenizer
from transformers import AutoModelForCausalLM

from exl3 import files, parallel
from exl3.commands.measure import main
from exl3.data.rows import calibration_rows
from exl3.data.tokenizer import load_tokenizer
from exl3.divide import divided
from exl3.errors import UserError
from exl3.evaluate.compare import compare
from exl3.evaluate.metrics import row_kld, row_metrics
from exl3.format import decode_layer
from exl3.groups import group
from exl3.jobs import measure as measure_job
from exl3.jobs import measure_files, measure_plan, measure_sweep
from exl3.jobs.measure_input import QuantLayers
from exl3.jobs.measure_report import WIDTH, report
from exl3.measurement import read_measurement
from exl3.model.rope import Rope

SCRIPT = Path(__file__).resolve().parents[1] / "util" / "measure.py"
SIZES = {"hidden_size": 128, "intermediate_size": 192, "vocab_size": 300, "num_hidden_layers": 2}
ROWS, COLS = 4, 32
PLAIN = ["--no_correction", "--hessian", "input"]  # of corrected quants the parts do not fit
SMALL = ["-cr", ROWS, "-cc", COLS, "-d", "cpu"]
STATE = ROWS * COLS * 128 * 4  # bytes
BLOCK_KEYS = [f"self_attn.{x}_proj" for x in "qkvo"] + [
    f"mlp.{x}_proj" for x in ("gate", "up", "down")
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny Qwen2 (biases, padding, a tied head) and quants of it."""
    base = tmp_path_factory.mktemp("measured")
    save_tiny("qwen2", base / "original", tied=True, **SIZES)
    save_tokenizer(base / "original")
    for bits, head in (("2", 4), ("3", 6), ("4", 6)):
        more = {"-hb": head}
        convert(
            *flags(base / "original", base / f"q{bits}", base / f"w{bits}", bits, **more), *PLAIN
        )
    return base


def measure(models, out, *more, quants=("q2", "q3")):
    given = ["-i", *(models / q for q in quants)] if quants else []
    main([str(x) for x in ("-r", models / "original", "-o", out, *given, *SMALL, *more)])
    return read_measurement(out)


@pytest.fixture(scope="module")
def measured(models, tmp_path_factory):
    """An uninterrupted measurement in one pass."""
    out = tmp_path_factory.mktemp("whole") / "m.json"
    measure(models, out, "-l", 3)
    return out


# -- The slow way --------------------------------------------------------------------------------


def rows_of(models):
    tokenizer = load_tokenizer(models / "original")
    return calibration_rows(tokenizer, ROWS, COLS, vocab_size=300)


def loaded(models):
    return AutoModelForCausalLM.from_pretrained(models / "original", dtype=torch.float64)


def put(model, tensors, key):
    """Puts a quantized layer into a transformers model."""
    leaves = {k.rpartition(".")[2]: t for k, t in tensors.items() if k.startswith(f"{key}.")}
    bias = leaves.pop("bias", None)
    linear = model.get_submodule(key)
    weight = decode_layer(leaves)[: linear.in_features, : linear.out_features].T
    linear.weight = torch.nn.Parameter(weight.double(), requires_grad=False)
    if bias is not None:
        linear.bias = torch.nn.Parameter(bias[: linear.out_features].double(), requires_grad=False)


@torch.no_grad()
def logits_of(model, rows):
    return torch.log_softmax(model(input_ids=rows).logits, -1)


def kld_rows(p, q):
    """Mean KLD of each row, float64."""
    return (p.exp() * (p - q)).sum(-1).mean(1)


def keys_by_block():
    return [[f"model.layers.{i}.{name}" for name in BLOCK_KEYS] for i in range(2)]


def with_layers(models, folder, keys, base=None):
    """The original with a base's layers, and of those `keys` from another quant."""
    model = loaded(models)
    if base is not None:
        tensors = load_file(base / "model.safetensors")
        plain = {key: tensor for key, tensor in tensors.items() if key.endswith(".weight")}
        model.load_state_dict(plain, strict=False)  # embedding and norms, which are rounded
        for key in [k for block in keys_by_block() for k in block] + ["lm_head"]:
            put(model, tensors, key)
    tensors = load_file(folder / "model.safetensors")
    for key in keys:
        put(model, tensors, key)
    return model


def standard_error(values):
    return float(values.std() / math.sqrt(len(values)))


@pytest.mark.parametrize("level", range(5))
def test_isolated_groups_are_what_a_direct_computation_gives(models, tmp_path, level):
    m = measure(models, tmp_path / "m.json", "-l", level)
    rows = rows_of(models)
    p = logits_of(loaded(models), rows)
    expected = [*group(keys_by_block(), level)]
    assert [(g.block, g.name, g.layers) for g in m.groups] == [
        (e.block, e.name, e.keys) for e in expected
    ]
    for g in (*m.groups, m.head):
        small, large = (
            kld_rows(p, logits_of(with_layers(models, models / q, g.layers), rows))
            for q in ("q2", "q3")
        )
        (c,) = g.candidates
        assert g.kld == pytest.approx(float(small.mean()), rel=1e-3)
        assert g.kld_error == pytest.approx(standard_error(small), rel=2e-3)
        assert c.dkld == pytest.approx(float((large - small).mean()), rel=2e-3)
        assert c.dkld_error == pytest.approx(standard_error(large - small), rel=5e-3)
        assert (g.k, c.k) == (((4,), (6,)) if g is m.head else ((2,), (3,)))
        assert 0 < c.error < g.error < 0.3


def stored_bits(folder, keys):
    tensors = load_file(folder / "model.safetensors")
    return 8 * sum(t.nbytes for k, t in tensors.items() if k.rpartition(".")[0] in keys)


def test_bits_are_those_of_the_files(models, measured):
    m = read_measurement(measured)
    for g in (*m.groups, m.head):
        assert g.bits == stored_bits(models / "q2", g.layers)
        assert g.bits + g.candidates[0].dbits == stored_bits(models / "q3", g.layers)
    assert m.groups[0].weights == 128 * 128
    total = sum(g.bits for g in m.groups) / sum(g.weights for g in m.groups)
    assert m.base.bpw == pytest.approx(total)


def test_gradients_tell_the_parts_of_a_group(models, measured, tmp_path):
    """The same shares at every level, each tensor's bits, and none where there is one tensor."""
    fine, coarse = read_measurement(measured), measure(models, tmp_path / "m.json", "-l", 0)
    for block in coarse.groups:
        assert [part.layers for part in block.parts] == [(key,) for key in block.layers]
        assert sum(part.share for part in block.parts) == pytest.approx(1)
        assert sum(part.weights for part in block.parts) == block.weights
        for part in block.parts:
            assert part.bits == tuple(stored_bits(models / q, part.layers) for q in ("q2", "q3"))
            assert part.k == ((2,), (3,))
        shares = {part.layers[0]: part.share for part in block.parts}
        for g in (g for g in fine.groups if g.block == block.block):
            assert bool(g.parts) == (len(g.layers) > 1)
            own = sum(shares[key] for key in g.layers)
            for part in g.parts:
                assert part.share == pytest.approx(shares[part.layers[0]] / own)


@pytest.mark.parametrize("level", [1, 4])
def test_gradients_foretell_every_group(models, measured, tmp_path, level):
    """In units that compare across groups and levels: the sum of its tensors'."""
    fine, other = read_measurement(measured), measure(models, tmp_path / "m.json", "-l", level)
    by_tensor = {g.layers: g.sensitivity for g in divided(other).groups}
    for g in fine.groups:
        own = sum(of for layers, of in by_tensor.items() if set(layers) <= set(g.layers))
        assert g.sensitivity == pytest.approx(own)
        assert own > 0
    assert fine.head.sensitivity is None


def test_whole_quants_are_measured_too(models, measured):
    m = read_measurement(measured)
    rows = rows_of(models)
    p = logits_of(loaded(models), rows)
    assert m.base_kld == m.base.kld
    for quant, name in ((m.base, "q2"), (m.alts[0], "q3")):
        kld = kld_rows(p, logits_of(with_layers(models, models / name, [], models / name), rows))
        assert quant.kld == pytest.approx(float(kld.mean()), rel=1e-3)
        assert quant.dir == str(models / name)
    assert m.base.kld > 2 * m.alts[0].kld


def test_swapped_groups_are_what_a_direct_computation_gives(models, tmp_path):
    m = measure(models, tmp_path / "m.json", "--method", "swap", "-l", 3)
    rows = rows_of(models)
    p = logits_of(loaded(models), rows)

    def klds(keys):
        return kld_rows(p, logits_of(with_layers(models, models / "q3", keys, models / "q2"), rows))

    base = klds([])
    for g in (*m.groups, m.head):
        (c,) = g.candidates
        difference = klds(g.layers) - base
        assert c.dkld == pytest.approx(float(difference.mean()), rel=1e-2, abs=1e-6)
        assert g.kld is None
        assert c.error is None
    assert len(m.groups) == 10


def stretched(quant, out):
    """A quant as -rs 2 would make it."""
    shutil.copytree(quant, out)
    config = json.loads((out / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "linear", "factor": 2.0}
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_the_original_is_run_with_the_quants_rotary_embeddings(models, tmp_path, capsys):
    quants = [stretched(models / name, tmp_path / name) for name in ("q2", "q3")]
    found = measure(models, tmp_path / "m.json", quants=quants)
    assert "NOTE: the quants were made with changed rotary embeddings" in capsys.readouterr().out
    rows = rows_of(models)
    given = models / "original", quants, rows
    _, *alike = compare(*given, rope=Rope(scale=2.0))
    _, *other = compare(*given)
    for quant, score, wrong in zip((found.base, *found.alts), alike, other, strict=True):
        assert quant.kld == pytest.approx(score.kld, rel=1e-6)
        assert wrong.kld != pytest.approx(score.kld, rel=1e-3)
    with pytest.raises(UserError, match=r"q2 and .*q3 were made with different rotary embeddings"):
        measure(models, tmp_path / "other.json", quants=(models / "q2", quants[1]))


def test_three_quants_give_two_candidates_each(models, tmp_path):
    m = measure(models, tmp_path / "m.json", "-l", 0, quants=("q2", "q3", "q4"))
    assert [alt.dir for alt in m.alts] == [str(models / "q3"), str(models / "q4")]
    for g in m.groups:
        assert [c.k for c in g.candidates] == [(3,), (4,)]
        assert 0 > g.candidates[0].dkld > g.candidates[1].dkld > -g.kld
        assert 0 < g.candidates[0].dbits < g.candidates[1].dbits


def test_without_quants_every_group_is_quantized_by_itself(models, tmp_path, monkeypatch):
    monkeypatch.setattr(measure_files.MeasureFiles, "remove_work", lambda *_: None)
    given = ("--hessian_rows", 6, "--bits", 3, "-cb", "mcg", "-l", 1)
    m = measure(models, tmp_path / "m.json", *given, quants=())
    assert (m.base.dir, m.base.kld, m.base_kld, m.alts) == (None, None, None, ())
    assert m.model.codebook == "mcg"
    every = calibration_rows(load_tokenizer(models / "original"), 10, COLS, vocab_size=300)
    mine = torch.arange(ROWS) * 10 // ROWS
    rows, others = every[mine], every[[i for i in range(10) if i not in mine.tolist()]]
    layers = tmp_path / "m.json.work" / "layers"
    made = {
        f"{path.stem}.{leaf}": tensor
        for path in layers.iterdir()
        for leaf, tensor in load_file(path).items()
    }
    model = loaded(models)
    p = logits_of(model, rows)
    hessians = input_moments(model, others)
    for g in (*m.groups, m.head):
        other = loaded(models)
        for key in g.layers:
            put(other, made, key)
        assert g.kld == pytest.approx(float(kld_rows(p, logits_of(other, rows)).mean()), rel=1e-3)
        errors = [proxy(model, other, hessians, key) for key in g.layers]
        sizes = [made[f"{key}.trellis"].numel() for key in g.layers]
        mean = sum(e * s for e, s in zip(errors, sizes, strict=True)) / sum(sizes)
        assert g.error == pytest.approx(mean, rel=1e-3)
        assert g.k == (3,)
        assert g.candidates == ()
        biases = sum(2 * 128 for key in g.layers if model.get_submodule(key).bias is not None)
        nbytes = sum(t.nbytes for k, t in made.items() if k.rpartition(".")[0] in g.layers)
        assert g.bits == 8 * (nbytes + biases)


def input_moments(model, rows):
    """Mean of x^T x of every linear's inputs."""
    moments, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def keep(_, args, name=name):
                x = args[0].reshape(-1, args[0].shape[-1])
                moments[name] = x.T @ x / len(x)

            hooks.append(module.register_forward_pre_hook(keep))
    logits_of(model, rows)
    for hook in hooks:
        hook.remove()
    return moments


def proxy(model, other, hessians, key):
    weight, quantized = (m.get_submodule(key).weight.T for m in (model, other))
    error = weight - quantized
    energy = [torch.trace(x.T @ hessians[key] @ x) for x in (error, weight)]
    return float(energy[0].detach() / energy[1].detach())


def test_a_head_that_is_nowhere_quantized_is_no_entry(models, tmp_path, monkeypatch):
    monkeypatch.setattr(QuantLayers, "quantized", lambda self, key: "layers" in key)
    assert measure(models, tmp_path / "m.json", "-l", 0).head is None


def test_kld_of_a_row_is_that_of_all_metrics():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1, 50, 30_000, generator=generator)
    ids = torch.zeros(1, 50, dtype=torch.int64)
    assert torch.equal(row_kld(a, b), row_metrics(a, ids, b)["kld"])


# -- Passes, threads, kills ----------------------------------------------------------------------


def test_passes_and_threads_change_no_byte(models, measured, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parallel, "_THREADS", 3)
    room = 4.5 * STATE / 2**30  # of three candidates and the model itself
    measure(models, tmp_path / "m.json", "-l", 3, "-ms", room)
    assert "8 passes through the blocks" in capsys.readouterr().out  # of 22 candidates
    assert (tmp_path / "m.json").read_bytes() == measured.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.json"]


class Killed(BaseException):
    """Stands for the moment a process dies."""


def killed_again_and_again(monkeypatch, moment, step, run):
    """Calls `run` until it gets through; each time it dies some writes later. How often it died."""
    replace = os.replace
    countdown = deaths = 0

    def dying(source, target):
        nonlocal countdown
        countdown -= 1
        if countdown < 0 and moment == "before":
            raise Killed
        replace(source, target)
        if countdown < 0:
            raise Killed

    monkeypatch.setattr(files.os, "replace", dying)
    while True:
        countdown = deaths * step
        try:
            run()
            return deaths
        except Killed:
            deaths += 1


@pytest.mark.parametrize(
    ("moment", "quants"),
    [
        ("before", ("q2", "q3")),
        pytest.param("after", ("q2", "q3"), marks=pytest.mark.slow),
        pytest.param("before", (), marks=pytest.mark.slow),
        ("after", ()),
    ],
    ids=["before", "after", "before-none", "after-none"],
)
def test_death_at_any_file_written_changes_no_byte(models, tmp_path, monkeypatch, moment, quants):
    monkeypatch.setattr(measure_sweep, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(measure_sweep, "SAVING_SHARE", 0)
    given = ("-l", 1, "-ms", 6.5 * STATE / 2**30, *(() if quants else ("--hessian_rows", 2)))
    measure(models, tmp_path / "whole.json", *given, quants=quants)
    out = tmp_path / "m.json"
    step = 1 if quants else 2
    deaths = killed_again_and_again(
        monkeypatch, moment, step, lambda: measure(models, out, *given, quants=quants)
    )
    assert deaths >= 5
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not (tmp_path / "m.json.work").exists()


def test_what_is_finished_is_not_done_again(models, measured, tmp_path, monkeypatch, capsys):
    """Dies in the second pass; the file then has the groups of the first, and room may change."""
    out = tmp_path / "m.json"
    run = measure_sweep.Sweep.run
    begun = []

    def dying(sweep):
        begun.append([stream.name for stream in sweep.streams])
        if len(begun) == 5:
            raise Killed
        return run(sweep)

    with monkeypatch.context() as patch:
        patch.setattr(measure_sweep.Sweep, "run", dying)
        with pytest.raises(Killed):
            measure(models, out, "-l", 3, "-ms", 12.5 * STATE / 2**30)
    assert begun[:3] == [["original"], ["whole-q0"], ["whole-q1"]]
    content = json.loads(out.read_text())
    assert content["complete"] is False
    assert len(content["groups"]) == 5
    with pytest.raises(UserError, match="not finished"):
        read_measurement(out)

    def counting(sweep):
        begun.append([stream.name for stream in sweep.streams])
        return run(sweep)

    first = set(begun[3])
    monkeypatch.setattr(measure_sweep.Sweep, "run", counting)
    begun.clear()
    capsys.readouterr()
    measure(models, out, "-l", 3)
    assert len(begun) == 1
    assert not first & set(begun[0])
    assert f"{len(first)} candidates are measured already" in capsys.readouterr().out
    assert out.read_bytes() == measured.read_bytes()


def test_a_finished_measurement_is_told_again(models, measured, capsys):
    before = measured.stat().st_mtime_ns
    measure(models, measured, "-l", 3)
    text = capsys.readouterr().out
    assert "is complete already" in text
    assert "1 gate+up" in text
    assert measured.stat().st_mtime_ns == before


@pytest.mark.slow
def test_sigkill_at_random_moments(models, measured, tmp_path):
    chance = random.Random(0)
    out = tmp_path / "m.json"
    quants = ["-i", models / "q2", models / "q3"]
    command = [sys.executable, SCRIPT, "-r", models / "original", "-o", out, *quants, *SMALL]
    command = [str(x) for x in (*command, "-l", 3, "-ms", 4.5 * STATE / 2**30)]
    for _ in range(8):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (tmp_path / "m.json.work").exists() and time.monotonic() < deadline:
            if process.poll() is not None:
                break
            time.sleep(0.02)
        try:
            process.communicate(timeout=chance.uniform(0, 6))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert out.read_bytes() == measured.read_bytes()


@pytest.mark.parametrize(("words", "rows"), [(8000, 16), (COLS * 6, 6)])
def test_gradients_have_rows_of_their_own(models, tmp_path, capsys, words, rows):
    """As many as a conversion's, spread over the text, or as many as it holds."""
    (tmp_path / "text.txt").write_text(" ".join(["the", "quick", "brown", "fox"] * (words // 4)))
    measure(models, tmp_path / "m.json", "-l", 0, "-c", tmp_path / "text.txt")
    assert f"gradients of {rows * COLS:,} tokens first" in capsys.readouterr().out


# -- What it tells -------------------------------------------------------------------------------


def test_the_table_fits_and_sums_are_beside_the_quants_own(models, tmp_path, capsys):
    for quants in (("q2", "q3", "q4"), ()):
        out = tmp_path / f"{len(quants)}.json"
        m = measure(models, out, "-l", 4, quants=quants)
        lines = report(m, Path("m.json")).splitlines()
        assert all(len(line) <= WIDTH for line in lines if str(models) not in line)
        assert sum(line.startswith(("0 ", "1 ", "head")) for line in lines) == 15
        assert report(m, out) in capsys.readouterr().out
    together = f"{sum(g.kld for g in (*m.groups, m.head)):.5f}"
    assert f"Sum over all groups: {together}" in lines


def test_effects_add_up_in_the_report(models, measured):
    m = read_measurement(measured)
    text = report(m, measured)
    parts = (*m.groups, m.head)
    for quant, total in (
        (m.base, sum(g.kld for g in parts)),
        (m.alts[0], sum(g.kld + g.candidates[0].dkld for g in parts)),
    ):
        assert f"KLD {quant.kld:.5f}" in text
        assert f"together {total:.5f} ({total / quant.kld:.2f} times)" in text
        assert 0.5 < total / quant.kld < 2
    assert f"optimize.py -m {measured}" in text


# -- What it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quants", "more", "message"),
    [
        (("q3", "q2"), (), r"rising bitrate; .*q3 has 3\.\d+ bits per weight and .*q2, .*2\.\d+"),
        (("q2",), (), "two or more quants"),
        (("q2", "q2"), (), "given twice"),
        (("q2", "original"), (), "original is no EXL3 quant"),
        (("q2", "missing"), (), "missing is no folder"),
        (("q2", "q3"), ("--bits", 3), "--bits is for measuring without quants"),
        (("q2", "q3"), ("-cb", "mcg"), "--codebook is for measuring without quants"),
        ((), ("--method", "swap"), "needs quants to swap"),
        ((), ("-d", "gpu"), "-d gpu: give device numbers"),
        ((), ("--bits", 9), "out of range: 1 to 8"),
        (("q2", "q3"), ("-cr", 0), "-cr 0: give at least 1"),
        (("q2", "q3"), ("-cc", 65), "-cc 65: the model's context is 64 tokens"),
        (("q2", "q3"), ("-ms", 0), "give GiB of memory"),
        (("q2", "q3"), ("-ms", 1e-5), "take .* GiB; give more, or fewer or shorter rows"),
        (("q2", "q3"), ("--cal_split", "test"), "name it with -c"),
        (("q2", "q3"), ("-c", "missing.txt"), "missing.txt is no file"),
        (("q2", "other"), (), "other is a quant of another model"),
        (("q2", "wider"), (), "layers of other sizes"),
        (("q2", "llama"), (), r"different architectures \(Qwen2ForCausalLM and LlamaForCausalLM\)"),
    ],
)
def test_bad_input_is_one_sentence(models, strangers, tmp_path, quants, more, message):
    quants = [strangers / q if (strangers / q).exists() else models / q for q in quants]
    with pytest.raises(UserError, match=message) as error:
        measure(models, tmp_path / "m.json", *more, quants=quants)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "m.json").exists()


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """Quants of other models."""
    base = tmp_path_factory.mktemp("strangers")
    for name, kind, more in (
        ("other", "qwen2", {"seed": 5}),
        ("wider", "qwen2", {"intermediate_size": 256}),
        ("llama", "llama", {}),
    ):
        save_tiny(kind, base / f"{name}-model", tied=True, **{**SIZES, **more})
        save_tokenizer(base / f"{name}-model")
        convert(*flags(base / f"{name}-model", base / name, base / f"{name}-work", "3"), *PLAIN)
    return base


def test_a_quant_is_no_original(models, tmp_path):
    given = ["-r", models / "q4", "-i", models / "q2", models / "q3", "-o", tmp_path / "m.json"]
    with pytest.raises(UserError, match="q4 is an EXL3 quant; give the original"):
        main([str(x) for x in given])


def test_a_short_text_is_refused(models, tmp_path):
    (tmp_path / "a.txt").write_text("the quick brown fox and the lazy dog " * 10)
    with pytest.raises(UserError, match=r"holds only \d rows of 32 tokens; 4 are asked \(-cr\): "):
        measure(models, tmp_path / "m.json", "-c", tmp_path / "a.txt")
    with pytest.raises(UserError, match="and 30 more to quantize with"):
        measure(models, tmp_path / "m.json", "-c", tmp_path / "a.txt", quants=())


def test_quants_without_a_common_layer(models, tmp_path, monkeypatch):
    def quantized(self, key):
        return (self.folder.name == "q2") == ("layers.0" in key)

    monkeypatch.setattr(QuantLayers, "quantized", quantized)
    with pytest.raises(UserError, match="have no quantized layer in common"):
        measure(models, tmp_path / "m.json")


def test_nothing_that_is_there_is_overwritten(models, measured, tmp_path):
    out = tmp_path / "m.json"
    for content in ("mine", "{}", "[1]"):
        out.write_text(content)
        with pytest.raises(UserError, match="something else than a measurement"):
            measure(models, out)
        assert out.read_text() == content
    out.write_bytes(measured.read_bytes())
    with pytest.raises(UserError, match="holds another measurement"):
        measure(models, out, "-l", 2)
    assert out.read_bytes() == measured.read_bytes()
    with pytest.raises(UserError, match="is a folder; give the name of a file"):
        measure(models, tmp_path)
    with pytest.raises(UserError, match=r"folder .* does not exist"):
        measure(models, tmp_path / "no" / "m.json")
    (tmp_path / "n.json.work").mkdir()
    (tmp_path / "n.json.work" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is in the way of the work folder"):
        measure(models, tmp_path / "n.json")
    assert (tmp_path / "n.json.work" / "mine.txt").exists()


def test_a_job_under_way_is_not_mixed_with_another(models, tmp_path, monkeypatch):
    out = tmp_path / "m.json"

    def dying(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(measure_job, "stream_klds", dying)
        with pytest.raises(Killed):
            measure(models, out, "-l", 1)
    begun = out.read_bytes()
    for more, what in (
        (("-l", 2), "level"),
        (("-l", 1, "--method", "swap"), "method"),
        (("-l", 1, "-cr", 5), "rows"),
    ):
        out.write_bytes(begun)
        with pytest.raises(UserError, match="holds another measurement"):
            measure(models, out, *more)
        assert out.read_bytes() == begun
        out.unlink()
        with pytest.raises(UserError, match=rf"holds a different job \(other {what}\)"):
            measure(models, out, *more)
    assert measure(models, out, "-l", 1).complete


def test_a_lost_work_folder_costs_no_results(models, measured, tmp_path):
    out = tmp_path / "m.json"
    content = json.loads(measured.read_text()) | {"complete": False}
    out.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"its work folder .* is gone"):
        measure(models, out, "-l", 3)
    assert json.loads(out.read_text()) == content


def test_a_full_disk_is_told_before_any_work(models, tmp_path, monkeypatch):
    class Full:
        free = 1000

    with monkeypatch.context() as patch:
        patch.setattr(measure_plan.shutil, "disk_usage", lambda path: Full)
        with pytest.raises(UserError, match=r"the job may need 0\.00 GiB; make room"):
            measure(models, tmp_path / "m.json")
    assert measure(models, tmp_path / "m.json", "-l", 0).complete  # another job: nothing is lost


def test_every_flag_stands_in_the_docs():
    from exl3.commands.measure import parser

    text = (SCRIPT.parents[1] / "docs" / "measure.md").read_text()
    for action in parser(None)._actions:
        for spelling in action.option_strings:
            assert re.search(rf"`{spelling}`", text), f"{spelling} is missing in docs/measure.md"


def test_corrected_quants_are_told_of(models, tmp_path, capsys):
    """What the config of a quant says of its making is enough."""
    for name in ("q2", "q3"):
        shutil.copytree(models / name, tmp_path / name)
    config = json.loads((tmp_path / "q3" / "config.json").read_text())
    config["quantization_config"]["producer"]["correction"] = True
    (tmp_path / "q3" / "config.json").write_text(json.dumps(config))
    measure(models, tmp_path / "m.json", "-l", 0, quants=(tmp_path / "q2", tmp_path / "q3"))
    text = capsys.readouterr().out
    assert f"NOTE: {tmp_path / 'q3'} corrected every layer" in text
