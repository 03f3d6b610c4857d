#!/usr/bin/env python3
"""Builds, tests and measures exl3 on this machine's GPU: one command, a table, a JSON.

Wants a Python with a CUDA torch; what else is missing is installed into a folder of its own, as far
as there is a network. Each part is a process with a time limit, and what fails hides nothing of the
rest. Exit codes: 0 all is well, 1 something failed, 2 there is no GPU to check.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / "build" / "gpu-check"  # a venv over the Python that has torch
BENCHES = ROOT / "bench" / "gpu"
LIMIT = 470  # seconds for everything
# Seconds of each part, at most; what one leaves is there for the others.
LIMITS = {
    "packages": 90,
    "build": 240,
    "tests": 120,
    "encode": 60,
    "decode": 40,
    "linear": 40,
    "convert": 90,
}
BENCHED = ("encode", "decode", "linear", "convert")
# Of the tests about CUDA, those that compile or emulate: they need no GPU, and minutes.
WITHOUT_GPU = {"test_cuda_compile.py", "test_cuda_host.py", "test_cuda_search.py"}
IMPORTED = {"pyyaml": "yaml"}  # packages whose module has another name
TAIL, WIDTH = 12, 200  # lines of what a failed part said, letters of one
FATAL, MODULES = "Fatal Python error", "Extension modules:"  # of Python's own report of a crash
FOUND = "GPU-CHECK "  # before what a process found, as JSON

Part = dict[str, Any]  # name, ok, seconds, and "error" or what was found


class Failed(Exception):
    """Why a part failed, in a sentence or in what a process said."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the report (docs/gpu)")
    parser.add_argument("--device", type=int, default=0, help="number of the GPU (0)")
    parser.add_argument("--only", nargs="+", choices=LIMITS, help="some parts")
    parser.add_argument("--bench", choices=BENCHED, help=argparse.SUPPRESS)  # in its own process
    args = parser.parse_args(argv)
    if args.bench:
        return bench(args.bench, args.device)
    if reason := no_gpu(args.device):
        print(f"gpu-check: {reason}.", file=sys.stderr)
        return 2
    return check(args.device, args.out or ROOT / "docs" / "gpu", args.only or list(LIMITS))


def no_gpu(device: int) -> str | None:
    """Why there is nothing to check here, None if there is a GPU."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no torch; name a Python with a CUDA torch in PYTHON="
    import torch

    if not (torch.version.cuda or torch.version.hip):
        return f"torch {torch.__version__} of {sys.executable} is built without CUDA"
    if torch.cuda.device_count() <= device:
        return f"there is no GPU {device} here that torch {torch.__version__} can use"
    return None


def check(device: int, out: Path, wanted: Sequence[str]) -> int:
    """All parts; their report; 1 if any failed."""
    began, python = time.monotonic(), sys.executable
    machine = describe(device)
    print(f"{machine['chip']}, {machine['torch']}, {machine['python']}", flush=True)
    parts: list[Part] = []

    def left(name: str) -> float:
        return max(1.0, min(LIMITS[name], LIMIT - (time.monotonic() - began)))

    def do(name: str, work: Callable[[float], Any]) -> Any:
        if name not in wanted:
            return None
        print(f"{name} ...", flush=True)
        parts.append(run_part(name, work, left(name)))
        print(f"  {summary(parts[-1])}", flush=True)
        return parts[-1].get("found")

    if packages := do("packages", prepare):
        python = packages["python"]
    do("build", lambda limit: build(python, device, limit))
    do("tests", lambda limit: run_tests(python, device, limit))
    for name in BENCHED:
        do(name, lambda limit, name=name: run_bench(python, name, device, limit))
    report = {**machine, "seconds": round(time.monotonic() - began), "parts": parts}
    text = markdown(report)
    print(f"\n{text}")
    for path in write_report(out, report, text):
        print(f"Wrote {path}")
    failed = [part["name"] for part in parts if not part["ok"]]
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return 1 if failed else 0


def describe(device: int) -> dict[str, str]:
    """The machine, as the report begins with it."""
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    try:
        commit = run(["git", "rev-parse", "--short", "HEAD"], 10)
    except (Failed, OSError, subprocess.TimeoutExpired):
        commit = ""  # no git, or no repository
    return {
        "chip": f"{torch.cuda.get_device_name(device)} (sm_{major}{minor}, {memory:.0f} GiB)",
        "date": date.today().isoformat(),
        "torch": f"torch {torch.__version__}, CUDA {torch.version.cuda or torch.version.hip}",
        "python": f"Python {platform.python_version()}",
        "exl3": f"{(ROOT / 'exl3' / 'VERSION').read_text().strip()} {commit.strip()}".strip(),
    }


# -- Parts -----------------------------------------------------------------------------------------


def run_part(name: str, work: Callable[[float], Any], limit: float) -> Part:
    """What a part found, or why it failed."""
    began = time.monotonic()
    try:
        part: Part = {"name": name, "ok": True, "found": work(limit)}
    except (Failed, OSError) as error:
        part = {"name": name, "ok": False, "error": str(error)}
    except subprocess.TimeoutExpired:
        part = {"name": name, "ok": False, "error": f"not done within {limit:.0f} s"}
    return part | {"seconds": round(time.monotonic() - began, 1)}


def prepare(limit: float) -> dict[str, str]:
    """A Python with this one's torch and what exl3 needs besides; this one if it has all that.

    What cannot be installed shows in the parts that want it.
    """
    if not lacking(sys.executable):
        return {"python": sys.executable, "note": "everything is there"}
    began, python = time.monotonic(), make_environment(limit)
    if python is None:
        note = f"missing: {', '.join(map(named, lacking(sys.executable)))} (and no venv)"
        return {"python": sys.executable, "note": note}
    if asked := lacking(python):
        pip = [python, "-m", "pip", "install", "--quiet", "--retries", "1", *asked]
        run(pip, max(1.0, limit - (time.monotonic() - began)), check=False)
    missing = lacking(python)
    note = f"missing: {', '.join(map(named, missing))}" if missing else f"in {ENVIRONMENT}"
    return {"python": python, "note": note}


def make_environment(limit: float) -> str | None:
    """A venv in which this Python's packages are to be seen; None where none can be made."""
    python = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin") / "python"
    if python.exists():
        return str(python)
    try:
        run([sys.executable, "-m", "venv", str(ENVIRONMENT)], limit)
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        folder = Path(run([str(python), "-c", where], limit).splitlines()[-1])
    except (Failed, OSError):
        return None
    # Not --system-site-packages: this Python may be one of a venv itself.
    seen = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    (folder / "outer.pth").write_text("\n".join(seen) + "\n")
    return str(python)


