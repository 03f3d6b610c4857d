"""Whole jobs on a GPU, beside the same on the CPU. Skipped where there is no GPU."""

import pytest
import torch
from jobs_helpers import flags, run
from tiny_models import save_tiny, save_tokenizer
from tiny_quants import save_model

import exl3
from exl3.devices import pick_devices
from exl3.evaluate.compare import compare
from exl3.evaluate.metrics import row_kld
from exl3.evaluate.stream import stream_logits
from exl3.model.quantized import open_model

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """What is compared must really have run on the GPU."""
    if torch.cuda.is_available():
        devices, note = pick_devices("0")
        assert devices == [GPU], note


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "model")


def converted(source, folder, device, *more):
    out = folder / f"q{device}"
    given = flags(source, out, folder / f"w{device}", "3", **{"-cr": 8, "-cc": 64, "-d": device})
    run(*given, *more)
    return out


@needs_gpu
@pytest.mark.parametrize(
    "more", [(), ("--no_correction", "--hessian", "input")], ids=("default", "plain")
)
def test_a_conversion_is_as_good_as_the_cpus(model, tmp_path, more):
    quants = [converted(model, tmp_path, device, *more) for device in ("cpu", "0")]
    rows = torch.randint(300, (16, 64), generator=torch.Generator().manual_seed(3))
    _, cpu, gpu = compare(model, quants, rows)
    # Of a random model: other seeds on the CPU are up to a tenth apart in perplexity.
    assert gpu.perplexity == pytest.approx(cpu.perplexity, rel=0.15)
    assert gpu.kld == pytest.approx(cpu.kld, rel=0.1)


@needs_gpu
def test_a_mixture_of_experts_is_as_good_as_the_cpus(tmp_path):
    source = tmp_path / "moe"
    sizes = {"hidden_size": 128, "num_hidden_layers": 1, "moe_intermediate_size": 128}
    save_tiny("qwen3_moe", source, vocab_size=300, mlp_only_layers=[], **sizes)
    save_tokenizer(source)
    quants = [converted(source, tmp_path, device, "-cc", "32") for device in ("cpu", "0")]
    rows = torch.randint(300, (16, 64), generator=torch.Generator().manual_seed(3))
    _, cpu, gpu = compare(source, quants, rows)
    assert gpu.kld == pytest.approx(cpu.kld, rel=0.15)


@needs_gpu
def test_the_same_bytes_every_time(model, tmp_path):
    quants = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        quants.append(converted(model, tmp_path / name, "0"))
    assert len({(quant / "model.safetensors").read_bytes() for quant in quants}) == 1


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
def test_two_gpus_end_in_the_bytes_of_one(model, tmp_path):
    quants = [converted(model, tmp_path, device) for device in ("0", "0,1")]
    assert len({(quant / "model.safetensors").read_bytes() for quant in quants}) == 1


@needs_gpu
def test_tuning_makes_a_quant_better(model, tmp_path, capsys):
    converted(model, tmp_path, "0", "--tune", "10")
    assert "tuning the whole model: KL divergence on" in capsys.readouterr().out


@needs_gpu
def test_predictions_are_the_cpus(model):
    rows = torch.randint(300, (2, 64), generator=torch.Generator().manual_seed(3))
    logits = [
        [found for _, found in stream_logits(open_model(model, device=device), rows)]
        for device in (CPU, GPU)
    ]
    for expected, found in zip(*logits, strict=True):
        assert found.device == GPU
        assert float(row_kld(found.cpu(), expected).max()) < 1e-6


@needs_gpu
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("sides", [1, 2])
def test_a_linear_is_as_good_as_the_cpus(bits, sides):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 384, generator=generator)
    names, hessians = ("hessian", "output_hessian")[:sides], {}
    for name, size in zip(names, weight.shape, strict=False):
        x = torch.randn(2000, size, generator=generator) * torch.linspace(0.1, 2, size)
        hessians[name] = x.T @ x / len(x)
    expected = exl3.quantize_linear(weight, bits=bits, **hessians)
    on_gpu = {name: h.to(GPU) for name, h in hessians.items()}
    found = exl3.quantize_linear(weight.to(GPU), bits=bits, **on_gpu)
    assert found.weight.device == GPU
    assert found.proxy_error == pytest.approx(expected.proxy_error, rel=0.02)
    assert found.weight_error == pytest.approx(expected.weight_error, rel=0.02)
