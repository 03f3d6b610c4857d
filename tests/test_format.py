"""The format against exact vectors: codebooks, packing, tile order, decoded weights."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from shared_files import shared

from exl3.errors import UserError
from exl3.format import decode_layer
from exl3.format.codebook import CODEBOOKS, codebook_table
from exl3.format.hadamard import hadamard_columns, hadamard_matrix, hadamard_rows
from exl3.format.layer import layer_codebook
from exl3.format.trellis import matrix_to_tiles, pack, tile_order, tiles_to_matrix, unpack
from exl3.ops import decode_trellis

GOLDEN = Path(__file__).parent / "data" / "golden.safetensors"
LAYERS = [(name, bits) for name in CODEBOOKS for bits in range(1, 9)]


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as file:
        sums = file.metadata()
    return load_file(GOLDEN), sums


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def layer_of(tensors, name, bits):
    layer = {leaf: tensors[f"{name}.k{bits}.{leaf}"] for leaf in ("trellis", "suh", "svh")}
    if CODEBOOKS[name].marker is not None:
        layer[name] = CODEBOOKS[name].marker
    return layer


@pytest.mark.parametrize("name", CODEBOOKS)
def test_codebook_tables_are_exact(golden, name):
    assert digest(codebook_table(name)) == golden[1][f"codebook.{name}"]


@pytest.mark.parametrize(("name", "bits"), LAYERS)
def test_golden_layers(golden, name, bits):
    tensors, sums = golden
    layer = layer_of(tensors, name, bits)
    states = unpack(layer["trellis"])
    assert torch.equal(states[0, 0], tensors[f"{name}.k{bits}.states0"])
    assert torch.equal(pack(states, bits), layer["trellis"])
    assert digest(decode_trellis(layer["trellis"], name)) == sums[f"{name}.k{bits}.inner"]
    row = tensors[f"{name}.k{bits}.row"]
    assert (decode_layer(layer)[bits] - row).norm() <= 1e-6 * row.norm()


@pytest.mark.parametrize(("name", "bits"), LAYERS)
def test_full_golden_layers(name, bits):
    tensors = load_file(shared("format/golden.safetensors"))
    layer = layer_of(tensors, name, bits)
    inner = decode_trellis(layer["trellis"], name)
    assert torch.equal(inner.view(torch.int16), tensors[f"{name}.k{bits}.inner"].view(torch.int16))
    weight = tensors[f"{name}.k{bits}.weight"]
    assert (decode_layer(layer) - weight).norm() <= 1e-6 * weight.norm()


def test_tile_order_follows_its_formula():
    order = tile_order()
    assert sorted(order.tolist()) == list(range(256))
    # t = 5, m = 6: row 2*1 + 8, column 1 + 8.
    assert order[8 * 5 + 6] == 10 * 16 + 9


def test_tiles_and_matrix_are_inverse():
    matrix = torch.arange(32 * 48).reshape(32, 48)
    tiles = matrix_to_tiles(matrix)
    assert tiles.shape == (2, 3, 256)
    assert torch.equal(tiles_to_matrix(tiles), matrix)
    assert tiles[1, 2, 8 * 5 + 6] == matrix[16 + 10, 32 + 9]


def test_hadamard_is_symmetric_and_orthogonal():
    h = hadamard_matrix(torch.float64)
    assert torch.equal(h, h.T)
    assert torch.allclose(h @ h, torch.eye(128, dtype=torch.float64))
    x = torch.randn(256, 384, dtype=torch.float64)
    assert torch.allclose(hadamard_rows(x)[:, 128:256], x[:, 128:256] @ h)
    assert torch.allclose(hadamard_columns(x)[:128], h @ x[:128])


def test_old_sign_fields_are_read(golden):
    layer = layer_of(golden[0], "3inst", 2)
    signs = torch.tensor([1.0, -1.0])[torch.randint(0, 2, (128,))]
    words = torch.zeros(8, dtype=torch.int32)
    for i in range(128):
        words[i // 16] |= int(signs[i] < 0) << (i % 16)
    old = torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)
    new = decode_layer({"trellis": layer["trellis"], "suh": signs.half(), "svh": layer["svh"]})
    assert torch.equal(
        decode_layer({"trellis": layer["trellis"], "su": old, "svh": layer["svh"]}), new
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trellis": None}, "needs a trellis"),
        ({"suh": None}, "needs suh"),
        ({"svh": torch.ones(64).half()}, "the trellis asks for 128"),
        ({"trellis": torch.zeros(8, 8, 20, dtype=torch.int16)}, "K = 1 to 8"),
        ({"trellis": torch.zeros(8, 8, 16)}, "must be int16"),
        ({"mcg": torch.tensor(5, dtype=torch.int32)}, "multiplier"),
    ],
)
def test_contradicting_tensors_are_told(golden, change, message):
    layer = {**layer_of(golden[0], "mcg", 2), **change}
    with pytest.raises(UserError, match=message):
        decode_layer({k: v for k, v in layer.items() if v is not None})


def test_codebook_markers(golden):
    for name in CODEBOOKS:
        assert layer_codebook(layer_of(golden[0], name, 2)) == name