def lacking(python: str) -> list[str]:
    """Of what exl3 and its tests need, what a Python has not. Torch is there, and stays."""
    lines = [*(ROOT / "requirements.txt").read_text().split(), "pytest"]
    modules = {IMPORTED.get(named(x), named(x)): x for x in lines if named(x) != "torch"}
    code = (
        "import importlib.util, json\n"
        f"missing = [m for m in {list(modules)} if importlib.util.find_spec(m) is None]\n"
        f"print({FOUND!r} + json.dumps(missing))\n"
    )
    return [modules[m] for m in found_by([python, "-c", code], None, LIMITS["packages"])[0]]


def named(requirement: str) -> str:
    return re.split(r"[<>=!~;\[]", requirement)[0].lower()


def build(python: str, device: int, limit: float) -> dict[str, Any]:
    """Builds the extension for the chip, and finds its kernels."""
    code = (
        "import json, torch\n"
        "from exl3 import ops\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "names = [s.partition('(')[0] for s in ops.SCHEMAS]\n"
        f"print({FOUND!r} + json.dumps({{n: has('exl3::' + n, 'CUDA') for n in names}}))\n"
    )
    kernels, said = found_by([python, "-c", code], device, limit, {"EXL3_VERBOSE": "1"})
    if without := [name for name, there in kernels.items() if not there]:
        raise Failed(f"{tail(said)}\nbuilt without CUDA kernels for {', '.join(without)}")
    return {"kernels": sorted(kernels)}


def run_tests(python: str, device: int, limit: float) -> dict[str, int]:
    """The tests that want a GPU. None may skip all of them: there is one."""
    files = sorted(ROOT.glob("tests/test_cuda_*.py"))
    files = [str(path) for path in files if path.name not in WITHOUT_GPU]
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "junit.xml"
        marks = ["-m", "slow or not slow"]
        command = [python, "-m", "pytest", "-q", *marks, f"--junitxml={results}", *files]
        said = run(command, limit, device=device, check=False)
        if not results.is_file():
            raise Failed(tail(said))
        suite = ElementTree.parse(results).getroot().find("testsuite")
    counts = {kind: int(suite.get(kind, 0)) for kind in ("tests", "failures", "errors", "skipped")}
    if counts["failures"] or counts["errors"] or counts["skipped"] == counts["tests"]:
        raise Failed(f"{counts}\n{tail(said)}")
    return counts


