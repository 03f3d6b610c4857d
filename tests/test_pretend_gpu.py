"""Jobs on GPUs that are only pretended: the CPU's bytes, no mixed devices, few transfers."""

import threading
from dataclasses import replace

import pytest
import torch
from jobs_helpers import flags, run
from pretend_gpu import PretendTensor, pretend_gpus
from tiny_models import save_tiny, save_tokenizer
from tiny_quants import save_model

import exl3
from exl3 import cli, devices
from exl3.cli import read_devices
from exl3.commands.measure import main as measure
from exl3.commands.ppl import main as ppl
from exl3.devices import CPU, pick_device, pick_devices
from exl3.divide import divided, undivided
from exl3.errors import UserError
from exl3.evaluate.compare import compare
from exl3.format.hadamard import HADAMARD
from exl3.jobs import convert, estimate, quantize, thrift
from exl3.jobs.block import Block
from exl3.jobs.plan import make_plan
from exl3.jobs.settings import Settings
from exl3.jobs.source import open_model
from exl3.jobs.thrift import GPU_THRIFTS, choose_thrift
from exl3.jobs.workdir import WorkDir
from exl3.measurement import read_measurement
from exl3.quant import scale
from exl3.quant.correction import Correction, Moments
from exl3.quant.scale import PROBES

GPU = torch.device("cuda", 0)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def second_moment(features, seed):
    x = normal(3 * features, features, seed=seed) * torch.linspace(0.1, 2, features)
    return x.T @ x / len(x)


def on(device, x):
    return x.to(device) if isinstance(x, torch.Tensor) else x


