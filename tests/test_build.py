"""Getting the C++ extension (installed, cached, built, or none) and the table of commands."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from exl3 import __version__, build
from exl3.commands import COMMANDS

REPOSITORY = Path(__file__).resolve().parents[1]
HAVE_COMPILER = shutil.which("c++") and shutil.which("ninja")

TRY_OPS = """
import torch
from exl3 import ops, reference
tiles = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
values, states = ops.encode_tiles(tiles, 8, "mcg")
assert (values - tiles).square().mean() < 1e-3
print(ops.HAVE_KERNELS)
"""


@pytest.fixture
def clone(tmp_path):
    """A clone that nothing is built in."""
    folder = tmp_path / "clone"
    for name in ("exl3", "csrc"):
        ignored = shutil.ignore_patterns("_C.*", "__pycache__")
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignored)
    return folder


def start(clone, *arguments, **environment):
    """Python in a clone, with a cache of its own."""
    environment = {"EXL3_CACHE": str(clone.parent / "cache")} | environment
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=clone,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(clone, *arguments, **environment):
    """The same to its end: exit code, stdout, stderr."""
    process = start(clone, *arguments, **environment)
    output, errors = process.communicate(timeout=600)
    return process.returncode, output, errors


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An empty package folder, cache and sources in place of the real ones."""
    for name in ("package", "csrc", "cache"):
        (tmp_path / name).mkdir()
    (tmp_path / "csrc" / "a.cpp").write_text("int a;\n")
    monkeypatch.setattr(build, "PACKAGE", tmp_path / "package")
    monkeypatch.setattr(build, "CSRC", tmp_path / "csrc")
    monkeypatch.setattr(build, "compiler", lambda: "c++ 1")
    monkeypatch.setenv("EXL3_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EXL3_NO_BUILD", raising=False)
    return tmp_path / "package"


def compiled_at_once(folder, gpu=False):
    library = folder / build.LIBRARY
    library.write_bytes(b"library")
    return library


def test_fingerprint_changes_with_sources_and_torch(package, monkeypatch):
    seen = {build.fingerprint(build.CSRC)}

    def is_new():
        size = len(seen)
        seen.add(build.fingerprint(build.CSRC))
        return len(seen) > size

    assert not is_new()
    (build.CSRC / ".a.cpp.swp").write_text("of an editor")
    assert not is_new()
    (build.CSRC / "a.cpp").write_text("int b;\n")
    assert is_new()
    (build.CSRC / "cpu").mkdir()
    (build.CSRC / "cpu" / "a.hpp").touch()
    assert is_new()
    (build.CSRC / "cpu" / "a.hpp").rename(build.CSRC / "cpu" / "b.hpp")
    assert is_new()
    monkeypatch.setattr(build.torch, "__version__", "9.9")
    assert is_new()
    monkeypatch.setattr(build, "FLAGS", ["-O1"])
    assert is_new()


def test_another_compiler_builds_anew(package, monkeypatch):
    monkeypatch.setattr(build, "_compile", compiled_at_once)
    assert build.cached() is None
    built = build.build()
    assert build.cached() == built
    monkeypatch.setattr(build, "compiler", lambda: "c++ 2")
    assert build.cached() is None


