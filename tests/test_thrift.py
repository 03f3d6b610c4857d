"""With little memory a conversion is slower, never different; with too little it says so."""

import hashlib

import pytest
from jobs_helpers import flags, run
from safetensors.torch import load_file
from test_job_ends import dry
from tiny_models import save_tiny, save_tokenizer

from exl3 import parallel
from exl3.errors import UserError
from exl3.jobs import convert, thrift
from exl3.jobs.estimate import work_bytes
from exl3.jobs.output_hessians import output_hessian_bytes
from exl3.jobs.plan import make_plan
from exl3.jobs.settings import Settings
from exl3.jobs.thrift import THRIFTS, Thrift, choose_thrift, peak_bytes, spilled_bytes
from exl3.memory import GIB, Spill
from exl3.model.streamed import StreamedModel

SIZES = {"hidden_size": 128, "intermediate_size": 128, "vocab_size": 300, "num_hidden_layers": 2}
ROWS = 100_000  # so many that states count for much, in estimates


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny models by type."""
    base = tmp_path_factory.mktemp("models")
    for kind, sizes in (("llama", {}), ("mixtral", {"num_local_experts": 2})):
        save_tiny(kind, base / kind, **SIZES, **sizes)
        save_tokenizer(base / kind)
    return base


def settings(models, kind="llama", **more):
    return Settings(str(models / kind), "/out", "/work", bits=2, cal_cols=64, **more)


@pytest.fixture
def program(monkeypatch):
    """A program that takes no memory itself, so that limits are of the job alone."""
    monkeypatch.setattr(thrift, "resident_now", lambda: 0)


# -- The choice ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_the_fastest_way_that_fits_is_chosen(models, program, kind):
    model, asked = StreamedModel(models / kind), settings(models, kind)
    plan = make_plan(asked, model)
    needs = [peak_bytes(asked, model, plan, ROWS, way) for way in THRIFTS]
    assert needs == sorted(needs, reverse=True)
    assert needs[1] > 2 * needs[2]
    for way, need in zip(THRIFTS, needs, strict=True):
        asked.max_memory = need / GIB
        assert choose_thrift(asked, model, plan, ROWS) == way
    asked.max_memory = (needs[-1] - 1) / GIB
    with pytest.raises(UserError, match="--max_memory is"):
        choose_thrift(asked, model, plan, ROWS)


def test_the_part_that_is_too_large_is_named(models, program):
    model = StreamedModel(models / "llama")
    cases = (
        ("model.layers.0", {"hessian": "input", "uniform": True}),
        ("the backward pass", {"hessian_rows": ROWS}),
    )
    for part, more in cases:
        asked = settings(models, max_memory=1e-6, **more)
        with pytest.raises(UserError) as error:
            choose_thrift(asked, model, make_plan(asked, model), ROWS)
        assert str(error.value).startswith(f"{part} needs ")


def test_without_a_limit_what_is_free_counts(models, program, monkeypatch):
    model, asked = StreamedModel(models / "llama"), settings(models)
    plan = make_plan(asked, model)
    monkeypatch.setattr(thrift, "resident_now", lambda: 0)
    monkeypatch.setattr(thrift, "available_bytes", lambda: 1000 * GIB)
    assert choose_thrift(asked, model, plan, ROWS) == Thrift()
    monkeypatch.setattr(thrift, "available_bytes", lambda: 1000)
    with pytest.raises(UserError, match=r"needs [\d,.]+ GiB of memory, there are 0\.0 GiB; use a"):
        choose_thrift(asked, model, plan, ROWS)


def test_less_is_kept_with_fewer_wishes(models):
    model = StreamedModel(models / "mixtral")

    def peak(**more):
        asked = settings(models, "mixtral", **more)
        return peak_bytes(asked, model, make_plan(asked, model), ROWS, Thrift())

    assert peak(no_correction=True) < 0.5 * peak()
    assert peak(hessian="input") < peak()
    assert peak(hessian_rows=1) < peak()


def test_the_heads_output_side_hessian_counts(models, monkeypatch):
    """Two more copies of the weight, of a large head's columns that are taken together; and of its
    blocks of 128 outputs a sum, its mean, and one a thread; a small one's whole matrix, as of any
    linear."""
    monkeypatch.setattr(parallel, "_THREADS", 3)
    head = StreamedModel(models / "llama").head()[1]
    columns = 384  # 300, padded

    def outputs():
        plain, kron = (
            thrift._linear_peak(settings(models, hessian=hessian), head, head=True)
            for hessian in ("input", "kron")
        )
        return kron - plain

    copies = 2 * 4 * 128 * columns
    assert outputs() == copies + 24 * columns**2
    monkeypatch.setattr(thrift, "WHOLE_HEAD", 299)
    assert outputs() == copies + 5 * 4 * 128 * columns
    monkeypatch.setattr(thrift, "TOGETHER", 2)
    assert outputs() == copies * 2 // 3 + 5 * 4 * 128 * columns


def test_what_is_spilled_counts_on_the_disk(models):
    for kind, streams in (("llama", 2), ("mixtral", 5)):
        model, asked = StreamedModel(models / kind), settings(models, kind)
        plan = make_plan(asked, model)
        told = [work_bytes(asked, model, plan, ROWS, way) for way in THRIFTS]
        assert told[0] == told[1] == told[2] - streams * 4 * ROWS * 64 * 128
        assert spilled_bytes(asked, model, ROWS, THRIFTS[1]) == 0


# -- The result ----------------------------------------------------------------------------------


def digest(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "kind", [pytest.param("llama", marks=pytest.mark.slow), "mixtral"], ids=str
)
def test_every_way_makes_the_same_bytes(models, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setattr(parallel, "_THREADS", 2)
    monkeypatch.setattr("exl3.jobs.streams.BATCH_TOKENS", 128)
    spilled, empty = [], Spill.empty

    def noted(spill, *shape, **more):
        spilled.append(shape)
        return empty(spill, *shape, **more)

    monkeypatch.setattr(Spill, "empty", noted)
    made, told = [], []
    for n, way in enumerate(THRIFTS):
        monkeypatch.setattr(convert, "choose_thrift", lambda *_, way=way: way)
        run(*flags(models / kind, tmp_path / f"{n}", tmp_path / f"w{n}", "2", **{"-hb": 16}))
        made.append(digest(tmp_path / f"{n}"))
        told.append(capsys.readouterr().out)
        assert bool(spilled) == way.spill
        assert not list((tmp_path / f"w{n}").glob("*.spilled"))
    assert len(set(made)) == 1
    assert "memory is short" not in told[0]
    assert "memory is short: parts of a block" in told[1]
    assert "memory is short: states are kept in files, and parts of a block" in told[2]


def test_a_job_may_go_on_with_less_memory(models, tmp_path, monkeypatch):
    """From the states of both streams behind the first block, which go to files at once."""
    job = flags(models / "llama", tmp_path / "out", tmp_path / "work", "2", **{"-cpi": 0})
    run(*job)
    states = (tmp_path / "work" / "states.safetensors").read_bytes()
    convert_block = convert.convert_block

    def dying(job, i, streams):
        if i == 1:
            raise KeyboardInterrupt
        convert_block(job, i, streams)

    monkeypatch.setattr(convert, "convert_block", dying)
    with pytest.raises(KeyboardInterrupt):
        run(*flags(models / "llama", tmp_path / "new", tmp_path / "work2", "2", **{"-cpi": 0}))
    assert load_file(tmp_path / "work2" / "states.safetensors").keys() == {"states", "original"}
    monkeypatch.setattr(convert, "convert_block", convert_block)
    monkeypatch.setattr(convert, "choose_thrift", lambda *_: Thrift(replay=False, spill=True))
    run("-w", str(tmp_path / "work2"), "-r", "--max_memory", "50")
    assert (tmp_path / "work2" / "states.safetensors").read_bytes() == states
    assert digest(tmp_path / "new") == digest(tmp_path / "out")


def test_too_little_memory_is_told_before_any_work(models, tmp_path):
    job = flags(models / "llama", tmp_path / "out", tmp_path / "work", "2", **{"--max_memory": 0.1})
    message = (
        r"^(model\.layers\.0|the head|the backward pass) needs [\d.]+ GiB of memory, "
        r"--max_memory is 0\.1 GiB; use a machine with more, or try --hessian input, "
    )
    with pytest.raises(UserError, match=message):
        run(*job)
    assert list((tmp_path / "work" / "layers").iterdir()) == []
    with pytest.raises(UserError, match=message):
        run(*job, "--dry_run")
    with pytest.raises(UserError, match=r"--max_memory 0\.01 is out of range"):
        run(*job, "--max_memory", "0.01")


def test_a_dry_run_tells_what_gradients_take(models, capsys):
    job = ("-i", str(models / "llama"), "-b", "2", "-cc", "64", "-cr", "1000", "--dry_run")
    told = []
    for more in ((), ("--uniform",), ("--no_correction",)):
        run(*job, *(("--hessian", "input") if more else ()), *more)
        told.append(dry(capsys.readouterr().out)["work"])
    boundary, stream = 4 * 16 * 64 * 128, 4 * 1000 * 64 * 128
    model = StreamedModel(models / "llama")
    kept = output_hessian_bytes(model, range(model.num_blocks), 16 * 64)
    assert told[0] - told[1] == pytest.approx(2 * 2 * boundary + kept, abs=2**17)
    assert told[1] - told[2] == pytest.approx(2 * stream, abs=2**17)
