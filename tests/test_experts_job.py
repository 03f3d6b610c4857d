"""Experts in a conversion: what counts for each, poorly fed and dead ones, and what is told."""

import json
from types import SimpleNamespace

import pytest
import torch
from jobs_helpers import flags, run
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, save_tokenizer, tiny_rows

from exl3 import parallel
from exl3.data.rows import calibration_rows
from exl3.data.tokenizer import load_tokenizer
from exl3.jobs.block import Block
from exl3.jobs.experts import (
    SHARED_TOKENS,
    ExpertInputs,
    expert_inputs,
    find_lacking,
    hidden_hessian,
    hidden_moments,
    input_moments,
    tell_counts,
    token_weights,
)
from exl3.jobs.streams import Streams
from exl3.jobs.workdir import WorkDir
from exl3.model.flow import Residual, Stage
from exl3.model.quantized import open_model
from exl3.model.streamed import StreamedModel
from exl3.quant.hessian import Hessian

DEAD, POOR, FED = 0, 1, 2  # experts of `inputs`


@pytest.fixture(autouse=True)
def one_thread():
    with parallel.one_thread_per_op():
        yield


# -- Weights of tokens ---------------------------------------------------------------------------


def test_tokens_count_by_the_square_of_their_share():
    weights = token_weights(torch.tensor([0.0, 0.5, 1.0, 0.0]), 10)
    besides = SHARED_TOKENS * 10 / 4
    assert torch.allclose(weights - besides, torch.tensor([0.0, 0.4, 1.6, 0.0]))


def test_all_tokens_together_count_as_a_few_of_its_own():
    shares = torch.zeros(4096)
    shares[:1000] = torch.rand(1000) + 0.1
    weights = token_weights(shares, 64)
    besides = weights[1000:]
    count = int((besides > 0).sum())  # of a sample of all
    assert count == pytest.approx(SHARED_TOKENS * 64 * 3096 / 4096, abs=2)
    assert torch.equal(besides[besides > 0], torch.ones(count))
    assert besides[:774].sum() == pytest.approx(count / 4, abs=2)  # evenly spread
    assert float(weights.sum()) == pytest.approx(1000 + SHARED_TOKENS * 64, rel=1e-4)


def test_for_a_dead_expert_all_tokens_count_alike():
    weights = token_weights(torch.zeros(500), 64)
    assert float(weights.min()) == float(weights.max()) > 0


# -- What enters an expert -----------------------------------------------------------------------


@pytest.fixture
def block(tmp_path):
    save_tiny("mixtral", tmp_path, num_hidden_layers=1, num_local_experts=4)
    model = StreamedModel(tmp_path, dtype=torch.float32)
    model.load_embedding()
    return Block.load(model, 0)


@pytest.fixture
def inputs(block):
    """Of 4 experts: one gets no token, one two of 200, with the streams a little apart."""
    torch.manual_seed(0)
    (experts,) = block.experts.values()
    original = torch.randn(200, 64)
    index = torch.tensor([[2, 3]]).repeat(200, 1)
    index[[7, 90], 0] = POOR
    share = torch.rand(200, 2) + 0.1
    x = original + 0.1 * torch.randn(200, 64)
    return ExpertInputs(experts, x, index, share, original, lacking=torch.randn(200, 64))


def test_counts_and_shares(inputs):
    assert inputs.counts() == [0, 2, 198, 200]
    shares = inputs.shares(POOR)
    assert shares.nonzero().flatten().tolist() == [7, 90]
    assert torch.equal(shares[[7, 90]], inputs.share[[7, 90], 0])
    assert not inputs.shares(DEAD).any()


def test_a_dead_experts_hessians_are_those_of_all_tokens(block, inputs):
    everything = Hessian(64)
    everything.add(inputs.entering)
    moments = input_moments(inputs, DEAD)
    assert torch.allclose(moments.hessian.mean(), everything.mean(), atol=1e-5)
    shift = inputs.entering.T @ (inputs.original - inputs.entering) / 200
    assert torch.allclose(moments.shift(), shift, atol=1e-5)
    hidden = inputs.experts.hidden(DEAD, inputs.entering)
    expected = hidden.T @ hidden / 200
    assert torch.allclose(hidden_hessian(inputs, DEAD).mean(), expected, rtol=1e-3, atol=1e-4)
    # It makes up for nothing: no token comes to it.
    keys = [key for key in block.linears if f"experts.{DEAD}.w" in key and "w2" not in key]
    assert not hidden_moments(inputs, DEAD, block, keys).residual().any()


