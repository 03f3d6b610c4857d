"""What the original's gradients say about the bits of its linears."""

import json
import threading

import pytest
import torch
import torch.nn.functional as F
from jobs_helpers import flags, run
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

from exl3.errors import UserError
from exl3.files import one_at_a_time
from exl3.jobs.boundaries import Boundaries, boundary_gradients, boundary_work
from exl3.jobs.sensitivities import NAME, Sensitivities
from exl3.jobs.survey import Survey
from exl3.model.streamed import StreamedModel
from exl3.progress import Progress
from exl3.sensitivity import channel_scales, rounding_kld


def sensitivities(folder, model, rows, **how) -> Sensitivities:
    boundaries = Boundaries(folder, model, rows, 0)
    found = Sensitivities(folder, boundaries.identity, model.num_blocks)
    model.load_embedding()
    boundary_gradients(model, boundaries, survey=Survey(found, rows.numel()), **how)
    return found


def noise(weight: torch.Tensor) -> torch.Tensor:
    """Independent errors (out, in) of relative variance 1."""
    s, t = channel_scales(weight)
    return torch.randn(weight.shape) * s * t[:, None]


def test_expected_kld_of_independent_errors():
    torch.manual_seed(0)
    weight = torch.randn(24, 40) * torch.rand(24, 1) * torch.rand(40)
    x, d = torch.randn(50, 40), torch.randn(50, 24)
    found = [0.5 * ((x @ noise(weight).T) * d).sum(1).square().sum() for _ in range(2000)]
    expected = rounding_kld(x, d, channel_scales(weight))
    assert float(torch.stack(found).mean()) == pytest.approx(expected, rel=0.05)


def test_scales_are_those_of_the_channels():
    s, t = torch.rand(128) + 0.1, torch.rand(64) + 0.1
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).sign()
    found_s, found_t = channel_scales(weight * s * t[:, None])
    assert torch.allclose(found_s[:, None] * found_t, s[:, None] * t, rtol=1e-4)
    weight[3] = 0
    found_s, found_t = channel_scales(weight)
    assert found_t[3] == 0 and torch.isfinite(found_s).all()


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_they_foretell_the_kld_of_small_errors(tmp_path, kind):
    """Of every kind of linear in the middle of a model, against the stock model with noise."""
    torch.manual_seed(0)
    folder = tmp_path / "model"
    save_tiny(kind, folder)
    rows = torch.randint(3, 128, (64, 32))
    found = sensitivities(tmp_path / "files", StreamedModel(folder), rows).by_key()
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        expected = stock(rows).logits.log_softmax(-1)
    ratios = []
    for name, linear in stock.named_modules():
        if not isinstance(linear, torch.nn.Linear) or ".layers.1." not in f".{name}":
            continue
        kept = linear.weight.data
        klds = []
        for _ in range(4):
            linear.weight.data = kept + 0.02 * noise(kept)
            with torch.no_grad():
                logits = stock(rows).logits.log_softmax(-1)
            klds.append(F.kl_div(logits, expected, log_target=True, reduction="sum") / rows.numel())
        linear.weight.data = kept
        ratios.append(float(sum(klds)) / 4 / (found[name] * 0.02**2))
    assert len(ratios) >= 4
    # One draw of targets for every token, four of errors.
    assert all(0.5 < ratio < 2 for ratio in ratios), ratios
    assert 0.75 < sum(ratios) / len(ratios) < 1.3, ratios


def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    save_tiny("llama", tmp_path / "model")
    model, rows = StreamedModel(tmp_path / "model"), torch.arange(64).reshape(4, 16)
    whole = sensitivities(tmp_path / "whole", model, rows)
    assert whole.complete and len(whole.by_key()) == 7 * model.num_blocks
    assert all(kld > 0 for kld in whole.by_key().values())

    save = Sensitivities.save

    def killed(self, i, klds):
        if i == 1:
            raise KeyboardInterrupt
        save(self, i, klds)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Sensitivities, "save", killed)
        sensitivities(tmp_path / "killed", model, rows)
    with Progress(boundary_work(model, len(rows)), "", quiet=True) as progress:
        again = sensitivities(tmp_path / "killed", model, rows, progress=progress)
    assert progress.done == pytest.approx(progress.total)
    assert again.by_key() == whole.by_key()
    assert (tmp_path / "killed" / NAME).read_bytes() == (tmp_path / "whole" / NAME).read_bytes()


