"""--tune: scales and norm weights moved toward the original's predictions, codes fixed."""

import hashlib
import json
import os

import pytest
import torch
from jobs_helpers import flags, run
from safetensors.torch import load_file
from tiny_models import save_tiny, save_tokenizer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from exl3 import files, parallel
from exl3.errors import UserError
from exl3.evaluate.compare import compare
from exl3.format import decode_layer
from exl3.jobs import tune, tune_plan
from exl3.jobs.job import Job
from exl3.jobs.plan import make_plan
from exl3.jobs.settings import load_settings
from exl3.jobs.source import open_source
from exl3.jobs.thrift import THRIFTS, Thrift, memory_limit
from exl3.jobs.tune_fits import BlockFit, TailFit, WholeFit
from exl3.jobs.tune_parts import open_block, open_tail
from exl3.jobs.tune_plan import BLOCKS, WHOLE, TuningRows, tuning_way, whole_tuning_bytes
from exl3.jobs.workdir import WorkDir
from exl3.memory import resident_now
from exl3.progress import Progress
from exl3.quant.tuning import BETAS, DECAY, EPSILON, Descent, Gains, descend, divergence

SIZES = {"hidden_size": 128, "intermediate_size": 192, "vocab_size": 300, "num_hidden_layers": 2}
ROWS = {"-cr": 40, "--hessian": "input"}
STEPS = 10


def job_flags(model, folder, **more):
    return [*flags(model, folder / "out", folder / "work", "2", **{**ROWS, **more}), "--uniform"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny Qwen2: biases, dimensions that want padding, a tied head."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny("qwen2", folder, tied=True, **SIZES)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def untuned(tiny, tmp_path_factory):
    """A finished conversion without tuning."""
    base = tmp_path_factory.mktemp("untuned")
    run(*job_flags(tiny, base))
    return base


@pytest.fixture(scope="module")
def tuned(tiny, tmp_path_factory):
    """A finished conversion for either way."""
    bases = {}
    for way in (WHOLE, BLOCKS):
        bases[way] = tmp_path_factory.mktemp("tuned")
        choose(bases[way], way)
        run(*job_flags(tiny, bases[way], **{"--tune": STEPS}))
    return bases


def choose(base, way):
    """As if a job had begun with much or little memory."""
    (base / "work" / "tuned").mkdir(parents=True)
    (base / "work" / "tuned" / "way.json").write_text(json.dumps({"way": way}))


def tensors(base):
    return load_file(base / "out" / "model.safetensors")


def record(base):
    config = json.loads((base / "out" / "config.json").read_text())
    return config["quantization_config"]["producer"].get("tuning")


def held_out(base):
    rows = load_file(base / "work" / "calibration.safetensors")["rows"]
    return rows[TuningRows.of(rows, 0).held]


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# The mathematics


def test_a_descent_is_adamw():
    torch.manual_seed(0)
    descent, weight = Descent.begin(7), torch.nn.Parameter(torch.zeros(7))
    peer = torch.optim.AdamW([weight], betas=BETAS, eps=EPSILON, weight_decay=DECAY)
    for rate in (0.1, 0.3, 0.2, 0.01):
        weight.grad = torch.randn(7)
        peer.param_groups[0]["lr"] = rate
        peer.step()
        descent.move(weight.grad, rate)
    torch.testing.assert_close(descent.moved, weight.detach())


def test_the_best_step_is_kept_and_an_interrupted_descent_goes_on_alike():
    goal = torch.tensor([1.0, -0.5, 0.25])

    def go(descent, steps, stop):
        seen = []

        def done(descent):
            seen.append(descent.step)
            if descent.step == stop:
                raise InterruptedError

        def error(moved):  # a bowl that ends: too far is as bad as nothing
            away = float((moved - goal).norm())
            return away if descent.step < 15 else away + 10

        descend(descent, steps, 0.1, lambda step, moved: moved - goal, error, done)

    whole, broken = Descent.begin(3), Descent.begin(3)
    go(whole, 20, None)
    with pytest.raises(InterruptedError):
        go(broken, 20, 7)
    go(broken, 20, None)
    assert whole.best_step == broken.best_step == 10
    assert whole.least < whole.first == pytest.approx(float(goal.norm()))
    for name in ("moved", "mean", "square", "best"):
        assert torch.equal(getattr(whole, name), getattr(broken, name))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_ends_a_descent(bad):
    descent = Descent.begin(2)
    descend(descent, 9, 0.1, lambda *_: torch.tensor([bad, 0.0]), lambda _: 1.0, lambda _: None)
    assert descent.step == 9
    assert descent.best_step == 0
    assert not descent.best.any()


def test_divergence_and_its_gradient():
    torch.manual_seed(0)
    reference, logits = torch.randn(2, 3, 11), torch.randn(2, 3, 11, requires_grad=True)
    expected = F.kl_div(
        logits.log_softmax(-1), reference.log_softmax(-1), reduction="sum", log_target=True
    )
    kld, gradient = divergence(reference, logits.detach())
    assert kld == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])
    excluded = torch.tensor([[0.0, 1.0, -torch.inf]])
    kld, gradient = divergence(excluded, excluded)
    assert kld == 0
    assert not gradient.any()