@pytest.mark.parametrize("e", [POOR, FED])
def test_the_fewer_its_tokens_the_more_count_all_others(inputs, e):
    asked = inputs.shares(e) > 0
    own, count = inputs.entering[asked], int(asked.sum())
    weights = inputs.shares(e)[asked].square()
    plain = (own.T * weights) @ own / weights.sum()
    everything = inputs.entering.T @ inputs.entering / 200
    trusted = count / (count + SHARED_TOKENS * 64)
    hessian = input_moments(inputs, e).hessian.mean()
    assert torch.allclose(hessian, trusted * plain + (1 - trusted) * everything, atol=1e-4)
    assert torch.linalg.matrix_rank(hessian) == 64  # of two tokens alone: 2


def test_what_is_lacking_counts_for_its_own_tokens_only(block, inputs):
    keys = [key for key in block.linears if f"experts.{POOR}.w" in key and "w2" not in key]
    for key in keys:
        block.quantized[key] = block.loaded[key].mul(4).round() / 4
    moments = hidden_moments(inputs, POOR, block, keys)
    weights = token_weights(inputs.shares(POOR), 96)
    block.compute_quantized(keys)
    xq = inputs.experts.hidden(POOR, inputs.entering)
    block.compute_original(keys)
    xf = inputs.experts.hidden(POOR, inputs.entering)
    left = xq * weights[:, None] / weights.sum()
    wanted = torch.zeros(200, 64)
    for token in (7, 90):
        own = 1 - SHARED_TOKENS * 96 / 200 / weights[token]  # of the token's weight
        wanted[token] = own * inputs.lacking[token] / inputs.share[token, 0]
    assert torch.allclose(moments.residual(), left.T @ wanted, atol=1e-4)
    assert torch.allclose(moments.shift(), left.T @ (xf - xq), atol=1e-4)
    assert torch.allclose(moments.hessian.mean(), left.T @ xq, rtol=1e-3, atol=1e-3)


def test_inputs_are_what_routing_gives(block, monkeypatch):
    monkeypatch.setattr("exl3.jobs.streams.BATCH_TOKENS", 32)
    (path,) = block.experts
    given = []
    block.experts[path].register_forward_pre_hook(lambda m, args: given.append(args))
    streams = Streams(tiny_rows(6, 16), paired=True)
    inputs = expert_inputs(block, Stage((path,), experts=True), streams)
    given.clear()
    for part in streams.batches():
        block.model.run_block(0, streams.rows[part], None)
    x, index, share = (torch.cat(parts) for parts in zip(*given, strict=True))
    assert torch.equal(inputs.entering, x)
    assert torch.equal(inputs.original, x)  # nothing is quantized yet
    assert torch.equal(inputs.index, index)
    assert torch.equal(inputs.share, share)
    assert inputs.counts() == torch.bincount(index.flatten(), minlength=4).tolist()


def test_what_the_experts_are_to_make_up_for(block):
    """All that the block's output lacks, expert for expert as they are quantized."""
    (path,) = block.experts
    key = next(key for key in block.linears if "o_proj" in key)
    block.quantized[key] = block.loaded[key].mul(2).round() / 2
    streams = Streams(tiny_rows(4, 16), paired=True)
    stage = Stage((path,), Residual("post_attention_layernorm", 0.5), experts=True)
    inputs = expert_inputs(block, stage, streams)
    block.advance_original(streams)

    def lacking():
        block.compute_quantized()
        out = block.model.run_block(0, streams.rows, None)
        return ((streams.original - out) / 0.5).flatten(0, 1)

    inputs.lacking = find_lacking(block, stage, inputs, streams)
    assert torch.allclose(inputs.lacking, lacking(), atol=1e-4)
    # From here on a factor of 1, as `settle` has it.
    inputs.lacking *= 0.5
    for e in (1, 3):
        before = inputs.output(e)
        for name in ("w1", "w2", "w3"):
            key = next(key for key in block.linears if key.endswith(f"experts.{e}.{name}"))
            block.quantized[key] = block.loaded[key].mul(4).round() / 4
        block.compute_quantized()
        inputs.settle(e, before)
    assert torch.allclose(inputs.lacking, 0.5 * lacking(), atol=1e-4)