OPTIONS = {
    "plain": {"hessian": None},
    "one side": {},
    "two bits": {"bits": 2},
    "mcg": {"codebook": "mcg"},
    "3inst": {"codebook": "3inst"},
    "one output scale": {"out_scales": "never"},
    "the better scales": {"out_scales": "auto"},
    "target": {"target": normal(200, 256, seed=5)},
    "two sides": {"output_hessian": second_moment(256, 6)},
    "blocks of outputs": {
        "output_hessian": torch.stack([second_moment(HADAMARD, s) for s in (7, 8)])
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_linear_is_the_same_on_a_gpu(name):
    options = {"hessian": second_moment(200, 3), "bits": 3, **OPTIONS[name]}
    weight = normal(200, 256)
    expected = exl3.quantize_linear(weight, **options)
    with pretend_gpus():
        given = {key: on(GPU, value) for key, value in options.items()}
        result = exl3.quantize_linear(weight.to(GPU), **given)
        for key in ("trellis", "suh", "svh"):
            assert isinstance(result.tensors[key], PretendTensor)
            assert torch.equal(result.tensors[key].cpu(), expected.tensors[key])
        assert torch.equal(result.weight.cpu(), expected.weight)
    assert result.proxy_error == expected.proxy_error
    assert result.notes == expected.notes


def one_scale(tiles, counts, bits, codebook):
    return 0.9, scale._error(tiles, counts, 0.9, bits, codebook)


@pytest.mark.parametrize("sides", [1, 2])
def test_rows_of_a_linear_are_encoded_without_transfers(sides, monkeypatch):
    """What passes between memory and card does not grow with the rows and columns. (How many scales
    are tried depends on the weights, so just one is.)"""
    monkeypatch.setattr("exl3.quant.linear.search_scale", one_scale)
    passed = []
    for size in (128, 512):
        with pretend_gpus() as traffic:
            names = ("hessian", "output_hessian")[:sides]
            hessians = {name: second_moment(size, 3).to(GPU) for name in names}
            weight = normal(size, size).to(GPU)
            exl3.quantize_linear(weight, bits=4, **hessians)  # tables are sent once
            traffic.clear()
            exl3.quantize_linear(weight, bits=4, **hessians)
            passed.append((len(traffic.up), len(traffic.down), traffic.waits))
            assert max(traffic.down) <= 8  # numbers
            assert max(traffic.up) <= 4 * PROBES * size  # vectors
    assert passed[0] == passed[1]


def test_corrections_are_the_same_on_a_gpu():
    xq, xf, r, w = normal(300, 64), normal(300, 64, seed=1), normal(300, 96, seed=2), normal(64, 96)

    def target(device):
        moments = Moments(64, 96, device)
        weights = normal(300, seed=4).abs()
        moments.add(xq.to(device), xf, r, weights)  # from wherever they are
        correction = Correction(moments.hessian.mean(), 0.1)
        return correction.target(w.to(device), moments.shift(), moments.residual())

    expected = target(torch.device("cpu"))
    with pretend_gpus():
        found = target(GPU)
        assert found.device == GPU
        assert torch.equal(found.cpu(), expected)


def test_where_a_card_is_too_small_the_cpu_factors(monkeypatch):
    from exl3.quant import correction, linear

    def short_of(function):
        def tried(matrix):
            if matrix.is_cuda:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return function(matrix)

        return tried

    weight, hessian = normal(128, 128), second_moment(128, 3)
    sides = {"hessian": hessian, "output_hessian": second_moment(128, 4)}
    expected = exl3.quantize_linear(weight, bits=3, **sides)
    shift = second_moment(128, 5)
    wanted = Correction(hessian).target(weight, shift)
    monkeypatch.setattr(linear, "block_ldl", short_of(linear.block_ldl))
    monkeypatch.setattr(correction, "cholesky_", short_of(correction.cholesky_))
    with pretend_gpus():
        given = {key: value.to(GPU) for key, value in sides.items()}
        result = exl3.quantize_linear(weight.to(GPU), bits=3, **given)
        assert torch.equal(result.tensors["trellis"].cpu(), expected.tensors["trellis"])
        assert len([note for note in result.notes if "on the CPU" in note]) == 2
        corrected = Correction(hessian.to(GPU))
        assert torch.equal(corrected.target(weight.to(GPU), shift.to(GPU)).cpu(), wanted)
        assert "on the CPU" in corrected.notes[0]


def test_the_pretence_refuses_what_a_gpu_refuses():
    with pretend_gpus(2):
        a, b = torch.ones(4, 4, device="cuda:0"), torch.ones(4, 4, device="cuda:1")
        for mixed in (lambda: a + b, lambda: a @ torch.ones(4, 4), lambda: torch.ones(4).add_(b)):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises((RuntimeError, TypeError)):
            a.numpy()
        assert float((a + torch.tensor(2.0)).sum()) == 48  # a number may come from anywhere
        assert torch.equal(a.to(b.device) + b, 2 * b)


# -- Jobs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe") / "moe"
    sizes = {"hidden_size": 128, "num_hidden_layers": 1, "moe_intermediate_size": 128}
    save_tiny("qwen3_moe", folder, vocab_size=300, mlp_only_layers=[], **sizes)
    save_tokenizer(folder)
    return folder


@pytest.fixture(autouse=True)
def same_gradients(monkeypatch):
    """The original's gradients differ in their last bits, for autograd folds products otherwise
    with these tensors. Those of a test's first job serve the others, once seen to be near."""
    first: dict[tuple[str, str], torch.Tensor] = {}
    own = Block.output_hessian

    def output_hessian(block: Block, key: str) -> torch.Tensor | None:
        found = own(block, key)
        if found is None:
            return None
        known = first.setdefault((str(block.model.path), key), found.cpu())
        assert (found.cpu() - known).norm() <= 1e-5 * known.norm()
        return known.to(found.device)

    monkeypatch.setattr(Block, "output_hessian", output_hessian)


def converted(source, folder, device, *more):
    """The bytes of a quant's tensors."""
    out, work = folder / f"q{device}", folder / f"w{device}"
    given = flags(source, out, work, "2", **{"-cr": 3, "-cc": 32, "-d": device})
    run(*given, "--hessian_rows", "2", *more)
    return (out / "model.safetensors").read_bytes()


def test_a_conversion_on_gpus_ends_in_the_bytes_of_the_cpu(model, tmp_path, capsys):
    with pretend_gpus(2):  # for the CPU too: attention is computed alike
        expected = converted(model, tmp_path, "cpu")
        assert "Running on cuda" not in capsys.readouterr().out
        assert converted(model, tmp_path, "0", "--check_rows", "2") == expected
        told = capsys.readouterr().out
        assert "Running on cuda:0 (Pretended GPU), in float32 without TF32" in told
        assert "KL divergence" in told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "device", "more"),
    [
        ("model", "0,1", ()),
        ("model", "0,1", ("--no_correction", "--hessian", "input", "-cb", "mcg")),
        ("model", "0", ("--tune", "5", "-hb", "16")),
        ("moe", "0,1", ()),
        ("moe", "1", ("--no_correction",)),
    ],
    ids=("two cards", "at once", "tuned", "experts", "experts at once"),
)
def test_all_ways_of_a_conversion_on_gpus(request, tmp_path, source, device, more):
    source = request.getfixturevalue(source)
    with pretend_gpus(2):
        expected = converted(source, tmp_path, "cpu", *more)
        assert converted(source, tmp_path, device, *more) == expected