def run_bench(python: str, name: str, device: int, limit: float) -> list[dict[str, Any]]:
    command = [python, str(Path(__file__).resolve()), "--bench", name, "--device", str(device)]
    return found_by(command, device, limit)[0]


def bench(name: str, device: int) -> int:
    """One benchmark, in a process of its own: prints its rows as JSON."""
    import torch

    path = BENCHES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # The process sees one GPU alone.
    rows = module.measure(torch.device("cuda", 0) if torch.cuda.is_available() else "cpu")
    print(FOUND + json.dumps(rows))
    return 0


# -- Processes -------------------------------------------------------------------------------------


def run(
    command: Sequence[str],
    limit: float,
    device: int | None = None,
    more: dict[str, str] | None = None,
    check: bool = True,
) -> str:
    """What a process says. Failed, with the end of that, if it fails and `check` is set."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths} | (more or {})
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible(device)
    # In a group of its own, which is ended as a whole: builders start compilers.
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        end(process)
        raise
    if check and process.returncode:
        raise Failed(tail(said))
    return said


def end(process: subprocess.Popen) -> None:
    """Kills a process that is out of time, with all that it has started."""
    if os.name == "nt":
        process.kill()
    else:
        os.killpg(process.pid, 9)
    process.communicate()


def visible(device: int) -> str:
    """The GPU's name for processes: numbers count within what is visible already."""
    named = [n for n in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if n]
    return named[device] if device < len(named) else str(device)


def found_by(
    command: Sequence[str], device: int | None, limit: float, more: dict[str, str] | None = None
) -> tuple[Any, str]:
    """The JSON that a process of ours prints in a line of its own, and all that it says."""
    said = run(command, limit, device, more)
    lines = [line for line in said.splitlines() if line.startswith(FOUND)]
    if not lines:
        raise Failed(tail(said))
    return json.loads(lines[-1].removeprefix(FOUND)), said


def tail(said: str) -> str:
    """The end of what a process said, or where a crash began and the way there."""
    lines = [line[:WIDTH] for line in said.strip().splitlines() if not line.startswith(MODULES)]
    crash = next((i for i, line in enumerate(lines) if FATAL in line), None)
    shown = lines[-TAIL:] if crash is None else lines[crash : crash + TAIL]
    return "\n".join(shown) or "it said nothing"


# -- The report ------------------------------------------------------------------------------------


def summary(part: Part) -> str:
    if not part["ok"]:
        lines = part["error"].splitlines()
        why = next((line for line in lines if FATAL in line), lines[-1])
        return f"FAILED after {part['seconds']} s: {why}"
    found = part["found"]
    told = f"{len(found)} rows" if isinstance(found, list) else ", ".join(map(pair, found.items()))
    return f"ok, {part['seconds']} s: {told}"


def pair(item: tuple[str, Any]) -> str:
    name, value = item
    return f"{name} {', '.join(value) if isinstance(value, list) else value}"


def markdown(report: dict[str, Any]) -> str:
    """The report as a page: the parts, then a table for every benchmark."""
    lines = [f"# {report['chip']}, {report['date']}", ""]
    lines += [f"{report['torch']}, {report['python']}, exl3 {report['exl3']}. "]
    lines[-1] += f"`make gpu-check` took {report['seconds']} s."
    lines += ["", *table([{"part": p["name"], "": summary(p)} for p in report["parts"]])]
    for part in report["parts"]:
        if not part["ok"]:
            lines += ["", f"## {part['name']}: failed", "", "```", part["error"], "```"]
        elif isinstance(part["found"], list):
            lines += ["", f"## {part['name']}", "", *table(part["found"])]
    return "\n".join(lines) + "\n"


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A Markdown table of rows that may have different columns."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return lines + [f"| {' | '.join(shown(row.get(name)) for name in columns)} |" for row in rows]


def shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/")


def write_report(out: Path, report: dict[str, Any], text: str) -> list[Path]:
    """JSON and Markdown, named by chip and date; what is there already keeps its name."""
    out.mkdir(parents=True, exist_ok=True)
    chip = re.sub(r"[^a-z0-9]+", "-", report["chip"].partition(" (")[0].lower()).strip("-")
    stem, n = f"{chip}-{report['date']}", 1
    while (out / f"{stem}.json").exists():
        n += 1
        stem = f"{chip}-{report['date']}-{n}"
    paths = [out / f"{stem}.json", out / f"{stem}.md"]
    for path, content in zip(paths, (json.dumps(report, indent=1) + "\n", text), strict=True):
        path.write_text(content)
    return paths


if __name__ == "__main__":
    sys.exit(main())
