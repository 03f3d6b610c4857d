"""`make gpu-check`: what it says without a GPU, and that what fails hides nothing of the rest."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
MACHINE = {
    "chip": "NVIDIA H200 (sm_90, 141 GiB)",
    "date": "2026-01-02",
    "torch": "torch 2.9.1+cu128, CUDA 12.8",
    "python": "Python 3.12.3",
    "exl3": "0.1 abc",
}


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checker(monkeypatch):
    module = load(ROOT / "bench" / "gpu_check.py")
    monkeypatch.setattr(module, "describe", lambda device: MACHINE)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_sentence():
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "gpu_check.py"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("gpu-check: ")
    assert done.stderr.count("\n") == 1


def test_what_fails_hides_nothing_of_the_rest(checker, monkeypatch, tmp_path, capsys):
    def fail(*_):
        raise checker.Failed("a long story\nthe kernel is missing")

    rows = [{"K": 2, "weights/s": 123456789.0}, {"K": 3, "of the floor": 0.51234}]
    monkeypatch.setattr(checker, "prepare", lambda limit: {"python": "python", "note": "there"})
    monkeypatch.setattr(checker, "build", fail)
    monkeypatch.setattr(checker, "run_tests", lambda *_: {"tests": 9, "skipped": 1})
    monkeypatch.setattr(
        checker, "run_bench", lambda python, name, *_: fail() if name == "decode" else rows
    )
    monkeypatch.setattr(checker, "no_gpu", lambda device: None)
    assert checker.main(["--out", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert told.splitlines()[-1] == "FAILED: build, decode"
    report = json.loads((tmp_path / "nvidia-h200-2026-01-02.json").read_text())
    assert [part["name"] for part in report["parts"]] == list(checker.LIMITS)
    assert [part["name"] for part in report["parts"] if not part["ok"]] == ["build", "decode"]
    assert report["parts"][-1]["found"] == rows
    page = (tmp_path / "nvidia-h200-2026-01-02.md").read_text()
    assert "| 2 | 123,456,789 |  |" in page
    assert "| 3 |  | 0.5123 |" in page
    assert "the kernel is missing" in page
    assert checker.main(["--out", str(tmp_path), "--only", "tests"]) == 0
    assert (tmp_path / "nvidia-h200-2026-01-02-2.md").exists()  # the first stays


def test_a_part_that_hangs_is_ended_with_all_it_started(checker, tmp_path):
    left = tmp_path / "left"
    child = f"import time, pathlib; time.sleep(6); pathlib.Path({str(left)!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    part = checker.run_part("x", lambda limit: checker.run([sys.executable, "-c", parent], 2), 2)
    assert not part["ok"]
    assert part["error"] == "not done within 2 s"
    assert part["seconds"] < 6
    assert not left.exists()


def test_what_a_process_finds_and_says(checker):
    code = f"print('warming up'); print({checker.FOUND!r} + '[1, 2]'); print('bye')"
    assert checker.found_by([sys.executable, "-c", code], 0, 60)[0] == [1, 2]
    with pytest.raises(checker.Failed, match="no such thing"):
        checker.run([sys.executable, "-c", "raise SystemExit('no such thing')"], 60)


def test_a_crash_is_shown_from_where_it_began(checker):
    """Python's own report of it: the frames, the last call first, and all modules at the end."""
    code = "import faulthandler, numpy, os\nfaulthandler.enable()\nos.abort()"
    frames = "\n".join(f"def f{i}(): f{i + 1}()" for i in range(30))
    code = f"{frames}\ndef f30():\n  {code.replace(chr(10), chr(10) + '  ')}\nf0()"
    part = checker.run_part(
        "tests", lambda limit: checker.run([sys.executable, "-c", code], limit), 60
    )
    assert part["error"].startswith("Fatal Python error: Aborted")
    assert "in f30" in part["error"]
    assert "Extension modules" not in part["error"]
    assert checker.summary(part).endswith("Fatal Python error: Aborted")


def test_tests_that_all_skip_are_no_success(checker, tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    test = "import pytest\ndef test_a(): pytest.skip('no GPU')\n"
    (tmp_path / "tests" / "test_cuda_x.py").write_text(test)
    monkeypatch.setattr(checker, "ROOT", tmp_path)
    with pytest.raises(checker.Failed, match="'skipped': 1"):
        checker.run_tests(sys.executable, 0, 120)
    (tmp_path / "tests" / "test_cuda_y.py").write_text("def test_b(): pass\n")
    assert checker.run_tests(sys.executable, 0, 120)["tests"] == 2


def test_only_what_is_missing_would_be_installed(checker, monkeypatch):
    assert checker.lacking(sys.executable) == []
    monkeypatch.setattr(checker, "IMPORTED", {"pyyaml": "there_is_no_such_module"})
    assert [checker.named(line) for line in checker.lacking(sys.executable)] == ["pyyaml"]
    assert checker.named("transformers>=5.10,<6") == "transformers"


@pytest.mark.slow
def test_an_environment_sees_the_packages_of_this_python(checker, monkeypatch, tmp_path):
    monkeypatch.setattr(checker, "ENVIRONMENT", tmp_path / "environment")
    python = checker.make_environment(120)
    if python is None:
        pytest.skip("this Python makes no venv")
    assert checker.lacking(python) == []
    assert checker.make_environment(1) == python  # it is made once


@pytest.mark.slow
def test_the_conversion_that_is_measured_runs():
    bench = load(ROOT / "bench" / "gpu" / "convert.py")
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    rows = bench.measure(torch.device("cpu"), 2, 32, vocab_size=1024, **sizes, **heads)
    assert len(rows) == 2
    assert all(row["weights/s"] > 0 and row["last relative error"] < 1 for row in rows)