@pytest.mark.slow
@pytest.mark.parametrize("source", ["model", "moe"])
def test_where_states_lie_changes_no_byte(request, tmp_path, monkeypatch, source):
    source = request.getfixturevalue(source)
    seen = []
    with pretend_gpus():
        for way in GPU_THRIFTS:
            monkeypatch.setattr(convert, "choose_thrift", lambda *_, way=way: way)
            (tmp_path / str(len(seen))).mkdir()
            seen.append(converted(source, tmp_path / str(len(seen)), "0"))
    assert all(found == seen[0] for found in seen)


def test_two_cards_share_the_linears_of_a_stage(model, tmp_path, monkeypatch):
    """Each is given some, all that is saved is saved in order, by one thread."""
    placed, saved = {}, []
    quantize_linear, save = quantize.quantize_linear, WorkDir.save_layer
    both = threading.Barrier(2, timeout=60)

    def noted(weight, *given, name, **more):
        placed[name] = weight.device
        if name.rpartition(".mlp.")[2] in ("gate_proj.weight", "up_proj.weight"):
            both.wait()  # the second begins before the first has ended
        return quantize_linear(weight, *given, name=name, **more)

    monkeypatch.setattr(quantize, "quantize_linear", noted)
    monkeypatch.setattr(
        WorkDir, "save_layer", lambda self, key, *more: saved.append(key) or save(self, key, *more)
    )
    with pretend_gpus(2):
        converted(model, tmp_path, "0,1")
    gate, up = (f"model.layers.0.mlp.{kind}_proj.weight" for kind in ("gate", "up"))
    assert {placed[gate].index, placed[up].index} == {0, 1}
    kinds = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o")
    kinds += ("mlp.gate", "mlp.up", "mlp.down")
    assert saved[:7] == [f"model.layers.0.{kind}_proj" for kind in kinds]


# -- Where a job may go on -------------------------------------------------------------------------


def test_a_job_goes_on_where_it_began(model, tmp_path, monkeypatch):
    out, work = tmp_path / "out", tmp_path / "work"
    given = flags(model, out, work, "2", **{"-cr": 3, "-cc": 32})
    given = [*given, "--hessian", "input", "--no_correction", "-d"]

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    with pretend_gpus():
        monkeypatch.setattr(convert, "convert_blocks", kill)
        with pytest.raises(Killed):  # on the CPU, before anything is done
            run(*given, "cpu")
        with pytest.raises(Killed):
            run(*given, "0")
        monkeypatch.undo()
        monkeypatch.setattr(convert, "convert_head", kill)
        with pytest.raises(Killed):
            run(*given, "0")
        with pytest.raises(UserError, match=r"began on a GPU.*go on with a GPU \(-d 0\)"):
            run(*given, "cpu")
        monkeypatch.undo()
        run("-w", str(work), "-r", "-d", "0")
        assert out.is_dir()
        run(*given[:-1], "-d", "0")  # complete already


def test_a_job_of_the_cpu_stays_there(model, tmp_path):
    with pretend_gpus():
        converted(model, tmp_path, "cpu")
        given = flags(model, tmp_path / "qcpu", tmp_path / "wcpu", "2", **{"-cr": 3, "-cc": 32})
        with pytest.raises(UserError, match=r"began on the CPU.*go on there \(-d cpu\)"):
            run(*given, "--hessian_rows", "2", "-d", "0")


# -- Memory ----------------------------------------------------------------------------------------


@pytest.fixture
def opened(model):
    """What choices are made by, with so many rows that states count."""

    def on_gpu(**more):
        settings = Settings(str(model), "out", "work", 2.0, cal_rows=100_000, cal_cols=64, **more)
        source = open_model(settings, GPU)
        return settings, source, make_plan(settings, source), 100_000

    return on_gpu


def room_for(nbytes):
    """Memory of a card that has just room for tensors of so many bytes."""
    return int((nbytes + thrift.CARD_BYTES + 1) / thrift.CARD_SHARE) + 1


def test_the_card_tells_where_states_lie(opened):
    with pretend_gpus():
        given = opened()
        needs = [thrift.computing_bytes(*given, way) for way in GPU_THRIFTS]
        ram = [thrift.peak_bytes(*given, way) for way in GPU_THRIFTS]
    states = 2 * thrift.states_bytes(given[0], given[1], 100_000)
    assert needs[0] == needs[1] + states
    assert needs[1] > needs[2] == needs[3]
    assert ram[1] == ram[0] + states
    assert ram[1] == ram[2] > ram[3]
    for need, way in zip(needs[:3], GPU_THRIFTS, strict=False):
        with pretend_gpus(memory=room_for(need)):
            assert choose_thrift(*opened()) == way
    told = pytest.raises(UserError, match=r"needs .* GiB on cuda:0, .*-d cpu")
    with pretend_gpus(memory=room_for(needs[2]) - 2**20), told:
        choose_thrift(*opened())


