"""The CUDA kernels, compiled as host C++ and run thread by thread, against the reference.

Index arithmetic, layouts, shuffles, barriers and launchers are the ones that run on a GPU; the
tensor core is the kernels' own stand-in for chips without one. What a compiler for GPUs makes of
them is left to tests/test_cuda_compile.py, and the GPU itself to tests/test_cuda_ops.py.
"""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shared_files import shared

from exl3 import ops, reference
from exl3.format.codebook import CODEBOOKS

REPOSITORY = Path(__file__).resolve().parents[1]
HOST = REPOSITORY / "tests/cuda_host"
SOURCES = [*(REPOSITORY / f"csrc/cuda/{n}.cu" for n in ("decode", "hadamard", "linear"))]
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-w", f"-I{HOST}", f"-I{REPOSITORY / 'csrc'}"]
ALL_BITS = range(1, 9)
IDS = {name: number for number, name in enumerate(("3inst", "mcg", "mul1"))}

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("g++") is None,
    reason="needs g++ on Linux, for float16 and fibers",
)


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> ctypes.CDLL:
    """The launchers as a library."""
    folder = tmp_path_factory.mktemp("host")
    objects = []
    for source in (*SOURCES, HOST / "launchers.cpp"):
        objects.append(str(folder / f"{source.name}.o"))
        command = ["g++", "-x", "c++", *FLAGS, "-c", str(source), "-o", objects[-1]]
        subprocess.run(command, check=True)
    library = folder / "libhost.so"
    subprocess.run(["g++", "-shared", "-o", str(library), *objects], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.host_linear_workspace.restype = ctypes.c_uint64
    return loaded


@pytest.fixture(params=["in order", "reversed"])
def order(request, monkeypatch):
    """In what order the threads of a block come: a missing barrier would tell the two apart."""
    if request.param == "reversed":
        monkeypatch.setenv("EXL3_HOST_REVERSED", "1")


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    assert tensor is None or tensor.is_contiguous()
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def call(function, *arguments) -> int:
    """A launcher's error; numbers are 64 bits wide, which registers forgive for narrower ones."""
    return function(
        *(pointer(a) if a is None or isinstance(a, torch.Tensor) else ctypes.c_int64(a)
          for a in arguments)
    )  # fmt: skip


def random_layer(rows: int, columns: int, bits: int, seed: int = 0):
    """trellis, suh, svh of a (rows, columns) layer; any bits are a legal trellis."""
    generator = torch.Generator().manual_seed(seed + bits)
    shape = (rows // 16, columns // 16, 16 * bits)
    trellis = torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, generator=generator)
    suh, svh = (torch.randn(n, generator=generator).half() for n in (rows, columns))
    return trellis, suh, svh


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_decode_trellis(host, codebook, bits):
    """Bit for bit, also where blocks of 4 x 8 tiles are not full."""
    for rows, columns in ((128, 128), (80, 48), (16, 272)):
        trellis, _, _ = random_layer(rows, columns, bits)
        out = torch.full((rows, columns), torch.nan, dtype=torch.float16)
        sizes = trellis.shape[:2]
        assert call(host.host_decode_trellis, IDS[codebook], bits, trellis, *sizes, out) == 0
        expected = reference.decode_trellis(trellis, codebook, 1)
        assert torch.equal(bits_of(out), bits_of(expected)), (rows, columns)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_decode_trellis_against_golden(host, codebook):
    golden = load_file(shared("format/golden.safetensors"))
    for bits in ALL_BITS:
        trellis, inner = (golden[f"{codebook}.k{bits}.{leaf}"] for leaf in ("trellis", "inner"))
        out = torch.empty_like(inner)
        sizes = trellis.shape[:2]
        assert call(host.host_decode_trellis, IDS[codebook], bits, trellis, *sizes, out) == 0
        assert torch.equal(bits_of(out), bits_of(inner)), bits


def test_every_state_of_every_codebook(host):
    """At 8 bits two neighbours make a state: a trellis that has all 65,536."""
    high, low = torch.arange(256).repeat_interleave(256), torch.arange(256).repeat(256)
    string = torch.stack([high, low], 1).to(torch.uint8).reshape(-1, 256)  # tiles of 256 bytes
    words = string.reshape(512, 64, 4).flip(-1).contiguous()  # least significant byte first
    trellis = words.reshape(16, 32, 256).view(torch.int16)
    for codebook, number in IDS.items():
        out = torch.empty(256, 512, dtype=torch.float16)
        assert call(host.host_decode_trellis, number, 8, trellis, 16, 32, out) == 0
        expected = reference.decode_trellis(trellis, codebook, 1)
        assert torch.equal(bits_of(out), bits_of(expected))
        states = reference.unpack(trellis).unique()
        assert len(states) == 1 << 16


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_decode_weight(host, order, codebook):
    for bits, dtype in (
        (1, torch.float32),
        (3, torch.float16),
        (4, torch.float32),
        (8, torch.half),
    ):
        trellis, suh, svh = random_layer(256, 128, bits)
        out = torch.full((256, 128), torch.nan, dtype=dtype)
        half = int(dtype == torch.half)
        arguments = (IDS[codebook], bits, trellis, suh, svh, 16, 8, half, out)
        assert call(host.host_decode_weight, *arguments) == 0
        expected = reference.decode_weight(trellis, suh, svh, codebook, torch.float32, 1)
        assert relative(out, expected) < (3e-4 if half else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_hadamard_128(host, order, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 384, generator=generator).to(dtype)
    before, after = (torch.randn(384, generator=generator).half() for _ in range(2))
    for scales in ((None, None), (before, None), (None, after), (before, after)):
        out = torch.full_like(x, torch.nan)
        half = int(dtype == torch.float16)
        assert call(host.host_hadamard_128, x, half, *scales, 5, 384, out) == 0
        expected = reference.hadamard_128(x.double().float(), *scales, 1)
        assert relative(out, expected) < (3e-4 if half else 1e-6)
        again = x.clone()  # in place
        assert call(host.host_hadamard_128, again, half, *scales, 5, 384, again) == 0
        assert torch.equal(again, out)


def relative(x: torch.Tensor, expected: torch.Tensor) -> float:
    x, expected = x.double(), expected.double()
    return ((x - expected).norm() / expected.norm()).item()


def linear(host, x, trellis, suh, svh, codebook, bias=None) -> torch.Tensor:
    """A call of the launcher; the workspace holds garbage before, and nothing is written beyond."""
    rows, inputs, outputs = len(x), len(suh), len(svh)
    size = host.host_linear_workspace(*map(ctypes.c_int64, (rows, inputs, outputs)))
    workspace = torch.full((size + 64,), 0x7F, dtype=torch.uint8)
    y = torch.full((rows, outputs), torch.nan, dtype=torch.float16)
    bits = trellis.shape[2] // 16
    arguments = (IDS[codebook], bits, x, trellis, suh, svh, bias, rows, inputs, outputs)
    assert call(host.host_linear, *arguments, workspace, size, y) == 0
    assert (workspace[size:] == 0x7F).all()
    return y


def expected_linear(x, trellis, suh, svh, codebook, bias=None) -> torch.Tensor:
    """In float64, but for the one rounding of the transformed inputs."""
    rounded = reference.hadamard_128(x, suh, None, 1).double()
    y = rounded @ reference.decode_trellis(trellis, codebook, 1).double()
    y = reference.hadamard_rows(y) * svh.double()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("bits", ALL_BITS)
def test_linear(host, order, bits):
    codebook = list(CODEBOOKS)[bits % 3]
    for rows, inputs, outputs in ((1, 384, 128), (8, 128, 256), (11, 256, 128), (32, 128, 128)):
        layer = random_layer(inputs, outputs, bits, rows)
        generator = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, inputs, generator=generator).half()
        bias = torch.randn(outputs, generator=generator).half() if rows != 8 else None
        y = linear(host, x, *layer, codebook, bias)
        # The kernel's float32 sums may round a transformed input the other way than the reference.
        assert relative(y, expected_linear(x, *layer, codebook, bias)) < 5e-4, (rows, inputs)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_linear_of_unit_vectors(host, codebook):
    """Inputs whose transform has one number that is not zero pick a row of W_hat."""
    trellis, _, _ = random_layer(256, 128, 4)
    ones_in, ones_out = torch.ones(256).half(), torch.ones(128).half()
    inner = reference.decode_trellis(trellis, codebook, 1).float()
    for at in (0, 9, 127, 130, 255):
        # A column of the transform, times sqrt(128) so that it is +1 and -1.
        x = reference.hadamard_rows(torch.eye(256)[at : at + 1]).mul(128**0.5).round().half()
        y = linear(host, x, trellis, ones_in, ones_out, codebook)
        expected = reference.hadamard_rows(inner[at : at + 1]) * 128**0.5
        assert torch.allclose(y.float(), expected, rtol=1e-3, atol=1e-3)


def test_linear_with_many_slices(host, order):
    check_linear(host, 1, 7 * 128, 128)


@pytest.mark.slow
def test_linear_with_slices_of_many_chunks(host, order):
    """The last chunk is half as long. Only a wide layer has such slices."""
    check_linear(host, 9, 8 * 128, 65 * 128)


def check_linear(host, rows: int, inputs: int, outputs: int) -> None:
    layer = random_layer(inputs, outputs, 2)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1)).half()
    assert relative(linear(host, x, *layer, "mcg"), expected_linear(x, *layer, "mcg")) < 5e-4


def test_launchers_refuse_what_they_cannot_do(host):
    trellis, suh, svh = random_layer(128, 128, 4)
    x, y = torch.zeros(33, 128).half(), torch.zeros(33, 128).half()
    space = torch.zeros(1 << 16, dtype=torch.uint8)
    good = [2, 4, x, trellis, suh, svh, None, 1, 128, 128, space, len(space), y]
    assert call(host.host_linear, *good) == 0
    for place, bad in ((0, 3), (1, 9), (1, 0), (7, 33), (8, 64), (9, 192), (11, 100)):
        arguments = list(good)
        arguments[place] = bad
        assert call(host.host_linear, *arguments) != 0, (place, bad)
    assert call(host.host_decode_trellis, 0, 9, trellis, 8, 8, y) != 0
    assert call(host.host_decode_weight, 0, 4, trellis, suh, svh, 8, 9, 1, y) != 0


def test_fused_rows_are_those_of_the_launcher():
    text = (REPOSITORY / "csrc/cuda/linear.hpp").read_text()
    assert f"kLinearRows = {ops.FUSED_ROWS};" in text
