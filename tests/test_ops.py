"""The ops' CPU kernels against the torch reference, each other and the format's golden vectors."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from exl3 import ops, reference
from exl3.format.codebook import CODEBOOKS, codebook_table
from exl3.format.trellis import matrix_to_tiles, pack

pytestmark = pytest.mark.skipif(not ops.HAVE_KERNELS, reason="the C++ extension is not built")

GOLDEN = Path(__file__).parents[2] / "shared/format/golden.safetensors"
ALL_BITS = range(1, 9)
# Standard deviation of Gaussian weights, in units of the codebook, at which 1, 2, ... 8 bits
# encode them best.
SCALES = {
    "3inst": (1.41, 1.26, 1.13, 1.12, 1.12, 1.08, 1.03, 0.97),
    "mcg": (1.42, 1.25, 1.17, 1.17, 1.11, 1.09, 1.02, 0.97),
    "mul1": (1.13, 1.03, 0.91, 0.94, 0.93, 0.91, 0.88, 0.82),
}
ISAS = ("avx512", "avx2", "portable")


def gaussian(n: int, sigma: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 256, generator=torch.Generator().manual_seed(seed)) * sigma


def encode(
    tiles: torch.Tensor, bits: int, codebook: str, threads: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.exl3.encode_tiles(tiles, bits, codebook, threads)


def isas_here() -> list[str]:
    """The instruction sets that this machine can run."""
    here = []
    before = os.environ.get("EXL3_ISA")
    for isa in ISAS:
        os.environ["EXL3_ISA"] = isa
        try:
            encode(torch.zeros(0, 256), 4, "mcg")
            here.append(isa)
        except RuntimeError as error:
            assert "does not support" in str(error)
    os.environ.pop("EXL3_ISA")
    if before is not None:
        os.environ["EXL3_ISA"] = before
    return here


def assert_legal(values: torch.Tensor, states: torch.Tensor, bits: int, codebook: str) -> None:
    """States form circles, and the values are theirs."""
    assert values.dtype == torch.float32
    assert states.dtype == torch.int16
    assert values.shape == states.shape
    unsigned = states.to(torch.int32) & 0xFFFF
    shared = (1 << (16 - bits)) - 1
    assert torch.equal(unsigned >> bits, unsigned.roll(1, 1) & shared)
    assert torch.equal(values, codebook_table(codebook).float()[unsigned.long()])


def mse(values: torch.Tensor, tiles: torch.Tensor) -> float:
    return (values - tiles).double().square().mean().item()


# How much worse than the exact search so few tiles may come out. One tile differs from the exact
# two-pass search by a percent or two either way, more at few bits; `test_encode_tiles_quality`
# has the tiles to bound the mean.
FEW_TILES_MARGIN = 1.02


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_encode_tiles_against_reference(codebook: str, bits: int) -> None:
    # One group of the reference: two tiles at the scale of use, two at that of the codebook.
    tiles = torch.cat([gaussian(2, SCALES[codebook][bits - 1], bits), gaussian(2, 1.0, bits + 10)])
    values, states = encode(tiles, bits, codebook)
    assert_legal(values, states, bits, codebook)
    exact, _ = reference.encode_tiles(tiles, bits, codebook, 1)
    assert mse(values, tiles) < FEW_TILES_MARGIN * mse(exact, tiles)


@pytest.mark.slow
@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_encode_tiles_quality(codebook: str, bits: int) -> None:
    for sigma in (SCALES[codebook][bits - 1], 1.0):
        tiles = gaussian(48, sigma, bits)
        values, _ = encode(tiles, bits, codebook, 2)
        exact, _ = reference.encode_tiles(tiles, bits, codebook, 1)
        assert mse(values, tiles) < 1.005 * mse(exact, tiles)


def test_scalar_search_is_the_reference() -> None:
    """The benchmark's baseline makes the same choices, rounding apart."""
    tiles = gaussian(2, 1.0)
    states = torch.ops.exl3_bench.encode_tiles_scalar(tiles, 3, "mcg")
    values = codebook_table("mcg").float()[(states.to(torch.int32) & 0xFFFF).long()]
    assert_legal(values, states, 3, "mcg")
    exact, _ = reference.encode_tiles(tiles, 3, "mcg", 1)
    assert mse(values, tiles) == pytest.approx(mse(exact, tiles), rel=1e-3)


def extreme_tiles() -> torch.Tensor:
    ramp = torch.linspace(-1, 1, 256)[None]
    spikes = gaussian(1, 1.0)
    spikes[0, ::17] = 1e4
    spikes[0, 5::31] = -30.0
    alternating = torch.tensor([1.0, -1.0]).repeat(128)[None]
    return torch.cat(
        [
            torch.zeros(1, 256),
            torch.full((1, 256), -0.0),
            torch.full((1, 256), 3.0),
            torch.full((1, 256), -100.0),
            torch.full((1, 256), torch.finfo(torch.float32).max),
            gaussian(1, 1e-6),
            gaussian(1, 1e-42),
            gaussian(1, 5.0),
            gaussian(1, 1e4),
            gaussian(1, 1.0) ** 5,
            ramp * 1e3,
            ramp,
            alternating * 4,
            alternating * 1e6,
            spikes,
        ]
    )


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_encode_tiles_extreme_inputs(codebook: str, bits: int) -> None:
    tiles = extreme_tiles()
    values, states = encode(tiles, bits, codebook)
    assert_legal(values, states, bits, codebook)
    # Where a value is beyond the codebook the nearest is its end: never far from what is possible.
    nearest = tiles.clamp(*codebook_table(codebook).float().aminmax())
    assert mse(values[5:7], tiles[5:7]) < 0.5
    assert (values - nearest).abs().max() < 8


