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


@pytest.mark.slow
def test_the_readmes_commands_in_their_order(tmp_path):
    model = tmp_path / "models" / "Llama-3.2-1B"
    save_tiny("llama", model, hidden_size=128, intermediate_size=256, vocab_size=300)
    save_tokenizer(model)
    found = list(commands(ROOT / "README.md"))
    assert len(found) >= 4
    for line in found:
        line = line.replace("/models/", f"{tmp_path}/models/").replace(
            "/tmp/work", f"{tmp_path}/work"
        )
        if "convert.py" in line and " -r" not in line:
            line += SMALL
        done = subprocess.run(
            line.replace("python ", f"{sys.executable} "),
            shell=True,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


def test_the_readmes_python():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names = {"weight": torch.randn(128, 256), "hessian": None}
    exec(code, names)
    assert names["W"].shape == (128, 256)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_and_flags_of_all_commands_exist(page):
    helps = {}
    for line in (*commands(page), *commands(page, "console")):
        words = shlex.split(line.removeprefix("$ "), comments=True)
        script = next((word for word in words if word.endswith(".py")), None)
        if script is None:
            continue
        if script not in helps:
            helps[script] = subprocess.run(
                [sys.executable, ROOT / script, "--help"],
                capture_output=True,
                text=True,
                check=True,
                env={"PYTHONPATH": str(ROOT), "EXL3_NO_BUILD": "1"},
            ).stdout
        for word in words:
            if re.fullmatch(r"--?[a-z_]+", word):
                assert re.search(rf"(^|[\s,]){word}\b", helps[script]), f"{word} in: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target