def test_those_of_something_else_are_forgotten_or_refused(tmp_path):
    Sensitivities(tmp_path, {"model": "a"}, 1).save(0, {"q": 1.0})
    assert Sensitivities(tmp_path, {"model": "a"}, 1).by_key() == {"q": 1.0}
    assert not Sensitivities(tmp_path, {"model": "b"}, 1).complete
    with pytest.raises(UserError, match=f"{NAME} is of another model or other rows"):
        Sensitivities(tmp_path, {"model": "b"}, 1, own=False)
    (tmp_path / NAME).write_text('{"of": {"model": "a"}, "blocks": {"0": 3')
    with pytest.raises(UserError, match=f"{NAME} is damaged"):
        Sensitivities(tmp_path, {"model": "a"}, 1)


# -- In a conversion ------------------------------------------------------------------------------


def bits_of(out) -> dict[str, int]:
    storage = json.loads((out / "quantization_config.json").read_text())["tensor_storage"]
    return {k: m["bits_per_weight"] for k, m in storage.items() if "bits_per_weight" in m}


def test_whole_bits_are_an_average_unless_they_are_to_be_uniform(tiny, tmp_path, capsys):
    run(*flags(tiny.model, tmp_path / "out", tmp_path / "work", "3"))
    found = bits_of(tmp_path / "out")
    head = found.pop("lm_head")
    assert head == 6 and len(set(found.values())) > 1
    assert "by the model's own gradients: " in capsys.readouterr().out
    told = json.loads((tmp_path / "work" / NAME).read_text())["blocks"]
    assert {key for klds in told.values() for key in klds} == set(found)
    for way in ("--uniform", "--no_correction"):
        run(*flags(tiny.model, tmp_path / way, tmp_path / f"work{way}", "3"), way)
        assert set(bits_of(tmp_path / way).values()) == {3, 6}
        assert not (tmp_path / f"work{way}" / NAME).exists()


def test_saved_hessians_keep_them_for_other_bits(tiny, tmp_path, monkeypatch):
    saved = ("--save_hessians", str(tmp_path / "saved"))
    run(*flags(tiny.model, tmp_path / "a", tmp_path / "wa", "2"), *saved)
    assert (tmp_path / "saved" / NAME).exists() and not (tmp_path / "wa" / NAME).exists()
    run(*flags(tiny.model, tmp_path / "plain", tmp_path / "wp", "3"))

    def unwanted(*_, **__):
        raise AssertionError("all is there")

    monkeypatch.setattr("exl3.jobs.trace_back.boundary_gradients", unwanted)
    run(*flags(tiny.model, tmp_path / "b", tmp_path / "wb", "3"), *saved)
    assert bits_of(tmp_path / "b") == bits_of(tmp_path / "plain")


def test_two_jobs_take_turns_in_a_shared_folder(tmp_path):
    order = []

    def second():
        with one_at_a_time(tmp_path):
            order.append("second")

    with one_at_a_time(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_gradients_that_nobody_needs_any_more_are_dropped(tiny, tmp_path, monkeypatch):
    def seen(job, streams):
        assert not [*job.work.path.glob("gradients/*.safetensors")]
        raise KeyboardInterrupt

    monkeypatch.setattr("exl3.jobs.convert.convert_head", seen)
    with pytest.raises(KeyboardInterrupt):
        run(*flags(tiny.model, tmp_path / "a", tmp_path / "w", "2.5"), "--hessian", "input")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("-b", "2.5"), "-b 2.5 --uniform: only whole bits"),
        (("-b", "2", "-m", "m.json"), "--uniform: -m and --recipe give tensors different bits"),
    ],
)
def test_what_contradicts_uniform(tiny, tmp_path, capsys, more, message, monkeypatch):
    from exl3.jobs import settings

    monkeypatch.setattr(settings, "_read_shares", lambda given: None)
    job = ("-i", str(tiny.model), "-o", str(tmp_path / "o"), "-w", str(tmp_path / "w"), "--uniform")
    with pytest.raises(UserError, match=message):
        run(*job, *more)
