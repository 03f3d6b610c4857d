"""What the two ways through a block make: same bytes whatever happens, and less error."""

import hashlib
import os
import re
import shutil
from functools import partial

import pytest
import torch
from jobs_helpers import flags, run
from tiny_models import save_tiny, save_tokenizer

from exl3 import files, parallel
from exl3.data.rows import calibration_rows
from exl3.data.tokenizer import load_tokenizer
from exl3.jobs.settings import forget_job
from exl3.jobs.streams import run_block
from exl3.jobs.workdir import WorkDir
from exl3.model.quantized import open_model

SIZES = {"hidden_size": 128, "intermediate_size": 128, "vocab_size": 300, "num_hidden_layers": 1}
# way → type, flags
WAYS = {
    "default": ("llama", {}),
    "no correction": ("llama", {"--no_correction": None}),
    "inputs only": ("llama", {"--hessian": "input"}),
    "experts": ("mixtral", {}),
    "experts, no correction": ("mixtral", {"--no_correction": None}),
}
SLOW = ("default", "inputs only", "experts, no correction")  # tests/test_convert.py has the first


MODEL = "model.safetensors"


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny models by type."""
    base = tmp_path_factory.mktemp("models")
    for kind, sizes in (("llama", {}), ("mixtral", {"num_local_experts": 2})):
        save_tiny(kind, base / kind, **SIZES, **sizes)
        save_tokenizer(base / kind)
    return base


def command(models, way, base, **more):
    kind, given = WAYS[way]
    job = flags(models / kind, base / "out", base / "work", "2", **{"-hb": 16, **given, **more})
    return [argument for argument in job if argument != "None"]  # switches have no value


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """way → the folder of an uninterrupted job, made once: never to be touched."""
    made = {}

    def convert(way):
        if way not in made:
            made[way] = tmp_path_factory.mktemp("whole")
            run(*command(models, way, made[way]))
        return made[way]

    return convert


def slow(ways):
    return [pytest.param(way, marks=[pytest.mark.slow] * (way in SLOW)) for way in ways]


class Killed(BaseException):
    """Stands for the moment a process dies."""


@pytest.mark.parametrize("way", slow(WAYS))
def test_death_at_any_file_written_changes_no_byte(models, finished, tmp_path, monkeypatch, way):
    """Dies at one write after another, always in the same work folder, until it gets through."""
    whole = digests(finished(way) / "out")
    replace, countdown, deaths = os.replace, 0, 0

    def dying(source, target):
        nonlocal countdown
        countdown -= 1
        if countdown < 0 and deaths % 2:
            raise Killed
        replace(source, target)
        if countdown < 0:
            raise Killed

    monkeypatch.setattr(files.os, "replace", dying)
    while not (tmp_path / "out").exists():
        countdown = 1 + deaths // 2  # lives longer and longer
        try:
            run(*command(models, way, tmp_path, **{"-cpi": 0}))
        except Killed:
            deaths += 1
    assert deaths >= 5
    assert digests(tmp_path / "out") == whole


@pytest.mark.parametrize("way", slow(WAYS))
def test_what_is_missing_is_made_again_to_the_same_bytes(models, finished, tmp_path, way):
    """Every other layer, and gradients; with the states behind them and without."""
    base = finished(way)
    run(*command(models, way, tmp_path))
    work = tmp_path / "work"
    layers = sorted((work / "layers").iterdir())
    for n, more in enumerate(([*layers[::2]], [*layers[1::2], work / "states.safetensors"])):
        for path in (*more, *work.glob("gradients/gradient.*")):
            path.unlink()
        run("-w", str(work), "-r", "-o", str(tmp_path / str(n)))
        assert digests(tmp_path / str(n)) == digests(base / "out")


@pytest.mark.parametrize("way", slow(way for way in WAYS if way != "default"))
def test_threads_change_no_byte(models, finished, tmp_path, monkeypatch, way):
    monkeypatch.setattr(parallel, "_THREADS", 2 if parallel.threads() == 1 else 1)
    run(*command(models, way, tmp_path))
    assert digests(tmp_path / "out") == digests(finished(way) / "out")


@pytest.mark.slow
def test_the_ways_are_different_ones(finished):
    made = {way: digests(finished(way) / "out")[MODEL] for way in WAYS}
    assert len(set(made.values())) == len(WAYS)


def test_more_rows_for_the_backward_pass_than_there_are(models, finished, tmp_path):
    """-cr is 6, the default of --hessian_rows more than that."""
    all_rows = digests(finished("default") / "out")[MODEL]
    for count, same in ((1000, True), (2, False)):
        base = tmp_path / str(count)
        run(*command(models, "default", base, **{"--hessian_rows": count}))
        assert (digests(base / "out")[MODEL] == all_rows) == same


def test_forgetting_removes_the_jobs_files_only(finished, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(finished("experts") / "work", work)
    mine = [work / name / "mine.txt" for name in ("", "layers", "experts", "gradients")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (work / "gradients" / "state.1.safetensors").write_bytes(b"of a job that was killed")
    forget_job(work)
    assert {path for path in work.rglob("*") if path.is_file()} == {*mine, work / "lock"}


# -- Correction ----------------------------------------------------------------------------------


def last_states(folder, rows):
    """What leaves the last block of a model, original or quant."""
    model, states = open_model(folder), None
    model.load_embedding()
    with parallel.one_thread_per_op():
        for i in range(model.num_blocks):
            model.load_block(i)
            states = run_block(model, i, rows, states)
            model.free_block(i)
    return states


@pytest.mark.parametrize("hessian", ["kron", pytest.param("input", marks=pytest.mark.slow)])
def test_correction_reduces_the_error_between_the_streams(tmp_path, capsys, hessian):
    """At 2 bits, on the rows it was fitted to and on others."""
    folder = tmp_path / "model"
    save_tiny("llama", folder, **{**SIZES, "num_hidden_layers": 2})
    save_tokenizer(folder)
    more = {"--hessian": hessian, "-hb": 16, "-cr": 24}
    job = partial(flags, folder, bits="2", **more)
    run(*job(out=tmp_path / "with", work=tmp_path / "work"))
    told = capsys.readouterr().out
    run(*job(out=tmp_path / "without", work=tmp_path / "work2"), "--no_correction")
    known = WorkDir(tmp_path / "work").load_rows()
    others = calibration_rows(load_tokenizer(folder), 48, 64, vocab_size=300)[24:]
    errors = {}
    for name, rows in (("known", known), ("others", others)):
        original = last_states(folder, rows)
        for quant in ("with", "without"):
            lost = last_states(tmp_path / quant, rows) - original
            errors[name, quant] = float(lost.norm() / original.norm())
    assert errors["known", "with"] < 0.9 * errors["known", "without"]
    assert errors["others", "with"] < errors["others", "without"]
    # What the job tells is the error of its first 16 rows, evenly spread, behind the last block.
    picked = known[torch.linspace(0, 23, 16).long()]
    original = last_states(folder, picked)
    lost = float((last_states(tmp_path / "with", picked) - original).norm() / original.norm())
    said = float(re.search(r"model.layers.1: relative error (\S+)", told)[1])
    assert abs(said - lost) < 1e-4  # printed to four decimals; other batches sum in another order