def test_nothing_is_lacking_where_the_stream_is_not_seen(block):
    (path,) = block.experts
    streams = Streams(tiny_rows(4, 16), paired=True)
    stage = Stage((path,), None, experts=True)
    inputs = expert_inputs(block, stage, streams)
    assert find_lacking(block, stage, inputs, streams) is None
    before = inputs.output(0)
    assert before is None
    inputs.settle(0, before)


# -- What is told --------------------------------------------------------------------------------


def told(tmp_path, counts):
    lines = []
    job = SimpleNamespace(work=WorkDir(tmp_path), progress=SimpleNamespace(say=lines.append))
    tell_counts(job, "block.experts", counts)
    kept = json.loads((tmp_path / "experts" / "block.experts.json").read_text())
    assert kept == {"tokens": counts}
    return lines


def test_even_counts_are_told_in_a_line(tmp_path):
    assert told(tmp_path, [90, 1010, 100]) == [
        "block.experts: 90 to 1,010 tokens an expert, median 100"
    ]


def test_poor_experts_are_warned_of(tmp_path):
    _, warning = told(tmp_path, [0, 5000, 5000, 249])
    assert "WARNING: 2 experts got less than a tenth of their fair share of 2,562" in warning
    assert ": 0 (0), 3 (249); they are calibrated mostly on all tokens" in warning
    _, warning = told(tmp_path, [1] * 20 + [10_000])
    assert "7 (1), ...;" in warning


# -- A conversion --------------------------------------------------------------------------------

SIZES = {"hidden_size": 128, "intermediate_size": 128, "vocab_size": 300, "num_hidden_layers": 1}
BIAS = "model.layers.0.block_sparse_moe.e_score_correction_bias"


def save_starved(folder):
    """A MiniMax-M2 one of whose experts is never chosen, and one by two tokens of the 384."""
    save_tiny("minimax_m2", folder, **SIZES, num_local_experts=5)
    save_tokenizer(folder)
    tensors = load_file(folder / "model.safetensors")

    def counts(bias):
        tensors[BIAS] = bias
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        model = StreamedModel(folder, dtype=torch.float32)
        model.load_embedding()
        block = Block.load(model, 0)
        rows = calibration_rows(load_tokenizer(folder), 6, 64, vocab_size=300)
        (path,) = block.experts
        return expert_inputs(block, Stage((path,), experts=True), Streams(rows, True)).counts()

    low, high = -2.0, 2.0
    while low < high:
        bias = torch.tensor([-1000.0, (low + high) / 2, 0.0, 0.0, 0.0])
        found = counts(bias)
        assert found[0] == 0
        if found[1] == 2:
            return
        low, high = (bias[1].item(), high) if found[1] < 2 else (low, bias[1].item())


@pytest.mark.parametrize(
    "more", [(), pytest.param(("--no_correction",), marks=pytest.mark.slow)], ids=str
)
def test_starved_experts_are_converted_and_told(tmp_path, capsys, more):
    folder, out = tmp_path / "model", tmp_path / "out"
    save_starved(folder)
    run(*flags(folder, out, tmp_path / "work", "8", **{"-hb": 16}), *more)
    text = capsys.readouterr().out
    (kept,) = (tmp_path / "work" / "experts").iterdir()
    counts = json.loads(kept.read_text())["tokens"]
    assert kept.name == "model.layers.0.mlp.experts.json"
    assert counts[0] == 0
    assert 1 <= counts[1] <= 4  # at 8 bits routing is hardly another
    assert sum(counts) == 2 * 384
    assert f"model.layers.0.mlp.experts: 0 to {max(counts)} tokens an expert" in text
    assert f"WARNING: 2 experts got less than a tenth of their fair share of 154 tokens: 0 (0), 1 ({counts[1]});" in text  # fmt: skip # noqa: E501
    source, quant = (open_model(place).checkpoint for place in (folder, out))
    for e in range(5):
        for name in ("w1", "w2", "w3"):
            key = f"model.layers.0.block_sparse_moe.experts.{e}.{name}.weight"
            weight = source.tensor(key)
            assert float((quant.tensor(key) - weight).norm() / weight.norm()) < 0.2