@pytest.mark.parametrize("bits", (1, 4, 8))
def test_encode_tiles_outliers(bits: int) -> None:
    """Values a little beyond the codebook's greatest cost what they must and no more."""
    tiles = gaussian(4, SCALES["mul1"][bits - 1])
    tiles[:2, 30], tiles[1:3, 200], tiles[3, 77] = 3.6, -3.8, 4.3
    values, _ = encode(tiles, bits, "mul1")
    exact, _ = reference.encode_tiles(tiles, bits, "mul1", 1)
    assert mse(values, tiles) < 1.03 * mse(exact, tiles)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_encode_tiles_empty_and_single(bits: int) -> None:
    values, states = encode(torch.empty(0, 256), bits, "mul1", 4)
    assert values.shape == states.shape == (0, 256)
    assert_legal(*encode(gaussian(1, 1.0), bits, "mul1", 4), bits, "mul1")


@pytest.mark.parametrize("bits", ALL_BITS)
def test_encode_tiles_same_for_any_threads_and_batch(bits: int) -> None:
    tiles = torch.cat([gaussian(21, 1.1, bits), extreme_tiles()])
    values, states = encode(tiles, bits, "mcg", 1)
    for threads in (2, 3, 7, 64):
        again = encode(tiles, bits, "mcg", threads)
        assert torch.equal(again[0], values)
        assert torch.equal(again[1], states)
    # Nor does a tile's result depend on its neighbours.
    for i in range(0, len(tiles), 5):
        assert torch.equal(encode(tiles[i : i + 1], bits, "mcg")[1][0], states[i])
    assert torch.equal(encode(tiles[3:], bits, "mcg")[1], states[3:])


