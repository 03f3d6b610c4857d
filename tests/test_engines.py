"""Engines agree on the same model; storage is what the files hold; messages say what to do."""

import json
import math
import shutil
import struct
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from jobs_helpers import flags, run
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, save_tokenizer, tiny_rows
from transformers import AutoModelForCausalLM

from exl3.errors import UserError
from exl3.evaluate.compare import compare
from exl3.evaluate.engines import OTHERS, open_engine
from exl3.evaluate.gguf_header import gguf_tensors
from exl3.evaluate.metrics import row_metrics, summarize
from exl3.evaluate.storage import measure_storage
from exl3.format import decode_layer

SIZES = {"hidden_size": 128, "intermediate_size": 192, "vocab_size": 300, "num_hidden_layers": 2}
ROWS = tiny_rows(3, 40)
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Originals and their quants: tied with biases, and one with fused linears."""
    base = tmp_path_factory.mktemp("models")
    for kind, tied, bits in (("qwen2", True, 8), ("qwen2", True, 3), ("phi3", False, 3)):
        model = base / kind
        if not model.exists():
            save_tiny(kind, model, tied=tied, **SIZES)
            save_tokenizer(model)
        run(*flags(model, base / f"{kind}-{bits}", base / f"work-{kind}-{bits}", str(bits)))
    return base


def logits_of(load_fn, model):
    with open_engine(load_fn, model, "a label") as engine:
        found = dict(engine.logits(ROWS, range(len(ROWS))))
        assert all(logits.shape == (1, ROWS.shape[1], engine.vocab) for logits in found.values())
        return torch.cat([found[i] for i in range(len(ROWS))])


def summary(logits, reference):
    rows = [slice(i, i + 1) for i in range(len(ROWS))]
    return summarize([row_metrics(logits[r], ROWS[r], reference[r]) for r in rows])


def dequantized(original, quant):
    """The stock model with decoded weights, put in by hand."""
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    stored = load_file(quant / "model.safetensors")
    for key in [key for key in stored if key.endswith(".trellis")]:
        name = key.removesuffix(".trellis")
        leaves = {k.removeprefix(f"{name}."): t for k, t in stored.items() if k.startswith(name)}
        linear = model.get_submodule(name)
        out, into = linear.weight.shape
        linear.weight = torch.nn.Parameter(decode_layer(leaves)[:into, :out].T.contiguous())
        if linear.bias is not None:
            linear.bias = torch.nn.Parameter(leaves["bias"][:out].float())
    for key, tensor in stored.items():
        if "norm" in key or "embed" in key:
            model.get_parameter(key).data.copy_(tensor)
    return model


# -- Engines -------------------------------------------------------------------------------------


def test_engines_agree_on_an_original(models):
    ours, stock = (logits_of(name, models / "qwen2") for name in ("exl3", "transformers"))
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2-8", "qwen2-3", "phi3-3"])
def test_engines_agree_on_a_quant(models, name):
    reference = logits_of("transformers", models / name.partition("-")[0])
    ours = summary(logits_of("exllamav3", models / name), reference)
    stock = summary(logits_of("transformers", models / name), reference)
    assert ours.ppl == pytest.approx(stock.ppl, rel=1e-4)
    assert ours.divergence.mean == pytest.approx(stock.divergence.mean, rel=1e-4)
    assert ours.divergence.mean > 1e-4


def test_a_quant_is_the_stock_model_with_decoded_weights(models):
    model = dequantized(models / "qwen2", models / "qwen2-3")
    with torch.no_grad():
        expected = model(ROWS).logits
    for name in ("exl3", "transformers"):
        torch.testing.assert_close(
            logits_of(name, models / "qwen2-3"), expected, rtol=1e-5, atol=1e-4
        )


def test_compare_scores_the_same(models):
    reference = logits_of("exl3", models / "qwen2")
    told = summary(logits_of("exl3", models / "qwen2-3"), reference)
    original, quant = compare(models / "qwen2", [models / "qwen2-3"], ROWS)
    assert original.kld == 0
    assert quant.kld == pytest.approx(told.divergence.mean)
    assert quant.perplexity == pytest.approx(told.ppl)


def test_bfloat16_is_another_arithmetic(models):
    full, half = (
        open_engine(name, models / "qwen2", "x")
        for name in ("transformers", "transformers_auto_bf16")
    )
    assert (full.arithmetic, half.arithmetic) == ("transformers, float32", "transformers, bfloat16")
    assert full.fingerprint() == half.fingerprint()
    ((_, logits),) = half.logits(ROWS, [0])
    assert logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["exl3", "transformers"])
def test_only_the_rows_that_are_asked(models, name):
    whole = logits_of(name, models / "qwen2")
    with open_engine(name, models / "qwen2", "x") as engine:
        assert engine.context == 64 and engine.vocab == 300
        some = list(engine.logits(ROWS, [2, 0]))
    assert [i for i, _ in some] == [2, 0]
    assert all(torch.equal(logits, whole[i : i + 1]) for i, logits in some)


def test_gpu_numbers_without_a_gpu(models):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with open_engine("exl3", models / "qwen2", "x", device="0,1") as engine:
        assert engine.model.device.type == "cpu"


# -- Several folders -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exl3", "transformers"])
def test_shards_in_several_folders(models, tmp_path, name):
    tensors = load_file(models / "qwen2-3" / "model.safetensors")
    first, second = tmp_path / "disk1", tmp_path / "disk2"
    shutil.copytree(models / "qwen2-3", first)
    second.mkdir()
    half = {key: tensors.pop(key) for key in list(tensors) if "layers.1" in key}
    save_file(tensors, first / "model.safetensors", {"format": "pt"})
    save_file(half, second / "model.safetensors", {"format": "pt"})
    places = [str(second), str(first)]
    assert torch.equal(logits_of(name, places), logits_of(name, models / "qwen2-3"))
    with open_engine(name, places, "x") as engine:
        assert engine.storage().layer_bpw == measure_storage(models / "qwen2-3").layer_bpw
        assert engine.fingerprint() == open_engine(name, places, "y").fingerprint()
        linked = engine.place.path
    assert not linked.exists() and (first / "model.safetensors").exists()
    with pytest.raises(UserError, match=r"x: .* is in .*disk1.* and again in .*disk1"):
        open_engine(name, [first, first], "x")
    with pytest.raises(UserError, match=r"none of .* has a config"):
        open_engine(name, [second, second], "x")
    with pytest.raises(UserError, match="has no safetensors files"):
        open_engine(name, [first, tmp_path], "x")


# -- Messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
def test_engines_of_others_have_a_message(models, name):
    with pytest.raises(UserError, match=f'^My quant: load_fn "{name}" .*remove the entry, or '):
        open_engine(name, models / "qwen2", "My quant")


def test_messages(models, tmp_path):
    with pytest.raises(UserError, match=r'^L: load_fn "vllm" is unknown; there are exl3, '):
        open_engine("vllm", models / "qwen2", "L")
    with pytest.raises(UserError, match=r"^L: .*nowhere does not exist"):
        open_engine("exl3", tmp_path / "nowhere", "L")
    with pytest.raises(UserError, match=r"^L: .* has no config.json"):
        open_engine("exl3", tmp_path, "L")
    with pytest.raises(UserError, match=r"^L: .*: transformers cannot load it: "):
        open_engine("transformers", tmp_path, "L")


def test_weights_that_are_missing_are_not_made_up(models, tmp_path):
    shutil.copytree(models / "qwen2", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors[f"{Q}.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"{Q}.weight is in no file"):
        logits_of("transformers", tmp_path / "model")


def test_llamacpp_that_is_not_installed(tmp_path):
    if find_spec("llama_cpp"):
        pytest.skip("it is installed")
    with pytest.raises(UserError, match=r"^L: .*pip install llama-cpp-python"):
        open_engine("llamacpp", write_gguf(tmp_path / "a.gguf"), "L")


def test_fingerprints_tell_models_apart(models, tmp_path):
    names = ("qwen2", "qwen2-3", "qwen2-8")
    prints = {open_engine("exl3", models / name, "x").fingerprint() for name in names}
    assert len(prints) == 3
    copy = shutil.copytree(models / "qwen2", tmp_path / "copy")
    assert open_engine("transformers", copy, "x").fingerprint() in prints


# -- Storage -------------------------------------------------------------------------------------


def test_storage_of_an_exl3_quant_by_hand(models):
    # A block has 128 x 128 (q, o), 128 x 32 (k, v), 128 x 192 (gate, up), 192 x 128 (down);
    # a dimension that is no multiple of 128 is padded.
    squares, wide = 4, 3  # k and v are padded to 128 x 128, gate, up and down to 128 x 256
    weights = 2 * (squares * 128 * 128 + wide * 128 * 256)
    scales = 2 * 2 * (squares * (128 + 128) + wide * (128 + 256))  # float16
    biases, markers = 2 * 2 * 3 * 128, 4 * 2 * 7  # of q, k and v; int32 of every layer
    nbytes = 3 * weights / 8 + scales + biases + markers
    storage = measure_storage(models / "qwen2-3")
    assert storage.layer_gib * 2**30 == pytest.approx(nbytes)
    assert storage.layer_bpw == pytest.approx(8 * nbytes / weights)
    head = 6 * 128 * 384 / 8 + 2 * (128 + 384) + 4
    assert storage.head_gib * 2**30 == pytest.approx(head)
    assert storage.head_bpw == pytest.approx(8 * head / (128 * 384))
    files = [f for f in (models / "qwen2-3").iterdir() if f.is_file()]
    assert storage.directory_bytes == sum(f.stat().st_size for f in files)


def test_storage_of_originals(models, tmp_path):
    storage = measure_storage(models / "qwen2")  # float32, tied
    assert (storage.layer_bpw, storage.head_bpw) == (32, 32)
    assert storage.head_gib * 2**30 == 4 * 300 * 128
    assert storage.layer_gib * 2**30 == 4 * 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 192)
    save_tiny("gemma3_text", tmp_path / "half", dtype=torch.bfloat16)
    storage = measure_storage(tmp_path / "half")
    assert (storage.layer_bpw, storage.head_bpw) == (16, 16)


PACKED = {
    "qweight": ({"qweight": (16, 256, torch.int32), "scales": (1, 256, torch.float16)}, 4.125),
    "weight_packed": (
        {"weight_packed": (256, 16, torch.int32), "weight_scale": (256, 1, torch.float16)},
        4.125 + 8 * 16 / (128 * 256),
    ),
    "float8": ({"weight": (256, 128, torch.float8_e4m3fn)}, 8),
    "codes": ({"codes": (256, 16, torch.int8)}, math.nan),
}


@pytest.mark.parametrize("kind", PACKED)
def test_storage_of_other_packings(tmp_path, kind):
    leaves, bits = PACKED[kind]
    name = "model.layers.0.mlp.up_proj"
    tensors = {f"{name}.{k}": torch.zeros(a, b).to(dtype) for k, (a, b, dtype) in leaves.items()}
    if kind == "weight_packed":
        tensors[f"{name}.weight_shape"] = torch.tensor([256, 128])
    if kind == "float8":
        tensors[f"{name}.bias"] = torch.zeros(256)
    tensors["model.vision_tower.layers.0.weight"] = torch.zeros(100, 100)
    tensors["lm_head.weight"] = torch.zeros(300, 128, dtype=torch.float16)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"bits": 4}}))
    storage = measure_storage(tmp_path)
    assert storage.layer_bpw == pytest.approx(bits, nan_ok=True)
    assert storage.layer_gib > 0
    assert storage.head_bpw == 16


def test_a_folder_without_safetensors(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"12345")
    storage = measure_storage(tmp_path)
    assert storage.directory_bytes == 5
    assert math.isnan(storage.layer_bpw)


def write_gguf(path: Path, tensors=None) -> Path:
    """A GGUF file with a text, a list of texts and a number, and tensors of zeros."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    tensors = tensors or {"token_embd.weight": ((64, 300), 300 * 34 * 2)}
    pairs = [
        text("general.name") + struct.pack("<I", 8) + text("tiny"),
        text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"),
        text("scores") + struct.pack("<IIQff", 9, 6, 2, 1.0, 2.0),
        text("general.alignment") + struct.pack("<II", 4, 64),
    ]
    head, data = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join(pairs), b""
    for name, (shape, nbytes) in tensors.items():
        head += text(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}QIQ", *shape, 8, len(data))
        data += bytes(-(-nbytes // 64) * 64)
    path.write_bytes(head + bytes(-len(head) % 64) + data)
    return path


def test_storage_of_gguf(tmp_path):
    tensors = {
        "token_embd.weight": ((64, 300), 300 * 64),
        "blk.0.attn_q.weight": ((64, 64), 64 * 64 // 2),
        "blk.0.attn_norm.weight": ((64,), 256),
        "blk.1.ffn_up.weight": ((64, 128), 64 * 128),
    }
    path = write_gguf(tmp_path / "a.gguf", tensors)
    storage = measure_storage(path)
    assert storage.layer_bpw == 8 * (64 * 32 + 64 * 128) / (64 * 64 + 64 * 128)
    assert storage.head_bpw == 8
    assert storage.directory_bytes == path.stat().st_size
    write_gguf(tmp_path / "b-00001-of-00002.gguf", tensors)
    second = write_gguf(tmp_path / "b-00002-of-00002.gguf", {"output.weight": ((64, 300), 38400)})
    split = measure_storage(second)
    assert split.layer_bpw == storage.layer_bpw
    assert split.head_bpw == 16


def test_damaged_gguf(tmp_path):
    whole = write_gguf(tmp_path / "a.gguf").read_bytes()
    assert gguf_tensors(tmp_path / "a.gguf")[0].shape == (64, 300)
    for cut in (0, 10, 60, 120, 190):
        (tmp_path / "b.gguf").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"b.gguf is not a sound GGUF file"):
            gguf_tensors(tmp_path / "b.gguf")
    (tmp_path / "c-00001-of-00002.gguf").write_bytes(whole)
    with pytest.raises(UserError, match=r"has no c-00002-of-00002.gguf"):
        gguf_tensors(tmp_path / "c-00001-of-00002.gguf")
