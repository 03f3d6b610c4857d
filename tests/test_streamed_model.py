"""The streamed model against the stock one, and what is said about damaged folders."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import BLOCKS, HIDDEN, VOCAB, save_tiny, tiny_rows
from torch import nn
from transformers import AutoModelForCausalLM

from exl3 import parallel
from exl3.errors import UserError
from exl3.model.capture import Capture, capture_inputs, head_inputs
from exl3.model.checkpoint import Checkpoint
from exl3.model.streamed import StreamedModel

KINDS = ["llama", "qwen2", "qwen3", "mistral"]
MANY = "60KB"  # a shard size which makes several shards of a tiny model


@pytest.fixture(autouse=True)
def one_thread():
    with parallel.one_thread_per_op():
        yield


def stock_model(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def stock_logits(folder: Path, rows: list[torch.Tensor], **kwargs) -> list[torch.Tensor]:
    model = stock_model(folder, **kwargs)
    with torch.no_grad():
        return [model(row).logits for row in rows]


def streamed_logits(model: StreamedModel, rows: list[torch.Tensor], each) -> list[torch.Tensor]:
    """The sweep of a conversion: one block after the other, all rows through each."""
    states = [None] * len(rows)
    model.load_embedding()
    for i in range(model.num_blocks):
        model.load_block(i)
        states = each(lambda r, i=i, s=states: model.run_block(i, rows[r], s[r]), range(len(rows)))
        model.free_block(i)
    model.load_tail()
    logits = each(lambda r: model.run_tail(rows[r], states[r]), range(len(rows)))
    model.free_tail()
    model.free_embedding()
    return logits


def one_by_one(work, items):
    return [work(item) for item in items]


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def rewrite_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


# -- Bit for bit the stock model -----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied, shard_size", [(False, MANY), (True, "1GB")])
def test_logits_equal_the_stock_models(tmp_path, kind, tied, shard_size):
    save_tiny(kind, tmp_path, tied=tied, shard_size=shard_size)
    assert (len(shards(tmp_path)) > 1) == (shard_size == MANY)
    rows = [tiny_rows(1, 16, seed=1), tiny_rows(2, 9, seed=2)]
    theirs = stock_logits(tmp_path, rows)
    assert theirs[0].std() > 0.5  # else equality would say little

    model = StreamedModel(tmp_path)

    assert model.tied_head == tied
    assert_same(streamed_logits(model, rows, one_by_one), theirs)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_neox"])
def test_softcaps_scaled_embeddings_and_other_names(tmp_path, kind):
    save_tiny(kind, tmp_path)
    rows = [tiny_rows(2, 12)]
    ours = streamed_logits(StreamedModel(tmp_path), rows, one_by_one)
    assert_same(ours, stock_logits(tmp_path, rows))


def test_the_dtype_is_the_checkpoints_unless_another_is_wanted(tmp_path):
    save_tiny("llama", tmp_path, dtype=torch.bfloat16)
    rows = [tiny_rows(2, 12)]
    model = StreamedModel(tmp_path)
    assert model.dtype == torch.bfloat16
    theirs = stock_logits(tmp_path, rows, dtype=torch.bfloat16)
    assert_same(streamed_logits(model, rows, one_by_one), theirs)

    model = StreamedModel(tmp_path, dtype=torch.float32)
    assert_same(streamed_logits(model, rows, one_by_one), stock_logits(tmp_path, rows))


def test_eager_attention_on_request(tmp_path):
    save_tiny("mistral", tmp_path)
    rows = [tiny_rows(1, 16)]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        theirs = [stock(rows[0]).logits]
    model = StreamedModel(tmp_path, attn_implementation="eager")
    assert_same(streamed_logits(model, rows, one_by_one), theirs)


def test_several_threads_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "_THREADS", 4)
    save_tiny("qwen3", tmp_path)
    rows = [tiny_rows(1, 16, seed=seed) for seed in range(12)]
    model = StreamedModel(tmp_path)
    assert_same(streamed_logits(model, rows, parallel.each), stock_logits(tmp_path, rows))


def test_threads_may_be_at_different_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "_THREADS", 4)
    save_tiny("llama", tmp_path)
    rows = [tiny_rows(1, 16, seed=seed) for seed in range(12)]
    model = StreamedModel(tmp_path)
    model.load_embedding()
    model.load_tail()
    for i in range(BLOCKS):
        model.load_block(i)

    def through(row):
        state = None
        for i in range(BLOCKS):
            state = model.run_block(i, row, state)
        return model.run_tail(row, state)

    assert_same(parallel.each(through, rows), stock_logits(tmp_path, rows))


def test_a_run_leaves_no_gradients(tmp_path):
    model = StreamedModel(save_tiny("llama", tmp_path))
    model.load_embedding()
    block = model.load_block(0)
    block.requires_grad_(True)
    assert not model.run_block(0, tiny_rows(1, 4), None).requires_grad


@pytest.mark.parametrize("kind", ["bloom", "llama"])
def test_goes_on_from_a_saved_state(tmp_path, kind):
    """A new object has not seen yet in what form blocks return their output (Bloom: a tuple)."""
    save_tiny(kind, tmp_path)
    row = tiny_rows(3, 8)
    model, state = StreamedModel(tmp_path), None
    model.load_embedding()
    for i in range(BLOCKS):
        model.load_block(i)
        state, before = model.run_block(i, row, state), state
        resumed = StreamedModel(tmp_path)
        resumed.load_embedding()
        resumed.load_block(i)
        assert torch.equal(resumed.run_block(i, row, before), state)
    resumed = StreamedModel(tmp_path)
    resumed.load_embedding()
    resumed.load_tail()
    assert_same([resumed.run_tail(row, state)], stock_logits(tmp_path, [row]))


def test_a_replaced_weight_counts(tmp_path):
    model = StreamedModel(save_tiny("llama", tmp_path))
    model.load_embedding()
    model.load_block(0)
    row = tiny_rows(1, 6)
    before = model.run_block(0, row, None)
    model.block_linears(0)["model.layers.0.mlp.down_proj"].weight.data.zero_()
    after = model.run_block(0, row, None)
    assert not torch.equal(before, after)
    model.load_block(0)
    assert torch.equal(model.run_block(0, row, None), before)


# -- Parts ---------------------------------------------------------------------------------------


def on_meta(model: StreamedModel, prefix: str) -> set[bool]:
    return {p.is_meta for name, p in model._model.named_parameters() if name.startswith(prefix)}


@pytest.mark.parametrize("tied", [False, True])
def test_parts_come_and_go(tmp_path, tied):
    model = StreamedModel(save_tiny("qwen2", tmp_path, tied=tied))
    assert on_meta(model, "") == {True}
    model.load_embedding()
    model.load_block(1)
    assert on_meta(model, model.block_name(1)) == {False}
    assert on_meta(model, model.block_name(0)) == {True}
    model.free_block(1)
    assert on_meta(model, model.block_name(1)) == {True}
    for _ in range(2):
        model.load_tail()
        assert on_meta(model, "lm_head") | on_meta(model, "model.norm") <= {False}
        model.free_tail()
        assert on_meta(model, "model.norm") == {True}
        assert model.head()[1].weight.is_meta
        assert on_meta(model, "model.embed_tokens") == {False}
    model.free_embedding()
    assert on_meta(model, "") == {True}


def test_running_what_is_not_loaded_fails(tmp_path):
    model = StreamedModel(save_tiny("llama", tmp_path))
    model.load_block(0)
    with pytest.raises(RuntimeError, match="embedding is not loaded"):
        model.run_block(0, tiny_rows(1, 4), None)


@pytest.mark.parametrize("tied", [False, True])
def test_every_key_is_in_one_part(tmp_path, tied):
    model = StreamedModel(save_tiny("qwen3", tmp_path, tied=tied))
    blocks = [model.block_keys(i) for i in range(BLOCKS)]
    keys = [*model.embedding_keys(), *(key for block in blocks for key in block)]
    keys += model.tail_keys()
    assert sorted(keys) == sorted(model.checkpoint.keys())
    assert model.embedding_keys() == ["model.embed_tokens.weight"]
    assert set(model.tail_keys()) == {"model.norm.weight", *([] if tied else ["lm_head.weight"])}
    assert all(key.startswith("model.layers.2.") for key in blocks[2])
    assert len(blocks[2]) == 11  # seven linears, two norms, q_norm and k_norm
    assert model.head()[0] == "lm_head"


def test_linears_have_the_checkpoints_own_names(tmp_path):
    """A checkpoint saved from the bare decoder has no `model.` in its keys."""
    save_tiny("llama", tmp_path, tied=True)
    (file,) = shards(tmp_path)
    tensors = {key.removeprefix("model."): value for key, value in load_file(file).items()}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors[f"layers.{BLOCKS}.mlp.up_proj.weight"] = torch.ones(96, HIDDEN)  # such as an MTP layer
    save_file(tensors, file, {"format": "pt"})
    row = tiny_rows(1, 8)

    model = StreamedModel(tmp_path)

    assert set(model.dropped_keys) == {
        "layers.0.self_attn.rotary_emb.inv_freq",
        f"layers.{BLOCKS}.mlp.up_proj.weight",
    }
    model.load_block(1)
    linears = model.block_linears(1)
    assert sorted(linears) == [
        *(f"layers.1.mlp.{name}_proj" for name in ("down", "gate", "up")),
        *(f"layers.1.self_attn.{name}_proj" for name in "koqv"),
    ]
    for name, linear in linears.items():
        assert torch.equal(linear.weight, tensors[f"{name}.weight"])
    assert_same(streamed_logits(model, [row], one_by_one), stock_logits(tmp_path, [row]))


def test_a_tied_model_that_stores_only_its_head(tmp_path):
    save_tiny("llama", tmp_path, tied=True)
    row = tiny_rows(1, 8)
    theirs = stock_logits(tmp_path, [row])
    (file,) = shards(tmp_path)
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, {"format": "pt"})
    model = StreamedModel(tmp_path)
    assert model.tied_head
    assert model.embedding_keys() == ["lm_head.weight"]
    assert_same(streamed_logits(model, [row], one_by_one), theirs)


def test_a_head_stored_beside_a_tied_embedding_is_the_head(tmp_path):
    save_tiny("llama", tmp_path, tied=True)
    (file,) = shards(tmp_path)
    tensors = load_file(file)
    tensors["lm_head.weight"] = -tensors["model.embed_tokens.weight"]
    save_file(tensors, file, {"format": "pt"})
    row = tiny_rows(1, 8)
    model = StreamedModel(tmp_path)
    assert not model.tied_head
    assert_same(streamed_logits(model, [row], one_by_one), stock_logits(tmp_path, [row]))


# -- Capture -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen2", "mistral"])
def test_captured_inputs_are_what_the_stock_models_hooks_see(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(parallel, "_THREADS", 4)
    save_tiny(kind, tmp_path)
    rows = [tiny_rows(2, 10, seed=seed) for seed in range(6)]
    stock, seen = stock_model(tmp_path), {}
    for name, module in stock.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, 1))
            )
    with torch.no_grad():
        for row in rows:
            stock(row)

    model, states = StreamedModel(tmp_path), [None] * len(rows)
    model.load_embedding()
    for i in range(BLOCKS):
        model.load_block(i)
        with Capture(model, i, model.block_linears(i)) as capture:
            results = parallel.each(lambda r, s=states: capture.run(rows[r], s[r]), range(6))
        for r, (_, groups) in enumerate(results):
            attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
            assert [group.names for group in groups] == [
                (f"{attention}q_proj", f"{attention}k_proj", f"{attention}v_proj"),
                (f"{attention}o_proj",),
                (f"{mlp}gate_proj", f"{mlp}up_proj"),
                (f"{mlp}down_proj",),
            ]
            for group in groups:
                for name in group.names:
                    assert torch.equal(group.inputs, seen[name][r])
        states = [output for output, _ in results]
        model.free_block(i)
    model.load_tail()
    for r, row in enumerate(rows):
        inputs = head_inputs(model, row, states[r])
        assert inputs.shape == (20, HIDDEN)
        assert torch.equal(inputs, seen["lm_head"][r])


def test_capture_keeps_nothing_afterwards(tmp_path):
    model = StreamedModel(save_tiny("llama", tmp_path))
    model.load_embedding()
    model.load_block(0)
    linears = model.block_linears(0)
    output, _ = capture_inputs(model, 0, linears, tiny_rows(1, 5), None)
    assert torch.equal(output, model.run_block(0, tiny_rows(1, 5), None))
    assert not any(linear._forward_pre_hooks for linear in linears.values())


def test_only_the_wanted_linears_are_captured(tmp_path):
    model = StreamedModel(save_tiny("llama", tmp_path))
    model.load_embedding()
    model.load_block(0)
    wanted = {n: m for n, m in model.block_linears(0).items() if n.endswith(("k_proj", "up_proj"))}
    _, groups = capture_inputs(model, 0, wanted, tiny_rows(1, 5), None)
    assert [group.names[0].rpartition(".")[2] for group in groups] == ["k_proj", "up_proj"]


# -- Checkpoints ---------------------------------------------------------------------------------


def test_a_checkpoint_reads_what_was_saved(tmp_path):
    tensors = {
        "a": torch.randn(3, 5).to(torch.bfloat16),
        "b": torch.arange(4),
        "c": torch.tensor(2.5),
        "d": torch.zeros(0, 7),
    }
    save_file(tensors, tmp_path / "any.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert sorted(checkpoint.keys()) == sorted(tensors)
    for key, tensor in tensors.items():
        assert checkpoint.shape(key) == tuple(tensor.shape)
        assert checkpoint.dtype(key) == tensor.dtype
        assert checkpoint.nbytes(key) == tensor.nbytes
        assert checkpoint.file(key) == "any.safetensors"
        assert torch.equal(checkpoint.tensor(key), tensor)


def test_what_is_written_into_a_tensor_stays_there(tmp_path):
    """In memory that a file is mapped to, a second reading would see it, or the file."""
    save_file({"a": torch.ones(3)}, tmp_path / "any.safetensors")
    checkpoint = Checkpoint(tmp_path)
    checkpoint.tensor("a").zero_()
    assert torch.equal(checkpoint.tensor("a"), torch.ones(3))
    assert torch.equal(Checkpoint(tmp_path).tensor("a"), torch.ones(3))


def test_one_matrix_of_a_stack(tmp_path):
    stack = torch.randn(3, 4, 5)
    save_file({"x": torch.zeros(1), "stack": stack}, tmp_path / "any.safetensors")
    for e in range(3):
        matrix = Checkpoint(tmp_path).matrix("stack", e)
        assert torch.equal(matrix, stack[e])
        assert matrix.untyped_storage().nbytes() == stack[e].nbytes  # the others are not read


def test_tensors_are_where_torch_would_put_them(tmp_path):
    """Products with one row differ in their last bits by the address of the weights."""
    tensors = {f"{n}": torch.ones(n) for n in range(1, 9)}
    save_file(tensors, tmp_path / "any.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert {checkpoint.tensor(key).data_ptr() % 64 for key in tensors} == {0}


def test_a_file_that_changes_under_way(tmp_path):
    save_file({"a": torch.ones(300)}, tmp_path / "any.safetensors")
    checkpoint = Checkpoint(tmp_path)
    (tmp_path / "any.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"^any\.safetensors: a cannot be read"):
        checkpoint.tensor("a")


def test_the_fingerprint_tells_models_apart(tmp_path):
    folder = save_tiny("llama", tmp_path / "a", shard_size=MANY)
    same = save_tiny("llama", tmp_path / "b", shard_size=MANY)
    other = save_tiny("llama", tmp_path / "c", shard_size=MANY, seed=1)
    mark = Checkpoint(folder).fingerprint()
    assert len(mark) == 64
    assert Checkpoint(same).fingerprint() == mark
    assert Checkpoint(other).fingerprint() != mark
    rewrite_config(same, rms_norm_eps=1e-3)
    assert Checkpoint(same).fingerprint() != mark


def write_header(path: Path, header: object, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DAMAGED = {
    "not JSON": (b"{", b"", "is not JSON"),
    "a list": ([], b"", "is not JSON"),
    "nested without end": (b"[" * 100_000, b"", "is not JSON"),
    "no shape": ({"x": {"dtype": "F32"}}, b"", "entry for x is damaged"),
    "negative shape": ({"x": entry([-1], 0, 4)}, b"0123", "entry for x is damaged"),
    "bool as a size": ({"x": entry([True], 0, 4)}, b"0123", "entry for x is damaged"),
    "unknown dtype": ({"x": entry([1], 0, 4, "F5")}, b"0123", "x has the dtype 'F5'"),
    "shape too large": ({"x": entry([1 << 62], 0, 4)}, b"0123", "does not fit its 4 bytes"),
    "backwards": ({"x": entry([1], 4, 0)}, b"0123", "does not fit its -4 bytes"),
    "overlap": ({"x": entry([1], 0, 4), "y": entry([1], 0, 4)}, b"0123", "y overlaps"),
    "gap": ({"x": entry([1], 4, 8)}, b"01234567", "x overlaps or leaves a gap"),
    "beyond the end": ({"x": entry([3], 0, 12)}, b"0123", r"truncated: 74 of 82 bytes"),
    "too long": ({"x": entry([1], 0, 4)}, b"012345", "2 bytes longer"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_header_is_named(tmp_path, what):
    header, data, message = DAMAGED[what]
    write_header(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(UserError, match=r"^bad\.safetensors.*" + message):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "truncated: 0 bytes"),
        (b"1234567", "truncated: 7 bytes"),
        ((1000).to_bytes(8, "little") + b"{}", "truncated: 10 bytes of at least 1,008"),
        (b"\xff" * 16, "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer.*git lfs pull"),
    ],
)
def test_a_file_that_is_no_safetensors_file(tmp_path, content, message):
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"^bad\.safetensors.*" + message):
        Checkpoint(tmp_path)


def test_a_truncated_shard(tmp_path):
    path = shards(save_tiny("llama", tmp_path, shard_size=MANY))[1]
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError) as error:
        StreamedModel(tmp_path)
    assert str(error.value) == (
        f"{path.name} is truncated: {whole - 1000:,} of {whole:,} bytes; download it again."
    )


def test_a_missing_shard(tmp_path):
    path = shards(save_tiny("llama", tmp_path, shard_size=MANY))[1]
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name} is missing"):
        StreamedModel(tmp_path)


def rewrite_index(folder: Path, **files: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].update(files)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a\\x.safetensors"])
def test_an_index_that_points_outside(tmp_path, name):
    folder = save_tiny("llama", tmp_path / "model", shard_size=MANY)
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    rewrite_index(folder, x=name)
    with pytest.raises(UserError, match="outside the model's folder"):
        Checkpoint(folder)


def test_an_index_that_promises_too_much(tmp_path):
    folder = save_tiny("llama", tmp_path, shard_size=MANY)
    rewrite_index(folder, x=shards(folder)[0].name)
    with pytest.raises(UserError, match="promises x in model-00001"):
        Checkpoint(folder)


def test_a_tensor_in_two_files(tmp_path):
    for name in ("a", "b"):
        save_file({"x": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"x is in a\.safetensors and again in b\.safetensors"):
        Checkpoint(tmp_path)


def test_a_folder_without_tensors(tmp_path):
    with pytest.raises(UserError, match=r"no \.safetensors file"):
        Checkpoint(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        Checkpoint(tmp_path / "nowhere")


# -- Models that cannot be streamed --------------------------------------------------------------


def change_tensors(folder: Path, change) -> None:
    (file,) = shards(folder)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_a_missing_tensor_is_found_before_anything_runs(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    save_tiny("llama", tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(UserError, match=f"^{name} is in no file of "):
        StreamedModel(tmp_path)


def test_a_tensor_of_another_shape(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    save_tiny("llama", tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.update({name: torch.ones(95, HIDDEN)}))
    with pytest.raises(UserError, match=rf"{name} is \(95, 64\), but by config.json .*\(96, 64\)"):
        StreamedModel(tmp_path)


def test_a_tensor_under_two_names(tmp_path):
    save_tiny("llama", tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.update({"norm.weight": torch.ones(HIDDEN)}))
    with pytest.raises(UserError, match=r"norm\.weight and .*norm\.weight are the same tensor"):
        StreamedModel(tmp_path)


def test_no_config(tmp_path):
    save_tiny("llama", tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json"):
        StreamedModel(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "[" * 100_000])
def test_a_config_that_is_no_config(tmp_path, text):
    save_tiny("llama", tmp_path)
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"^config\.json .*download it again"):
        StreamedModel(tmp_path)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model_type": "llama99"}, "model type 'llama99'.* does not know"),
        ({"model_type": ["llama"]}, "does not know"),
        ({"model_type": "bert", "is_decoder": 7}, r"config\.json"),
        ({"model_type": "vit"}, "No causal language model of the type vit"),
        ({"num_hidden_layers": 10**12}, "asks for 1000000000000 blocks"),
        ({"num_hidden_layers": 0}, "asks for 0 blocks"),
        ({"num_hidden_layers": "3"}, r"config\.json"),
        ({"hidden_size": -64}, r"config\.json"),
        ({"hidden_act": "no such thing"}, r"config\.json: "),
        ({"attn_implementation": "somebody/kernel"}, "somebody/kernel would be downloaded"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"already quantized \(gptq\)"),
    ],
)
def test_a_config_with_bad_values(tmp_path, values, message):
    save_tiny("llama", tmp_path)
    rewrite_config(tmp_path, **values)
    with pytest.raises(UserError, match=message):
        StreamedModel(tmp_path)


OWN_CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
(Path({folder!r}) / "ran").touch()
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def own_code(folder: Path, kind: str) -> Path:
    save_tiny("llama", folder)
    (folder / "own.py").write_text(OWN_CODE.format(folder=str(folder)))
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    rewrite_config(folder, model_type=kind, auto_map=auto_map)
    return folder


def test_a_models_own_code_does_not_run_unasked(tmp_path):
    folder = own_code(tmp_path, "own")
    with pytest.raises(UserError, match=r"its own code.*--trust_remote_code"):
        StreamedModel(folder)
    assert not (folder / "ran").exists()


def test_a_known_type_needs_none_of_the_models_own_code(tmp_path):
    folder = own_code(tmp_path, "llama")
    assert StreamedModel(folder).num_blocks == BLOCKS
    assert not (folder / "ran").exists()


def test_trusted_code_runs(tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    modules = tmp_path / "modules"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(str(modules))
    folder = own_code(tmp_path / "model", "own")
    row = tiny_rows(1, 8)
    model = StreamedModel(folder, trust_remote_code=True)
    assert (folder / "ran").exists()
    (logits,) = streamed_logits(model, [row], one_by_one)
    rewrite_config(folder, model_type="llama")
    assert_same([logits], stock_logits(folder, [row]))
    assert logits.shape == (1, 8, VOCAB)


def test_code_from_another_repository_is_refused(tmp_path):
    folder = own_code(tmp_path, "own")
    rewrite_config(folder, auto_map={"AutoConfig": "somebody/model--own.OwnConfig"})
    with pytest.raises(UserError, match="from another repository"):
        StreamedModel(folder, trust_remote_code=True)