@pytest.mark.parametrize("isa", ISAS)
def test_encode_tiles_same_for_any_isa(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if isa not in isas_here():
        pytest.skip(f"this machine has no {isa}")
    for bits in ALL_BITS:
        # Also the extreme ones: saturated costs and ties must come out alike.
        tiles = torch.cat([gaussian(3, 1.2, bits), extreme_tiles()[::5]])
        for codebook in ("3inst", "mul1") if bits in (2, 4, 8) else ("mcg",):
            monkeypatch.delenv("EXL3_ISA", raising=False)
            _, states = encode(tiles, bits, codebook)
            monkeypatch.setenv("EXL3_ISA", isa)
            assert torch.equal(encode(tiles, bits, codebook)[1], states), (bits, codebook)


def test_unknown_isa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXL3_ISA", "mmx")
    with pytest.raises(RuntimeError, match="EXL3_ISA=mmx"):
        encode(torch.zeros(1, 256), 4, "mcg")


def test_encode_tiles_accepts_views() -> None:
    tiles = gaussian(8, 1.0)
    view = tiles.t().contiguous().t()
    assert not view.is_contiguous()
    assert torch.equal(encode(view, 4, "mul1")[1], encode(tiles, 4, "mul1")[1])


def test_encode_tiles_from_many_threads_without_the_interpreter_lock() -> None:
    tiles = gaussian(16, 1.0)
    _, expected = encode(tiles, 3, "mcg")
    results: list[torch.Tensor] = []

    def work() -> None:
        for _ in range(4):
            results.append(encode(tiles, 3, "mcg", 3)[1])

    workers = [threading.Thread(target=work) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 24
    assert all(torch.equal(states, expected) for states in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_encode_tiles_after_fork() -> None:
    # In a process of its own: forking the test process itself is nobody's business.
    code = """if True:
        import os, torch
        from exl3 import ops
        tiles = torch.randn(16, 256)
        _, expected = torch.ops.exl3.encode_tiles(tiles, 4, "mcg", 3)
        child = os.fork()
        _, states = torch.ops.exl3.encode_tiles(tiles, 4, "mcg", 3)
        assert torch.equal(states, expected)
        if child == 0:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


BAD_TILES = {
    "shape": (torch.zeros(1, 255), 4, "mcg", 1),
    "dimensions": (torch.zeros(256), 4, "mcg", 1),
    "dtype": (torch.zeros(1, 256, dtype=torch.float64), 4, "mcg", 1),
    "no bits": (torch.zeros(1, 256), 0, "mcg", 1),
    "many bits": (torch.zeros(1, 256), 9, "mcg", 1),
    "codebook": (torch.zeros(1, 256), 4, "mcg2", 1),
    "threads": (torch.zeros(1, 256), 4, "mcg", 0),
}


@pytest.mark.parametrize("what", BAD_TILES)
def test_encode_tiles_bad_arguments(what: str) -> None:
    with pytest.raises(RuntimeError):
        torch.ops.exl3.encode_tiles(*BAD_TILES[what])


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_decode_trellis_against_reference(codebook: str, bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    shape = (5, 3, 16 * bits)
    trellis = torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, generator=generator)
    expected = reference.decode_trellis(trellis, codebook, 1)
    for threads in (1, 4):
        matrix = torch.ops.exl3.decode_trellis(trellis, codebook, threads)
        assert matrix.dtype == torch.float16
        assert torch.equal(matrix.view(torch.int16), expected.view(torch.int16))


@pytest.mark.skipif(not GOLDEN.exists(), reason="the shared golden file is not here")
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_decode_trellis_against_golden(codebook: str) -> None:
    golden = load_file(GOLDEN)
    for bits in ALL_BITS:
        key = f"{codebook}.k{bits}"
        matrix = torch.ops.exl3.decode_trellis(golden[f"{key}.trellis"], codebook, 2)
        assert torch.equal(matrix.view(torch.int16), golden[f"{key}.inner"].view(torch.int16)), bits


def test_decode_trellis_inverts_encode_tiles() -> None:
    values, states = encode(gaussian(6, 1.0), 5, "mul1")
    packed = pack(states, 5).reshape(2, 3, 80)
    tiles = matrix_to_tiles(torch.ops.exl3.decode_trellis(packed, "mul1", 1))
    assert torch.equal(tiles.float().reshape(6, 256), values)


def test_decode_trellis_empty() -> None:
    trellis = torch.empty(0, 4, 64, dtype=torch.int16)
    assert torch.ops.exl3.decode_trellis(trellis, "mcg", 2).shape == (0, 64)


@pytest.mark.parametrize(
    ("trellis", "codebook"),
    [
        (torch.zeros(1, 1, 24, dtype=torch.int16), "mcg"),
        (torch.zeros(1, 1, 144, dtype=torch.int16), "mcg"),
        (torch.zeros(1, 16, dtype=torch.int16), "mcg"),
        (torch.zeros(1, 1, 16, dtype=torch.int32), "mcg"),
        (torch.zeros(1, 1, 16, dtype=torch.int16), ""),
    ],
)
def test_decode_trellis_bad_arguments(trellis: torch.Tensor, codebook: str) -> None:
    with pytest.raises(RuntimeError):
        torch.ops.exl3.decode_trellis(trellis, codebook, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_hadamard_128_against_reference(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 37, 384, generator=generator).to(dtype)
    before, after = (torch.randn(384, generator=generator).half() for _ in range(2))
    for scales in ((None, None), (before, None), (None, after), (before, after)):
        results = [torch.ops.exl3.hadamard_128(x, *scales, threads) for threads in (1, 3)]
        assert torch.equal(*results)
        assert results[0].dtype == dtype
        expected = reference.hadamard_128(x.float(), *scales, 1)
        error = (results[0].float() - expected).norm() / expected.norm()
        assert error < (1e-6 if dtype == torch.float32 else 3e-4)


def test_hadamard_128_twice_is_nothing_done() -> None:
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    once = ops.hadamard_128(x)
    assert (once - x).norm() > x.norm()
    assert torch.allclose(ops.hadamard_128(once), x, atol=1e-5)
    assert ops.hadamard_128(x.t().contiguous().t()).equal(once)
    assert ops.hadamard_128(torch.empty(0, 128)).shape == (0, 128)
    assert ops.hadamard_128(torch.empty(3, 0)).shape == (3, 0)


@pytest.mark.parametrize(
    ("x", "before"),
    [
        (torch.zeros(2, 100), None),
        (torch.zeros(2, 128, dtype=torch.float64), None),
        (torch.zeros(()), None),
        (torch.zeros(2, 128), torch.ones(64).half()),
    ],
)
def test_hadamard_128_bad_arguments(x: torch.Tensor, before: torch.Tensor | None) -> None:
    with pytest.raises(RuntimeError):
        torch.ops.exl3.hadamard_128(x, before, None, 1)
    with pytest.raises(ValueError, match=r"shape|float32|scales"):
        ops.hadamard_128(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_decode_weight_is_the_product_of_its_parts(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    trellis = torch.randint(
        -(1 << 15), 1 << 15, (16, 8, 48), dtype=torch.int16, generator=generator
    )
    suh, svh = (torch.randn(n, generator=generator).half() for n in (256, 128))
    weight = ops.decode_weight(trellis, suh, svh, "mcg", dtype)
    assert weight.dtype == dtype
    h = reference.hadamard_rows(torch.eye(128, dtype=torch.float64))
    inner = ops.decode_trellis(trellis, "mcg").double()
    left = torch.block_diag(h, h) * suh.double()[:, None]
    expected = left @ inner @ (h * svh.double())
    error = (weight.double() - expected).norm() / expected.norm()
    assert error < (1e-6 if dtype == torch.float32 else 3e-4)
