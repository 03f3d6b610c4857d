"""Compilers accept the CUDA sources, and nothing is spilled; no GPU is needed."""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "bench"))
import kernel_table  # noqa: E402

CSRC = REPOSITORY / "csrc"
SOURCES = kernel_table.sources()
DEFAULT = 90  # the one chip of the quick tests
needs_nvcc = pytest.mark.skipif(kernel_table.nvcc() is None, reason="there is no nvcc")


@functools.cache
def compiled(source: Path, *chips: int) -> list[kernel_table.Kernel]:
    return kernel_table.compile_kernels(source, chips)


def check(kernels: list[kernel_table.Kernel], chips: list[int]) -> None:
    assert {kernel.chip for kernel in kernels} == set(chips)
    for kernel in kernels:
        assert kernel.spills == 0, kernel
        assert kernel.stack == 0, kernel
        assert kernel.shared <= 48 << 10, kernel


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_without_warnings_or_spills(source):
    check(compiled(source, DEFAULT), [DEFAULT])


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_for_all_chips(source):
    chips = kernel_table.known_chips()
    assert DEFAULT in chips
    check(compiled(source, *chips), chips)


@needs_nvcc
def test_table_of_the_docs_has_all_kernels():
    found = {(k.name, k.bits or 0) for source in SOURCES for k in compiled(source, DEFAULT)}
    rows = re.findall(r"^\| `(\w+)` \| (\d*) \|", kernel_table.DOCS.read_text("utf-8"), re.M)
    assert {(name, int(bits or 0)) for name, bits in rows} == found


def test_table_is_written_between_its_marks(tmp_path, monkeypatch):
    docs = tmp_path / "kernels.md"
    docs.write_text(f"a\n{kernel_table.BEGIN}\nold\n{kernel_table.END}\nb\n")
    monkeypatch.setattr(kernel_table, "DOCS", docs)
    kernels = [kernel_table.Kernel("f", 3, chip, 40 + chip, 0, 0, 0) for chip in (80, 90, 90)]
    kernel_table.write(
        kernel_table.table([*kernels, kernel_table.Kernel("g", None, 80, 9, 0, 0, 4)])
    )
    lines = docs.read_text().splitlines()
    assert lines[:2] == ["a", kernel_table.BEGIN]
    assert lines[-2:] == [kernel_table.END, "b"]
    assert "| `f` | 3 | 120 | – | – | 130 | – | 0 |" in lines
    assert "| `g` |  | 9 | – | – | – | – | 4 |" in lines


def test_a_warning_or_a_spill_is_seen(tmp_path):
    if kernel_table.nvcc() is None:
        pytest.skip("there is no nvcc")
    bad = tmp_path / "bad.cu"
    bad.write_text("__global__ void bad_kernel(int* x) { int unused; }\n")
    with pytest.raises(RuntimeError, match="unused"):
        kernel_table.compile_kernels(bad, [DEFAULT])
    bad.write_text(
        "__global__ void bad_kernel(int* x, int n) {\n"
        "  int many[64];\n"
        "  for (int i = 0; i < 64; ++i) many[i] = i;\n"
        "  for (int i = 0; i < n; ++i) many[x[i] & 63] ^= x[i + 1];\n"  # so they are on the stack
        "  x[0] = many[n & 63];\n"
        "}\n"
    )
    (kernel,) = kernel_table.compile_kernels(bad, [DEFAULT])
    assert kernel.stack > 0


def test_no_torch_in_the_kernels():
    for path in [*CSRC.glob("cuda/*")]:
        assert not re.search(r"#include\s*<(torch|ATen|c10)/", path.read_text()), path


def test_binding_compiles(tmp_path):
    """The binding against this torch's headers, also where they are a CPU's torch's."""
    include = next(
        (p for p in map(Path, ("/usr/local/cuda/include", "/usr/include")) if
         (p / "cuda_runtime_api.h").is_file()), None,
    )  # fmt: skip
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if include is None or compiler is None:
        pytest.skip("needs CUDA's headers and a C++ compiler")
    headers = Path(torch.__file__).parent / "include"
    folders = (headers, headers / "torch/csrc/api/include", include)
    # The one header that only a CUDA torch has is generated, and may be left out.
    flags = [
        "-std=c++20",
        "-Wall",
        "-Werror",
        "-fsyntax-only",
        "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE",
    ]
    where = [f"-I{CSRC}", *(f"-isystem{folder}" for folder in folders)]
    command = [compiler, *flags, *where, str(CSRC / "bind_cuda.cpp")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