@pytest.fixture
def gpu_torch(package, monkeypatch):
    """Makes this torch one for CUDA that sees a chip; nvcc is here unless a test takes it away."""
    for name in ("is_available", "device_count", "get_device_capability"):
        answer = {"is_available": True, "device_count": 1, "get_device_capability": (8, 9)}[name]
        monkeypatch.setattr(build.torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(build.torch.version, "cuda", "12.8")
    monkeypatch.setattr(build, "need_gpu_compiler", lambda: None)
    monkeypatch.setattr(build, "_compile", compiled_at_once)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    (build.CSRC / "cuda").mkdir()
    (build.CSRC / "cuda" / "k.cu").write_text("int k;\n")
    (build.CSRC / "bind_cuda.cpp").write_text("int b;\n")
    loaded = []
    monkeypatch.setattr(build.torch.ops, "load_library", loaded.append)
    return loaded


def test_gpu_kernels_are_built_where_torch_has_a_gpu(gpu_torch, capsys):
    assert build.load_kernels() and build.load_kernels()
    assert gpu_torch == [str(build.cached(gpu=True))] * 2
    assert capsys.readouterr().err.count("C++ and GPU kernels, once") == 1
    assert build.cached() is None
    names = [path.name for path in build.sources(build.CSRC, gpu=True)]
    assert names == ["a.cpp", "bind_cuda.cpp", "k.cu"]


def test_gpu_sources_and_chips_are_part_of_that_build_alone(gpu_torch, monkeypatch):
    cpu = build._cache_name(False)
    seen = {build._cache_name(True)}
    (build.CSRC / "cuda" / "k.cu").write_text("int l;\n")
    seen.add(build._cache_name(True))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    seen.add(build._cache_name(True))
    assert len(seen) == 3
    assert build._cache_name(False) == cpu
    assert [path.name for path in build.sources(build.CSRC)] == ["a.cpp"]


@pytest.mark.parametrize("missing", ["nvcc", "success"])
def test_without_nvcc_the_cpu_kernels_serve(gpu_torch, monkeypatch, capsys, missing):
    def fails(*arguments):
        if missing == "nvcc" or (arguments and arguments[-1] is True):
            raise build.NoKernels("nvcc, which builds them, is missing")
        return compiled_at_once(*arguments)

    if missing == "nvcc":
        monkeypatch.setattr(build, "need_gpu_compiler", fails)
    else:
        monkeypatch.setattr(build, "_compile", fails)
    assert build.load_kernels()
    assert gpu_torch == [str(build.cached())]
    lines = capsys.readouterr().err.splitlines()
    assert sum("no kernels for the GPU" in line and "nvcc" in line for line in lines) == 1


def test_installed_extension_with_gpu_kernels_serves_without_nvcc(gpu_torch, monkeypatch, capsys):
    library = compiled_at_once(build.PACKAGE)
    (build.PACKAGE / build.FINGERPRINT).write_text(build.fingerprint(build.CSRC, gpu=True))
    monkeypatch.setattr(build, "need_gpu_compiler", None)
    assert build.load_kernels()
    monkeypatch.setattr(build.torch.cuda, "is_available", lambda: False)
    assert build.load_kernels()
    assert gpu_torch == [str(library)] * 2
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(os.name == "nt", reason="scripts are no programs on Windows")
def test_need_of_a_gpu_compiler_names_what_is_missing(tmp_path, monkeypatch):
    from torch.utils import cpp_extension

    monkeypatch.setattr(build.torch.version, "cuda", "12.8")
    monkeypatch.delenv("EXL3_NO_CUDA", raising=False)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    with pytest.raises(build.NoKernels, match=r"nvcc.*CUDA toolkit 12\.8.*CUDA_HOME"):
        build.need_gpu_compiler()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    with pytest.raises(build.NoKernels, match="not CUDA's headers"):
        build.need_gpu_compiler()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    build.need_gpu_compiler()
    monkeypatch.setenv("EXL3_NO_CUDA", "1")
    with pytest.raises(build.NoKernels, match="EXL3_NO_CUDA"):
        build.need_gpu_compiler()


def test_chips(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(build.torch.cuda, "device_count", lambda: 0)
    assert build.chips() == build.DEFAULT_CHIPS
    monkeypatch.setattr(build.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(build.torch.cuda, "get_device_capability", lambda i: (12 - 3 * i, 0))
    assert build.chips() == "9.0;12.0"


def test_compiler_is_known_by_place_and_version(tmp_path, monkeypatch):
    if os.name == "nt":
        pytest.skip("scripts are no programs on Windows")
    script = tmp_path / "mycc"
    texts = []
    for version in (1, 2):
        script.write_text(f"#!/bin/sh\necho mycc {version}\n")
        script.chmod(0o755)
        monkeypatch.setenv("CXX", f"{script} -m64")
        texts.append(build.compiler())
    assert texts[0] != texts[1]
    assert str(script) in texts[0] and "-m64" in texts[0]


def test_installed_extension_is_used_while_it_fits(package):
    assert build.installed() is None
    compiled_at_once(package)
    assert build.installed() is None  # who knows of what it was built
    (package / build.FINGERPRINT).write_text(build.fingerprint(build.CSRC))
    assert build.installed() == package / build.LIBRARY
    (build.CSRC / "a.cpp").write_text("int pulled;\n")
    assert build.installed() is None


def test_stale_installed_extension_is_told_and_replaced(package, monkeypatch, capsys):
    compiled_at_once(package)
    (package / build.FINGERPRINT).write_text("of older sources")
    monkeypatch.setattr(build, "_compile", compiled_at_once)
    loaded = []
    monkeypatch.setattr(build.torch.ops, "load_library", loaded.append)
    assert build.load_kernels()
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "other sources" in line and "about a minute" in line
    assert loaded == [str(build.cached())]


def test_finished_cache_is_used_without_building(package, monkeypatch, capsys):
    monkeypatch.setattr(build, "_compile", compiled_at_once)
    library = build.build()
    capsys.readouterr()
    monkeypatch.setattr(build, "_compile", None)
    monkeypatch.setenv("EXL3_NO_BUILD", "1")
    loaded = []
    monkeypatch.setattr(build.torch.ops, "load_library", loaded.append)
    assert build.load_kernels()
    assert loaded == [str(library)]
    assert capsys.readouterr().err == ""


def test_killed_build_leaves_nothing_that_looks_complete(package, monkeypatch):
    def killed(folder, gpu):
        compiled_at_once(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "_compile", killed)
    with pytest.raises(KeyboardInterrupt):
        build.build()
    assert build.cached() is None
    assert not any(Path(os.environ["EXL3_CACHE"]).iterdir())


def test_second_of_two_builds_takes_the_first_ones(package, monkeypatch):
    monkeypatch.setattr(build, "_compile", compiled_at_once)

    def overtaken(folder, gpu):
        first = build._writable_cache() / build._cache_name(gpu)
        first.write_bytes(b"first")
        return compiled_at_once(folder)

    monkeypatch.setattr(build, "_compile", overtaken)
    assert build.build().read_bytes() == b"first"


def test_sources_that_change_meanwhile_are_not_cached(package, monkeypatch):
    def edited(folder, gpu):
        (build.CSRC / "a.cpp").write_text("int edited;\n")
        return compiled_at_once(folder)

    monkeypatch.setattr(build, "_compile", edited)
    with pytest.raises(build.NoKernels, match="changed"):
        build.build()
    assert not any(Path(os.environ["EXL3_CACHE"]).iterdir())


def test_cache_that_cannot_be_written(package, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_compile", compiled_at_once)
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "file").touch()
    monkeypatch.setenv("EXL3_CACHE", str(tmp_path / "file"))
    library = build.build()
    assert library.parent.parent == tmp_path
    assert build.cached() == library


@pytest.mark.skipif(os.name == "nt", reason="Windows has no user ids")
def test_temporary_folder_of_someone_else_is_not_used(package, tmp_path, monkeypatch):
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    uid = os.getuid() + 1
    (tmp_path / f"exl3-{uid}").mkdir()
    monkeypatch.setattr(build.os, "getuid", lambda: uid)
    assert list(build._cache_folders()) == [Path(os.environ["EXL3_CACHE"])]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "/nonexistent"}, "no C++ compiler (/nonexistent)"),
        ({"PATH": "", "CXX": ""}, "no C++ compiler"),
        ({"EXL3_NO_BUILD": "1"}, "EXL3_NO_BUILD is set"),
    ],
)
def test_torch_stands_in_where_nothing_can_be_built(clone, environment, reason):
    code, output, errors = run(clone, "-c", TRY_OPS, **environment)
    assert (code, output) == (0, "False\n"), errors
    assert errors.startswith("Warning: ") and errors.count("\n") == 1
    assert reason in errors
    assert "hundred times slower" in errors