def test_a_dry_run_tells_the_memory_of_cards(model, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "_timed", lambda work: 1.0)  # a GPU's share takes a CPU long
    with pretend_gpus(2):
        run("-i", str(model), "-b", "2", "-cc", "64", "--dry_run", "-d", "0,1")
    told = capsys.readouterr().out
    assert "GPU      " in told
    assert "on each other" in told
    assert "one GPU" in told


def test_a_small_second_card_is_refused(opened, monkeypatch):
    with pretend_gpus(2):
        monkeypatch.setattr(thrift, "card_limit", lambda device: 10**12 * (1 - device.index))
        with pytest.raises(UserError, match=r"on cuda:1, .*leave it out of -d"):
            choose_thrift(*opened(), [torch.device("cuda", 1)])


def test_running_out_of_a_cards_memory_is_one_sentence(capsys):
    def full():
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."
        )

    with pytest.raises(SystemExit) as end:
        cli.run(full)
    assert end.value.code == 1
    told = capsys.readouterr().err
    assert told == (
        "Error: a GPU's memory is too short (CUDA out of memory); free it of other programs, take "
        "a larger one, or work on the CPU (-d cpu)\n"
    )


# -- Flags -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("cpu", ()),
        ("0", (0,)),
        ("1,0", (1, 0)),
        (" 0, 2", (0, 2)),
        ("cuda:3", (3,)),
    ],
)
def test_devices_as_users_write_them(text, numbers):
    assert read_devices(text) == numbers


@pytest.mark.parametrize("text", ["", "gpu", "-1", "0,", "0,cpu", "0,0", "cuda", "cuda:x", "9999"])
def test_devices_that_are_none(text):
    with pytest.raises(UserError, match="-dev"):
        read_devices(text, "-dev")


def test_which_device_is_picked(monkeypatch):
    with pretend_gpus(2):
        assert pick_devices("0,1")[0] == [GPU, torch.device("cuda", 1)]
        assert pick_devices("cpu") == ([CPU], None)
        assert pick_device("1,0") == (
            torch.device("cuda", 1),
            "Running on cuda:1 (Pretended GPU), cuda:0 (Pretended GPU), in float32 without TF32; "
            "only cuda:1 is of use here",
        )
        with pytest.raises(UserError, match="there is no GPU 2 here, only GPUs 0 to 1"):
            pick_devices("0,2")
        monkeypatch.setattr(devices, "_kernels_built", lambda: False)
        device, note = pick_device("0")
        assert device == CPU
        assert "kernels are built without CUDA" in note
        assert pick_device("0", kernels=False)[0] == GPU  # where torch alone computes


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_cpu_works_and_a_line_says_so():
    device, note = pick_device("0", "-dev")
    assert device == CPU
    assert note.startswith("-dev 0: ")
    assert note.endswith("; running on the CPU")


# -- Evaluation ------------------------------------------------------------------------------------


def test_measurements_on_a_gpu_are_those_of_the_cpu(model, tmp_path):
    def measured(device):
        out = tmp_path / f"{device}.json"
        given = ["-r", model, "-o", out, "-l", 1, "-cr", 2, "-cc", 32, "--hessian_rows", 2]
        measure([str(x) for x in (*given, "-d", device)])
        return read_measurement(out)

    with pretend_gpus():
        expected, found = measured("cpu"), measured("0")
    plain, others = (
        [replace(group, sensitivity=None) for group in undivided(m).groups]
        for m in (found, expected)
    )
    assert plain == others
    for own, theirs in zip(divided(found).groups, divided(expected).groups, strict=True):
        assert own.layers == theirs.layers
        for name in ("kld", "sensitivity"):  # attention runs otherwise there
            assert getattr(own, name) == pytest.approx(getattr(theirs, name), rel=1e-4)
    assert found.head == expected.head
    assert found.job != expected.job  # layers of another backend


def test_comparisons_on_a_gpu_are_those_of_the_cpu(model, tmp_path, capsys):
    with pretend_gpus():
        out = tmp_path / "q"
        run(*flags(model, out, tmp_path / "w", "3", **{"-cr": 3, "-cc": 32}))
        told = []
        for device in ("cpu", "0"):
            capsys.readouterr()
            ppl(["-m", str(out), "-r", "2", "-l", "32", "-dev", device])
            told.append(capsys.readouterr().out.splitlines()[-1])
        assert told[0] == told[1]
        rows = torch.arange(64).reshape(2, 32)
        scores = [compare(model, [out], rows, device=device) for device in (CPU, GPU)]
    assert scores[0][1].kld == scores[1][1].kld > 0
    assert scores[0][0].perplexity == scores[1][0].perplexity
