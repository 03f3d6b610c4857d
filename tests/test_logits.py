"""Logits streamed with bounded memory, written so that no kill changes a byte, and read again."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import HIDDEN, save_tiny, save_tokenizer, tiny_rows
from transformers import AutoModelForCausalLM

from exl3 import parallel
from exl3.commands.compare_q_logits import main
from exl3.errors import UserError
from exl3.evaluate import logits_writer, stream
from exl3.evaluate.dataspec import load_dataspec
from exl3.evaluate.logits_file import ReferenceLogits
from exl3.evaluate.logits_writer import Planned
from exl3.evaluate.stream import stream_logits, stream_work
from exl3.model.quantized import open_model
from exl3.model.streamed import StreamedModel

SCRIPT = Path(__file__).resolve().parents[1] / "eval" / "compare_q_logits.py"
LENGTH, VOCAB = 24, 300


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EXL3_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny("qwen2", folder, vocab_size=VOCAB, tied=True)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def spec(tiny):
    path = tiny.parent / "spec.json"
    text = "the quick brown fox and the lazy dog, again and again. " * 100
    (tiny.parent / "text.txt").write_text(text)
    content = {"tokenize_fn": "transformers", "tokenizer_dir": "tiny", "dataset": "text.txt"}
    path.write_text(json.dumps({**content, "eval_stride": 5, "eval_len": LENGTH, "max_rows": 6}))
    return path


def flags(model, spec, out, *more):
    return [str(x) for x in ("-m", model, "-d", spec, "-o", out, "-dev", "cpu", *more)]


@pytest.fixture(scope="module")
def finished(tiny, spec):
    """A file of a run that nothing interrupted."""
    out = tiny.parent / "finished.safetensors"
    main(flags(tiny, spec, out))
    return out


def plain_logits(folder, rows):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(rows).logits


def streamed(model, rows, **how):
    pairs = list(stream_logits(model, rows, **how))
    assert [i for i, _ in pairs] == list(range(len(rows)))
    return torch.cat([logits for _, logits in pairs])


# --- streaming


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_logits_are_those_of_transformers(tmp_path, kind, tied):
    save_tiny(kind, tmp_path, tied=tied)
    rows = tiny_rows(3, 50)
    torch.testing.assert_close(
        streamed(open_model(tmp_path), rows), plain_logits(tmp_path, rows), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("how", "passes"),
    [
        ({}, 1),
        ({"states_bytes": 2 * LENGTH * HIDDEN * 4}, 3),
        ({"states_bytes": 3 * LENGTH * HIDDEN * 4 - 1}, 3),
        ({"states_bytes": 0}, 5),
        ({"rows_per_batch": 3}, 2),
        ({"rows_per_batch": 3, "states_bytes": 0}, 5),
    ],
)
def test_chunks_bound_the_states_and_change_no_bit(tiny, monkeypatch, how, passes):
    rows = tiny_rows(5, LENGTH)
    expected = streamed(open_model(tiny), rows)
    loaded = []
    load = StreamedModel.load_block
    monkeypatch.setattr(StreamedModel, "load_block", lambda m, i: loaded.append(i) or load(m, i))
    assert torch.equal(streamed(open_model(tiny), rows, **how), expected)
    assert loaded == [0, 1, 2] * passes


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_bit(tiny, monkeypatch, threads):
    rows = tiny_rows(3, LENGTH)
    monkeypatch.setattr(stream, "TAIL_TOKENS", 10)
    expected = streamed(open_model(tiny), rows)
    monkeypatch.setattr(parallel, "_THREADS", threads)
    assert torch.equal(streamed(open_model(tiny), rows), expected)


def loaded_bytes(model):
    return sum(t.nbytes for t in model._model.parameters() if not t.is_meta)


def test_a_consumer_that_stops_early_leaves_nothing_behind(tiny):
    model = open_model(tiny)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        pairs = stream_logits(model, tiny_rows(4, LENGTH))
        next(pairs)
        assert torch.get_num_threads() == 2  # while it stands still, too
        assert loaded_bytes(model) > 0
        pairs.close()
        assert loaded_bytes(model) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_one_block_and_the_states_of_one_chunk_are_in_memory(tiny, monkeypatch):
    model = open_model(tiny)
    rows = tiny_rows(6, LENGTH)
    most, alive = 0, weakref.WeakSet()
    run = StreamedModel.run_block

    def watching(self, i, ids, state):
        nonlocal most
        assert [part for part in self._loaded if isinstance(part, int)] == [i]
        out = run(self, i, ids, state)
        alive.add(out)
        most = max(most, len(alive))
        return out

    monkeypatch.setattr(StreamedModel, "run_block", watching)
    monkeypatch.setattr(parallel, "_THREADS", 1)
    streamed(model, rows, rows_per_batch=2)
    assert most == 3  # two rows, and the one that is being made
    assert loaded_bytes(model) == 0


def test_progress_ends_at_what_was_foretold(tiny):
    class Counting:
        done = 0

        def advance(self, amount):
            self.done += amount

        def doing(self, step):
            pass

    model, rows, progress = open_model(tiny), tiny_rows(5, LENGTH), Counting()
    streamed(model, rows, rows_per_batch=2, progress=progress)
    assert progress.done == stream_work(model, rows)


# --- the file


def test_float32_file_has_the_models_own_logits(tiny, spec, tmp_path):
    out = tmp_path / "new" / "a.safetensors"
    main(flags(tiny, spec, out, "--dtype", "float32", "-r", "3"))
    rows = load_dataspec(spec).rows()[:3]
    with safe_open(out, "pt") as file:
        assert sorted(file.keys()) == ["tensor.0", "tensor.1", "tensor.2"]
        assert file.metadata()["model"] == open_model(tiny).checkpoint.fingerprint()
        stored = [file.get_tensor(f"tensor.{i}") for i in range(3)]
    assert all(t.shape == (1, LENGTH, VOCAB) and t.dtype == torch.float32 for t in stored)
    torch.testing.assert_close(torch.cat(stored), plain_logits(tiny, rows), atol=1e-5, rtol=1e-5)
    assert [path.name for path in out.parent.iterdir()] == ["a.safetensors"]


def test_float16_is_the_default(tiny, spec, finished, tmp_path):
    exact = tmp_path / "exact.safetensors"
    main(flags(tiny, spec, exact, "--dtype", "float32"))
    half, full = ReferenceLogits(finished), ReferenceLogits(exact)
    assert len(half) == len(full) == 6
    assert all(torch.equal(half.row(i), full.row(i).half().float()) for i in range(6))


def test_what_half_precision_cannot_hold_is_clamped_and_said(tiny, spec, tmp_path, capsys):
    model = tmp_path / "large"
    save_tiny("cohere", model, vocab_size=VOCAB, logit_scale=1e5)
    save_tokenizer(model)
    main(flags(model, spec, tmp_path / "a.safetensors", "-r", "1"))
    assert "Row 0 has logits beyond what float16 can hold" in capsys.readouterr().out
    row = ReferenceLogits(tmp_path / "a.safetensors").row(0)
    assert row.isfinite().all()
    assert row.abs().max() == 65504


def test_a_model_that_gives_nan_is_refused(tiny, spec, tmp_path):
    model = tmp_path / "broken"
    save_tiny("llama", model, vocab_size=VOCAB, rms_norm_eps=float("nan"))
    with pytest.raises(UserError, match="row 0 are not numbers"):
        main(flags(model, spec, tmp_path / "a.safetensors"))


class Killed(BaseException):
    """Stands for the moment a process dies."""


def dying(function, countdown, moment):
    """The function, which dies before or after its call number `countdown`."""

    def call(*arguments):
        nonlocal countdown
        countdown -= 1
        if countdown < 0 and moment == "before":
            raise Killed
        function(*arguments)
        if countdown < 0:
            raise Killed

    return call


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_death_at_any_write_changes_no_byte(
    tiny, spec, finished, tmp_path, monkeypatch, moment, name
):
    """Each run dies a row further; always the same file, until one gets through."""
    out, deaths = tmp_path / "a.safetensors", 0
    load_dataspec(spec).rows()
    while not out.exists():
        with monkeypatch.context() as patch:
            own = getattr(os, name)
            patch.setattr(logits_writer.os, name, dying(own, deaths % 2, moment))
            try:
                main(flags(tiny, spec, out))
            except Killed:
                deaths += 1
        assert deaths < 12
    assert deaths >= (3 if name == "fsync" else 1)
    assert out.read_bytes() == finished.read_bytes()


def test_any_beginning_of_the_file_is_gone_on_with(tiny, spec, finished, tmp_path, capsys):
    whole = finished.read_bytes()
    row = LENGTH * VOCAB * 2
    start = len(whole) - 6 * row
    partial = tmp_path / "a.safetensors.partial"
    lengths = [0, 5, start - 1, start, start + 1, start + 2 * row - 1, start + 2 * row, len(whole)]
    for length in lengths:
        partial.write_bytes(whole[:length])
        main(flags(tiny, spec, tmp_path / "a.safetensors"))
        done = max(0, length - start) // row
        assert (f"  {done} rows are there already" in capsys.readouterr().out) == (done > 0)
        assert (tmp_path / "a.safetensors").read_bytes() == whole
        assert not partial.exists()
        (tmp_path / "a.safetensors").unlink()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is not a signal of Windows")
def test_sigkill_at_random_moments(tiny, spec, tmp_path):
    """A file of many rows, so that there is time to be killed while it is written."""
    many = spec.with_name("many.json")
    many.write_text(json.dumps({**json.loads(spec.read_text()), "eval_stride": 1, "max_rows": 0}))
    more = ("-r", 240, "-rpb", 60)
    main(flags(tiny, many, tmp_path / "whole.safetensors", *more))
    whole = (tmp_path / "whole.safetensors").read_bytes()
    out, chance, kills = tmp_path / "a.safetensors", random.Random(1), 0
    partial = out.with_name(out.name + ".partial")
    command = [sys.executable, str(SCRIPT), *flags(tiny, many, out, *more)]
    for _ in range(2):
        mark = chance.uniform(0, 0.9) * len(whole)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while process.poll() is None and not (partial.exists() and partial.stat().st_size > mark):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL and not out.exists()
        process.stdout.close()
    main(flags(tiny, many, out, *more))
    assert kills
    assert hashlib.sha256(out.read_bytes()).digest() == hashlib.sha256(whole).digest()


def test_a_complete_file_is_left_alone(tiny, spec, finished, capsys):
    before = finished.stat().st_mtime_ns
    main(flags(tiny, spec, finished))
    assert "is complete already" in capsys.readouterr().out
    assert finished.stat().st_mtime_ns == before


def test_files_of_other_jobs_are_refused(tiny, spec, finished, tmp_path):
    def refused(message, out, *more, model=tiny):
        before = {path: path.read_bytes() for path in out.parent.glob(f"{out.name}*")}
        with pytest.raises(UserError, match=message):
            main(flags(model, spec, out, *more))
        assert before == {path: path.read_bytes() for path in out.parent.glob(f"{out.name}*")}

    other = tmp_path / "other"
    save_tiny("qwen2", other, vocab_size=VOCAB, tied=True, seed=1)
    refused("is there already, with another rows; delete it", finished, "-r", "3")
    refused("with another dtype", finished, "--dtype", "float32")
    refused("with another model;", finished, model=other)
    out = tmp_path / "a.safetensors"
    out.with_name("a.safetensors.partial").write_bytes(finished.read_bytes()[:-5])
    refused("beginning of a file with another rows", out, "-r", "3")
    refused("beginning of a file with another model", out, model=other)
    save_file({"tensor": torch.zeros(1)}, tmp_path / "foreign")
    refused("with another model and another rows", tmp_path / "foreign")
    (tmp_path / "thesis").write_text("mine")
    refused("with another model", tmp_path / "thesis")


def test_two_processes_cannot_write_one_file(tiny, spec, tmp_path):
    rows, out = load_dataspec(spec).rows(), tmp_path / "a.safetensors"
    planned = Planned.of("model", rows, VOCAB)
    with (
        logits_writer.logits_writer(out, planned),
        pytest.raises(UserError, match="another process is writing"),
        logits_writer.logits_writer(out, planned),
    ):
        pass


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("-r", "-1"), "-r -1: give a number"),
        (("-rpb", "0"), "-rpb 0: give at least 1"),
        (("-dev", "x"), "-dev x: give device numbers"),
        (("-o", "."), "-o .: this is a folder"),
        (("-d", "nowhere.json"), "nowhere.json: there is no such file"),
        (("-m", "nowhere"), "nowhere has no config.json"),
    ],
)
def test_bad_flags(tiny, spec, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        main([*flags(tiny, spec, tmp_path / "a.safetensors"), *more])


def test_a_full_disk_is_seen_before_the_work(tiny, spec, tmp_path, monkeypatch):
    from exl3.jobs import reference_logits

    full = SimpleNamespace(free=1000)
    monkeypatch.setattr(reference_logits.shutil, "disk_usage", lambda _: full)
    with pytest.raises(UserError, match=r"take 0.00 GiB more, .* fewer rows with -r"):
        main(flags(tiny, spec, tmp_path / "a.safetensors"))
    assert not list(tmp_path.iterdir())


def test_rows_beyond_the_models_context_are_refused(tiny, spec, tmp_path):
    short = tmp_path / "short"
    save_tiny("qwen2", short, vocab_size=VOCAB, max_position_embeddings=LENGTH - 1)
    with pytest.raises(UserError, match=r"spec.json: eval_len: rows of 24"):
        main(flags(short, spec, tmp_path / "a.safetensors"))
    small = tmp_path / "small"
    save_tiny("qwen2", small, vocab_size=100)
    with pytest.raises(UserError, match=r"spec.json: tokenizer_dir: the tokenizer gives token 283"):
        main(flags(small, spec, tmp_path / "a.safetensors"))


# --- reading


def test_rows_of_a_prefix_are_accepted_and_others_refused(spec, finished):
    reference, rows = ReferenceLogits(finished), load_dataspec(spec).rows()
    assert reference.check(rows, VOCAB) == []
    assert reference.check(rows[:4], VOCAB) == []
    (line,) = reference.check(torch.cat([rows, rows]), VOCAB)
    assert "has 6 of the 12 rows" in line
    changed = rows.clone()
    changed[5, 7] += 1
    assert reference.check(changed[:5], VOCAB) == []
    for other in (changed, rows.flip(0), rows[:, :-1]):
        with pytest.raises(UserError, match="logits for other rows"):
            reference.check(other, VOCAB)
    with pytest.raises(UserError, match="vocabulary of 300, but the model has 301"):
        reference.check(rows, VOCAB + 1)


@pytest.mark.parametrize("style", ["numbered", "single", "single row", "folder"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_files_as_users_have_them(tmp_path, style, dtype):
    logits = torch.randn(1 if style == "single row" else 12, 5, 7).to(dtype)
    path = tmp_path / "a"
    if style == "folder":
        path.mkdir()
        for i, row in enumerate(logits):
            save_file({"tensor": row[None].clone()}, path / f"row_{i:06d}.safetensors")
    elif style == "numbered":
        save_file({f"tensor.{i}": row[None].clone() for i, row in enumerate(logits)}, path)
    else:
        save_file({"tensor": logits}, path)
    reference = ReferenceLogits(path)
    assert (len(reference), reference.length, reference.vocab) == logits.shape
    assert torch.equal(torch.cat([reference.row(i) for i in range(len(logits))]), logits.float())
    (warning,) = reference.check(torch.zeros(len(logits), 5, dtype=torch.int64), 7)
    assert warning.startswith("Warning:")
    with pytest.raises(UserError, match="other rows"):
        reference.check(torch.zeros(len(logits), 6, dtype=torch.int64), 7)


def test_rows_after_a_gap_are_not_taken_for_others(tmp_path):
    names = ("tensor.0", "tensor.1", "tensor.3", "a", "b")
    save_file({name: torch.zeros(1, 2, 3) for name in names}, tmp_path / "a")
    assert len(ReferenceLogits(tmp_path / "a")) == 2


def test_the_fingerprint_is_of_the_content(finished, tmp_path):
    whole = finished.read_bytes()
    copy, changed = tmp_path / "copy", tmp_path / "changed"
    copy.write_bytes(whole)
    changed.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    prints = [ReferenceLogits(path).fingerprint() for path in (finished, copy, changed)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(1, 2, 3)}, "no reference logits in it"),
        ({"tensor.1": torch.zeros(1, 2, 3)}, "no reference logits in it"),
        ({"tensor": torch.zeros(2, 3)}, "tensor is F32"),
        ({"tensor.0": torch.zeros(1, 2, 3, dtype=torch.int32)}, "tensor.0 is I32"),
        ({"tensor.0": torch.zeros(1, 2, 3), "tensor.1": torch.zeros(1, 2, 4)}, "different shapes"),
    ],
)
def test_files_without_logits(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "a")
    with pytest.raises(UserError, match=message):
        ReferenceLogits(tmp_path / "a")


def test_files_that_are_missing_or_damaged(tmp_path, finished):
    with pytest.raises(UserError, match="there is no such file"):
        ReferenceLogits(tmp_path / "a")
    (tmp_path / "a").write_bytes(finished.read_bytes()[:-1])
    with pytest.raises(UserError, match="cannot be read"):
        ReferenceLogits(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no reference logits in it"):
        ReferenceLogits(tmp_path / "empty")