@pytest.mark.skipif(not HAVE_COMPILER, reason="needs a C++ compiler and ninja")
def test_failed_build_shows_the_compilers_last_lines_on_demand(clone):
    for path in (clone / "csrc").rglob("*.cpp"):
        path.unlink()
    (clone / "csrc" / "bad.cpp").write_text("#error this is bad\n")
    code, output, errors = run(clone, "-c", TRY_OPS)
    assert (code, output) == (0, "False\n"), errors
    assert errors.count("\n") == 2  # what it does, and that it failed
    assert "EXL3_VERBOSE=1 shows why" in errors
    _, _, errors = run(clone, "-c", TRY_OPS, EXL3_VERBOSE="1")
    assert "#error this is bad" in errors
    assert not any((clone.parent / "cache").iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not HAVE_COMPILER, reason="needs a C++ compiler and ninja")
def test_two_first_runs_at_once_build_and_the_third_does_not(clone):
    runs = [start(clone, "-c", TRY_OPS) for _ in range(2)]
    for process in runs:
        output, errors = process.communicate(timeout=900)
        assert (process.returncode, output) == (0, "True\n"), errors
        assert "Building" in errors and "there are none yet" in errors
    assert len(list((clone.parent / "cache").iterdir())) == 1
    code, output, errors = run(clone, "-c", TRY_OPS, EXL3_NO_BUILD="1")
    assert (code, output, errors) == (0, "True\n", "")


def test_commands_are_listed(clone):
    code, output, _ = run(clone, "-m", "exl3", "--help")
    assert code == 0
    assert output.startswith("usage: python -m exl3 COMMAND")
    for name, (_, about) in COMMANDS.items():
        assert f"  {name} " in output and about in output
    assert run(clone, "-m", "exl3", "--version") == (0, f"exl3 {__version__}\n", "")


@pytest.mark.parametrize("arguments", [["convrt", "-i", "x"], []])
def test_unknown_command_gets_the_list(clone, arguments):
    code, output, errors = run(clone, "-m", "exl3", *arguments)
    assert (code, output) == (2, "")
    assert errors.startswith("Error: ")
    assert all(about in errors for _, about in COMMANDS.values())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_comes_without_torch(clone, name):
    code = f"""
import sys
from exl3.commands import main
sys.argv[0] = "/usr/bin/exl3"
try:
    main([{name!r}, "--help"])
finally:
    assert not {{"torch", "transformers", "numpy"}} & set(sys.modules)
"""
    code, output, errors = run(clone, "-c", code)
    assert code == 0, errors
    assert output.startswith(f"usage: exl3 {name} ")


def test_scripts_are_the_same_commands():
    scripts = {
        "convert": "convert.py",
        "compare": "eval/compare_q.py",
        "compare-logits": "eval/compare_q_logits.py",
        "ppl": "eval/ppl.py",
    }
    scripts |= {
        name: f"util/{name.replace('-', '_')}.py" for name in COMMANDS if name not in scripts
    }
    for script in scripts.values():
        command = [sys.executable, str(REPOSITORY / script), "--help"]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"usage: {Path(script).name} ")


def test_bad_input_of_a_command_exits_with_2(clone):
    code, _, errors = run(clone, "-m", "exl3", "convert", "-w", "work", "-r")
    assert code == 2
    assert "there is no job" in errors