def test_gains_are_judged_as_they_are_stored():
    stored = {
        "a.suh": torch.tensor([1.0, 0.0, -3.0, 7.0]).half(),
        "norm": torch.tensor([2.0, 5.0], dtype=torch.bfloat16),
    }
    gains = Gains(stored, {"a.suh": 3, "norm": 2})
    moved = torch.tensor([0.01, 0.5, -0.02, 0.001, 0.3])
    tuned, rounded = gains.tuned(moved), gains.rounded(moved)
    assert tuned["a.suh"].tolist() == torch.tensor([1.01, 0, -2.94, 7.0]).half().tolist()
    assert tuned["norm"].dtype == torch.bfloat16
    assert tuned["norm"][0] == 2  # less than bfloat16 can tell
    assert rounded["norm"][0] == 1
    assert rounded["a.suh"][1] == 1  # a channel of zeros stays one
    assert rounded["a.suh"][0] == tuned["a.suh"][0].float() != 1.01
    assert all(torch.equal(x, stored[key]) for key, x in gains.tuned(torch.zeros(5)).items())


# Its gradients


@pytest.fixture
def job(untuned):
    """The untuned job once more, its layers finished; with the original's last states."""
    settings = load_settings(untuned / "work")
    work = WorkDir(settings.work_dir)
    source = open_source(settings, work, torch.device("cpu"))
    plan = make_plan(settings, source.model)
    source.model.load_embedding()
    return Job(settings, work, source, plan, Progress(0, "", quiet=True), Thrift())


