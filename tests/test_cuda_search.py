"""The CUDA trellis search, compiled as host C++ and run thread by thread, against the CPU's.

Kernels and launcher are those that run on a GPU: layouts in shared memory, barriers, kept costs,
the way back, open seams, rounds. float16 arithmetic is exact, so a GPU gives the same states.
"""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from exl3 import ops
from exl3.format.codebook import CODEBOOKS, codebook_table

REPOSITORY = Path(__file__).resolve().parents[1]
HOST = REPOSITORY / "tests/cuda_host"
NAMES = ("3inst", "mcg", "mul1")  # by number
SCALE = (1.14, 1.02, 0.93, 0.94, 0.91, 0.88, 0.85, 0.80)  # best, in the codebook's deviations
ALL_BITS = range(1, 9)
OPEN = ((1, 5), (2, 4))  # bits, seed: of tiles whose seam the free search leaves open
# Multiprocessors and bytes of shared memory of one: both tiles of a test in a block, or each alone.
TOGETHER, APART = (1, 227 << 10), (2, 99 << 10)

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("g++") is None,
    reason="needs g++ on Linux, for float16 and fibers",
)


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> ctypes.CDLL:
    """The search as a library."""
    library = tmp_path_factory.mktemp("host") / "search.so"
    includes = [f"-I{HOST}", f"-I{REPOSITORY / 'csrc'}"]
    flags = ["-std=c++17", "-O2", "-march=native", "-fno-strict-aliasing", "-fPIC", "-w"]
    command = ["g++", *flags, *includes, "-shared", "-o", str(library), str(HOST / "encode.cpp")]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.host_encode_workspace.restype = ctypes.c_uint64
    loaded.host_largest.restype = ctypes.c_float
    return loaded


def search(host, tiles, bits, codebook, chip=TOGETHER, workspace=None):
    """The launcher's error, values, states as unsigned numbers, and how many seams were open."""
    count = len(tiles)
    values, states = torch.full((count, 256), torch.nan), torch.empty(count, 256, dtype=torch.int16)
    opened = ctypes.c_int(0)
    if workspace is None:
        workspace = host.host_encode_workspace(ctypes.c_int64(count), bits)
    error = host.host_encode(
        NAMES.index(codebook),
        bits,
        ctypes.c_void_p(tiles.data_ptr()),
        ctypes.c_int64(count),
        ctypes.c_uint64(workspace),
        *chip,
        ctypes.c_void_p(states.data_ptr()),
        ctypes.c_void_p(values.data_ptr()),
        ctypes.byref(opened),
    )
    return error, values, states.to(torch.int64) & 0xFFFF, opened.value


def gaussian(count: int, bits: int, codebook: str, seed: int = 0) -> torch.Tensor:
    sigma = SCALE[bits - 1] * codebook_table(codebook).float().std()
    return torch.randn(count, 256, generator=torch.Generator().manual_seed(seed)) * sigma


def structured() -> torch.Tensor:
    """A wave, with outliers beyond every codebook and a stretch of zeros."""
    tile = 2.5 * torch.sin(torch.arange(256) / 9.0)[None]
    tile[0, ::50] = 9.0
    tile[0, 100:140] = 0.0
    return tile


def assert_circles(states: torch.Tensor, values: torch.Tensor, bits: int, codebook: str) -> None:
    """Every state begins with the bits that the one before it ends with, all round."""
    shared = states.roll(1, 1) & ((1 << 16 - bits) - 1)
    assert torch.equal(states >> bits, shared)
    assert torch.equal(values, codebook_table(codebook).float()[states])


def errors(values: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    return (values - tiles).double().square().sum(1)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_as_good_as_the_cpu_whatever_the_chip(host, bits, monkeypatch):
    codebook = NAMES[bits % 3]
    tiles = torch.cat([gaussian(1, bits, codebook, seed=bits), structured()])
    error, values, states, _ = search(host, tiles, bits, codebook)
    assert error == 0
    assert_circles(states, values, bits, codebook)
    of_cpu, _ = ops.encode_tiles(tiles, bits, codebook)
    assert (errors(values, tiles) <= 1.003 * errors(of_cpu, tiles)).all()

    # Threads in another order (a missing barrier would show), and a round for each tile.
    monkeypatch.setenv("EXL3_HOST_REVERSED", "1")
    single = host.host_encode_workspace(ctypes.c_int64(1), bits)
    _, values_again, states_again, _ = search(host, tiles, bits, codebook, APART, single)
    assert torch.equal(states_again, states)
    assert torch.equal(values_again, values)


@pytest.mark.parametrize(("bits", "seed"), OPEN)
def test_open_seams_are_closed(host, bits, seed):
    tiles = gaussian(1, bits, "mcg", seed)
    _, values, states, opened = search(host, tiles, bits, "mcg")
    assert opened == 1
    assert_circles(states, values, bits, "mcg")
    of_cpu, _ = ops.encode_tiles(tiles, bits, "mcg")
    assert errors(values, tiles) <= 1.1 * errors(of_cpu, tiles)


def test_absurd_tiles_give_circles(host):
    tiles = torch.stack([torch.full((256,), 1e30), torch.full((256,), -1e30), torch.zeros(256)])
    tiles[2, ::2] = -1e30
    tiles[2, 1::2] = 1e30
    _, values, states, _ = search(host, tiles, 5, "mcg")
    assert_circles(states, values, 5, "mcg")


def test_workspace_is_bounded_and_checked(host):
    for bits in ALL_BITS:
        size = host.host_encode_workspace
        assert size(ctypes.c_int64(1), bits) < size(ctypes.c_int64(100), bits)
        assert size(ctypes.c_int64(1 << 20), bits) < 1.01 * (1 << 30)
    tiles = gaussian(1, 4, "mcg")
    assert search(host, tiles, 4, "mcg", workspace=4096)[0] != 0
    assert search(host, tiles, 9, "mcg", workspace=1 << 20)[0] != 0
    assert search(host, tiles[:0], 4, "mcg")[0] == 0


def test_largest_values(host):
    for number, name in enumerate(NAMES):
        assert host.host_largest(number) == codebook_table(name).float().abs().max()
    assert set(NAMES) == set(CODEBOOKS)


@pytest.mark.slow
@pytest.mark.parametrize("codebook", NAMES)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_mean_error_is_the_cpus(host, bits, codebook):
    tiles = gaussian(32, bits, codebook, seed=100 + bits)
    _, values, states, _ = search(host, tiles, bits, codebook)
    assert_circles(states, values, bits, codebook)
    of_cpu, _ = ops.encode_tiles(tiles, bits, codebook)
    # The paths that are found differ by a little; what is left of that in the mean of few tiles.
    assert errors(values, tiles).mean() <= 1.002 * errors(of_cpu, tiles).mean()
