"""The commands of README and docs work as they stand there, on a small model."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny, save_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Run by .ci/run and by hand; what they run is tested elsewhere.
ELSEWHERE = ("make ", "source ", "pip ")
SMALL = " -cr 4 -cc 32 -d cpu --check_rows 0"


def commands(page, language="sh"):
    for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith(("#", *ELSEWHERE)):
                yield line


def make_model(tmp_path):
    """The model that the pages talk of, small."""
    model = tmp_path / "models" / "Llama-3.2-1B"
    save_tiny("llama", model, hidden_size=128, intermediate_size=256, vocab_size=300)
    save_tokenizer(model)


def run_line(line, tmp_path, cwd):
    for place in ("/models/", "/tmp/work", "/tmp/logits"):
        line = line.replace(place, f"{tmp_path}/{place.removeprefix('/tmp/').strip('/')}/")
    line = re.sub(r"((?:eval|util)/\w+\.py)", rf"{ROOT}/\1", line.removeprefix("$ "))
    line = line.replace("python ", f"{sys.executable} ")
    done = subprocess.run(line, shell=True, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


@pytest.mark.slow
def test_the_readmes_commands_in_their_order(tmp_path):
    make_model(tmp_path)
    found = list(commands(ROOT / "README.md"))
    assert len(found) >= 4
    for line in found:
        small = SMALL if "convert.py" in line and " -r" not in line else ""
        if "measure.py" in line:
            small = " -cr 2 -cc 32 --hessian_rows 4"
        if "self_text.py" in line:
            small = " -r 8 -l 64"
        run_line(line + small, tmp_path, ROOT)


@pytest.mark.slow
def test_the_commands_of_comparing_with_the_specs_of_the_page(tmp_path, monkeypatch):
    monkeypatch.setenv("EXL3_CACHE", str(tmp_path / "cache"))
    make_model(tmp_path)
    page = ROOT / "docs" / "compare.md"
    (tmp_path / "text.txt").write_text("the quick brown fox and the lazy dog " * 60)
    specs = re.findall(r"```json\n(.*?)```", page.read_text(), re.S)
    small = {'"wiki2"': '"text.txt"', "2048": "48", "512": "48"}  # no hub, a short context
    for name, spec in zip(("spec_wiki2.json", "spec_models.json"), specs, strict=True):
        for old, new in small.items():
            spec = spec.replace(old, new)
        spec = spec.replace('"/tmp/', '"/').replace('"/', f'"{tmp_path}/')
        (tmp_path / name).write_text(spec)
    quant = "-o /models/Llama-3.2-1B-exl3-3.5bpw -w /tmp/work -b 3.5"
    run_line(f"python convert.py -i /models/Llama-3.2-1B {quant}{SMALL}", tmp_path, ROOT)
    found = list(commands(page, "console"))
    assert len(found) == 3
    for line in found:
        run_line(line + (" -l 48 -r 2" if "ppl.py" in line else ""), tmp_path, tmp_path)
    assert (tmp_path / "chart.png").stat().st_size > 10_000


def test_the_readmes_python():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names = {"weight": torch.randn(128, 256), "hessian": None}
    exec(code, names)
    assert names["W"].shape == (128, 256)


def quoted_flags(script):
    """The flags that a script's parser is given, one a line; what a docstring has is none."""
    return "\n".join(re.findall(r'"(--?[a-z_]+)"', script.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_and_flags_of_all_commands_exist(page):
    helps = {}
    for line in (*commands(page), *commands(page, "console")):
        words = shlex.split(line.removeprefix("$ "), comments=True)
        script = next((word for word in words if word.endswith(".py")), None)
        if script is None:
            continue
        if script not in helps and script.startswith("bench/"):
            helps[script] = quoted_flags(ROOT / script)  # starting it takes long
        elif script not in helps:
            helps[script] = subprocess.run(
                [sys.executable, ROOT / script, "--help"],
                capture_output=True,
                text=True,
                check=True,
                env={"PYTHONPATH": str(ROOT), "EXL3_NO_BUILD": "1"},
            ).stdout
        for word in words:
            if re.fullmatch(r"--?[a-z_]+", word):
                assert re.search(rf"(^|[\s,\"]){word}\b", helps[script]), f"{word} in: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target