def stock_weights(model, job, moved):
    """Every parameter of a stock model by name, as a function of how far gains are from one."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for key in {key.rpartition(".")[0] for key in moved if key.endswith(".suh")}:
        whole = decode_layer(job.work.load_layer(key))
        u, v = 1 + moved[f"{key}.suh"], 1 + moved[f"{key}.svh"]
        weights[f"{key}.weight"] = (whole[: len(u), : len(v)] * u[:, None] * v).T
    for key in moved:
        if key.endswith("norm.weight"):
            weights[key] = weights[key].half().float() * (1 + moved[key])
    return weights


def test_the_whole_gradient_is_that_of_the_stock_model(job, tiny):
    picked = torch.tensor([3, 0])
    rows = job.source.rows[picked]
    original = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        tiny, dtype=torch.float32, tie_word_embeddings=False
    )
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(original.lm_head.weight.clone())
        reference = original(rows).logits
        states = torch.zeros(*job.source.rows.shape, SIZES["hidden_size"])
        # What leaves the last block is not among the outputs: seen where the norm takes it in.
        hook = original.model.norm.register_forward_pre_hook(
            lambda _, args: states.__setitem__(picked, args[0])
        )
        original(rows)
        hook.remove()
    fit = WholeFit(job, states)
    moved = 0.05 * torch.randn(fit.gains.size, generator=torch.Generator().manual_seed(1))
    found = fit.gradient(picked, moved)
    flat = moved.clone().requires_grad_()
    parts = dict(zip(fit.gains.stored, flat.split(fit.gains.sizes), strict=True))
    weights = stock_weights(model, job, parts)
    logits = torch.func.functional_call(model, weights, (rows,)).logits
    kld = F.kl_div(
        logits.log_softmax(-1), reference.log_softmax(-1), reduction="sum", log_target=True
    )
    kld = kld / rows.numel()
    (expected,) = torch.autograd.grad(kld, flat)
    assert len(parts) == 2 * 7 * 2 + 2 + 2 * 2 + 1  # layers, the head, norms
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert fit.error(picked, moved) == pytest.approx(kld.item(), rel=0.02)  # rounding apart
    fit.close()


def test_gradients_of_a_block_and_of_the_tail_are_slopes(job):
    rows, states = job.source.rows, None
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(*rows.shape, SIZES["hidden_size"], generator=generator)
    block = open_block(job, 0)
    fits = [BlockFit(job, 0, block, states, target)]
    tail = open_tail(job)
    fits.append(TailFit(job, tail, target.flip(0), target))
    picked = torch.tensor([1, 4])
    for fit in fits:
        fit.gains.tuned = unrounded(fit.gains)
        away = torch.randn(fit.gains.size, generator=generator)
        slope = float(fit.gradient(picked, torch.zeros(fit.gains.size)) @ away)
        h = 1e-3
        rise = fit.error(picked, h * away) - fit.error(picked, -h * away)
        assert rise / (2 * h) == pytest.approx(slope, rel=0.02)
    block.part.close()
    tail.part.close()


def unrounded(gains):
    """`gains.tuned` with what is stored in float32."""
    gains.stored = {key: x.float() for key, x in gains.stored.items()}
    return gains.tuned


# Jobs


@pytest.mark.parametrize("way", [WHOLE, BLOCKS])
def test_what_is_recorded_is_true_and_codes_stay(tiny, untuned, tuned, way):
    before, after = tensors(untuned), tensors(tuned[way])
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert {key.rpartition(".")[2] for key in changed} == {"suh", "svh", "weight"}
    assert all("norm" in key for key in changed if key.endswith(".weight"))
    assert "lm_head.svh" in changed
    assert all(before[key].dtype == after[key].dtype for key in before)
    kept = record(tuned[way])
    assert record(untuned) is None
    assert (kept["steps"], kept["way"], kept["held_out_rows"]) == (STEPS, way, 5)
    assert kept["kld_after"] < kept["kld_before"]
    scores = compare(tiny, [untuned / "out", tuned[way] / "out"], held_out(tuned[way]))
    assert scores[1].kld == pytest.approx(kept["kld_before"], rel=1e-3)
    assert scores[2].kld == pytest.approx(kept["kld_after"], rel=1e-3)


def test_without_improvement_nothing_changes(tiny, untuned, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "RATES", {WHOLE: 3.0})
    run(*job_flags(tiny, tmp_path, **{"--tune": 2}))
    assert "nothing changes" in capsys.readouterr().out
    before, after = tensors(untuned), tensors(tmp_path)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert record(tmp_path)["kld_after"] == record(tmp_path)["kld_before"]


@pytest.mark.parametrize("way", [WHOLE, pytest.param(BLOCKS, marks=pytest.mark.slow)])
def test_threads_change_no_byte(tiny, tuned, tmp_path, monkeypatch, way):
    monkeypatch.setattr(parallel, "_THREADS", 3)
    choose(tmp_path, way)
    run(*job_flags(tiny, tmp_path, **{"--tune": STEPS}))
    assert digests(tmp_path / "out") == digests(tuned[way] / "out")


class Killed(BaseException):
    """Stands for the moment a process dies."""


@pytest.mark.parametrize("way", [pytest.param(WHOLE, marks=pytest.mark.slow), BLOCKS])
def test_death_while_tuning_changes_no_byte(tiny, tuned, tmp_path, monkeypatch, way):
    """Dies after every third file of the tuning, until it gets through."""
    replace, countdown = os.replace, 0

    def dying(source, target):
        nonlocal countdown
        if "tuned" in str(target):
            countdown -= 1
            if countdown < 0:
                raise Killed
        replace(source, target)

    choose(tmp_path, way)
    monkeypatch.setattr(files.os, "replace", dying)
    deaths = 0
    while not (tmp_path / "out").exists():
        countdown = 3
        try:
            run(*job_flags(tiny, tmp_path, **{"--tune": STEPS, "-cpi": 0}))
        except Killed:
            deaths += 1
    assert deaths >= 2
    assert digests(tmp_path / "out") == digests(tuned[way] / "out")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "gemma2"])
@pytest.mark.parametrize("way", [WHOLE, BLOCKS])
def test_other_models_are_tuned(tmp_path, all_tiles, kind, way):
    """Experts, which not every token meets, and corrected routers; norms that keep their weight
    less one, soft caps."""
    save_tiny(kind, tmp_path / "model", dtype=torch.bfloat16, **SIZES)
    save_tokenizer(tmp_path / "model")
    choose(tmp_path, way)
    plain = ["--no_correction"] if kind == "gemma2" else []
    run(*job_flags(tmp_path / "model", tmp_path, **{"--tune": 6}), *plain)
    kept = record(tmp_path)
    assert kept["kld_after"] < kept["kld_before"]
    score = compare(tmp_path / "model", [tmp_path / "out"], held_out(tmp_path))[1]
    assert score.kld == pytest.approx(kept["kld_after"], rel=1e-3)


# Before it


def test_the_way_follows_memory_when_the_job_begins_and_then_stays(job, tmp_path, monkeypatch):
    work, given = WorkDir(tmp_path), (job.source, job.plan, Thrift())
    job.settings.tune = STEPS
    monkeypatch.setattr(tune_plan, "computing_room", lambda *_: (0, 2**60))
    need = whole_tuning_bytes(job.settings, job.source.model, job.plan, Thrift())
    for limit, way in ((need - 1, BLOCKS), (need, WHOLE)):
        monkeypatch.setattr(tune_plan, "computing_room", lambda *_, limit=limit: (0, limit))
        for path in (tmp_path / "tuned").glob("*"):
            path.unlink()
        assert tuning_way(job.settings, work, *given) == way
    monkeypatch.setattr(tune_plan, "computing_room", lambda *_: (0, 0))
    assert tuning_way(job.settings, work, *given) == WHOLE
    (tmp_path / "tuned" / "way.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        tuning_way(job.settings, work, *given)


def test_the_way_is_told_and_a_resumed_job_keeps_it(tiny, tmp_path, monkeypatch, capsys):
    def dying(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tune_plan, "whole_tuning_bytes", lambda *_: None)  # as with little memory
        patch.setattr("exl3.jobs.convert.convert_head", dying)
        with pytest.raises(KeyboardInterrupt):
            run(*job_flags(tiny, tmp_path, **{"--tune": 1}))
    assert "--tune 1, block by block\n" in capsys.readouterr().out
    run("-w", str(tmp_path / "work"), "-r")
    assert "--tune 1, block by block\n" in capsys.readouterr().out
    assert record(tmp_path)["way"] == BLOCKS


def test_max_memory_is_heeded(job):
    assert memory_limit(job.settings) > resident_now() / 2
    job.settings.max_memory = 0.5
    assert memory_limit(job.settings) == 2**29
    job.settings.tune = STEPS
    job.settings.max_memory = 0.1
    assert whole_tuning_bytes(job.settings, job.source.model, job.plan, Thrift()) is None
    job.settings.max_memory = 100.0
    spilled = whole_tuning_bytes(job.settings, job.source.model, job.plan, THRIFTS[-1])
    assert spilled < whole_tuning_bytes(job.settings, job.source.model, job.plan, Thrift())


def test_rows_of_steps():
    rows = torch.zeros(20, 3000)
    split = TuningRows.of(rows, seed=5)
    assert split.held.tolist() == [18, 19]
    assert split.count == 2
    seen = torch.cat([split.of_step(step) for step in range(9)]).tolist()
    assert sorted(seen) == list(range(18))
    assert seen != sorted(seen)
    again = torch.cat([split.of_step(step) for step in range(9, 18)]).tolist()
    assert sorted(again) == list(range(18))
    assert again != seen
    few = TuningRows.of(torch.zeros(5, 100), seed=5)  # a step wants more than there are
    assert sorted(few.of_step(1).tolist()) == [0, 1, 2]


def test_too_few_rows_are_told_before_any_work(tiny, tmp_path):
    with pytest.raises(UserError, match="2 calibration rows out"):
        run(*job_flags(tiny, tmp_path, **{"-cr": 2, "--tune": 5}))
    assert not list((tmp_path / "work" / "layers").glob("*"))
