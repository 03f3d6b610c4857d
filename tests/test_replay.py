"""Parts of a block that are done with give back what they gave, bit for bit."""

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny, tiny_rows
from torch import nn

from exl3 import parallel
from exl3.errors import JobError
from exl3.jobs.block import Block
from exl3.jobs.inputs import stage_moments
from exl3.jobs.streams import BATCH_TOKENS, Streams, run_block
from exl3.model.flow import find_flow
from exl3.model.replay import Replay
from exl3.model.streamed import StreamedModel


@pytest.fixture(autouse=True)
def one_thread():
    with parallel.one_thread_per_op():
        yield


class Counted(nn.Module):
    """Counts how often it computes."""

    def __init__(self, weights=None):
        super().__init__()
        self.calls, self.weights = 0, weights

    def forward(self, x):
        self.calls += 1
        return 2 * x if self.weights is None else (2 * x, self.weights, None)


def test_a_run_is_computed_once():
    module, replay, x = Counted(), Replay(), torch.randn(3, 4)
    replay.settle(module)
    replay.settle(module)
    given = []
    for _ in range(3):
        with replay.of(("original", 0)):
            given.append(module(x))
    assert module.calls == 1
    assert all(torch.equal(y, 2 * x) for y in given)
    with replay.of(("quantized", 0)):
        assert torch.equal(module(x + 1), 2 * (x + 1))
    assert module.calls == 2


def test_outside_of_runs_and_afterwards_it_computes():
    module, replay, x = Counted(), Replay(), torch.randn(3, 4)
    replay.settle(module)
    with replay.of(0):
        module(x)
    assert torch.equal(module(x + 1), 2 * (x + 1))
    replay.clear()
    with replay.of(0):
        assert torch.equal(module(x + 2), 2 * (x + 2))
    assert module.calls == 3
    assert module.forward.__func__ is Counted.forward


def test_of_a_tuple_the_first_is_kept():
    module, replay, x = Counted(weights="much"), Replay(), torch.randn(3, 4)
    replay.settle(module)
    for _ in range(2):
        with replay.of(0):
            given = module(x)
        assert torch.equal(given[0], 2 * x)
        assert given[1:] == (None, None)


class Ended(nn.Module):
    """Ends in a linear, or in something behind it; counts how often all of it computes."""

    def __init__(self, behind=None):
        super().__init__()
        self.calls, self.last, self.behind = 0, nn.Linear(4, 4), behind

    def forward(self, x):
        self.calls += 1
        y = self.last(x.sin())
        return (y if self.behind is None else self.behind(y)), None


@pytest.mark.parametrize("behind, calls", [(None, 1), (torch.relu, 3)])
def test_a_module_that_ends_in_a_linear_is_computed_from_there(behind, calls):
    module, replay = Ended(behind), Replay()
    xs = [torch.randn(3, 4) for _ in range(3)]
    replay.watch(module.last)
    for n, x in enumerate(xs):
        with replay.of(n):
            module(x)
    module.last.weight.data = torch.randn(4, 4)  # quantized meanwhile
    module.calls = 0
    replay.settle(module)
    for _ in range(2):
        for n, x in enumerate(xs):
            with replay.of(n):
                given = module(x)
            y = module.last(x.sin())
            assert torch.equal(given[0], y if behind is None else behind(y))
            assert given[1] is None
    assert module.calls == calls  # the first tells whether its end is the linear's
    with replay.of("another run"):
        assert torch.equal(module(xs[0] + 1)[0], module.forward(xs[0] + 1)[0])
    replay.clear()
    assert not module.last._forward_pre_hooks


def test_an_overwritten_input_is_computed_again():
    module, replay, xs = Ended(), Replay(), [torch.randn(3, 4) for _ in range(2)]
    entered = []
    module.last.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    replay.watch(module.last)
    for n, x in enumerate(xs):
        with replay.of(n):
            module(x)
    entered[1].zero_()
    replay.settle(module)
    for n, x in enumerate(xs):
        with replay.of(n):
            assert torch.equal(module(x)[0], module.last(x.sin()))


def test_what_was_overwritten_is_not_given_back():
    module, replay = Counted(), Replay()
    replay.settle(module)
    with replay.of(0), pytest.raises(JobError, match="--no_correction"):
        module(torch.ones(2)).add_(1)
        module(torch.ones(2))


@pytest.mark.parametrize("kind", ["llama", "bloom", "gemma2", "cohere"])
def test_moments_and_states_are_the_same_with_and_without(tmp_path, monkeypatch, kind):
    """Layers take turns in being settled, as in a conversion, two batches in two threads."""
    monkeypatch.setattr(parallel, "_THREADS", 2)
    monkeypatch.setattr("exl3.jobs.streams.BATCH_TOKENS", 32)
    save_tiny(kind, tmp_path, num_hidden_layers=1)

    def pass_through(replayed: bool) -> list[torch.Tensor]:
        model = StreamedModel(tmp_path, dtype=torch.float32)
        model.load_embedding()
        block = Block.load(model, 0)
        streams = Streams(tiny_rows(6, 16), paired=True)
        stages = find_flow(model, 0, block.module, block.linears, {}, streams.rows[:2], None)
        seen = []
        for stage in stages:
            advance = replayed and stage is stages[-1]
            if replayed and len(stage.keys) == 1:
                block.replay_last(stage.keys[0])
            moments = stage_moments(block, stage, streams, advance)
            seen += [moments.hessian.mean(), moments.shift()]
            seen += [] if stage.residual is None else [moments.residual()]
            for key in stage.keys:
                block.quantized[key] = block.loaded[key].mul(4).round() / 4
            if replayed:
                block.replay_settled()
        assert bool(block.replay._forwards) == replayed
        if not advance:
            block.advance_original(streams)
        block.advance_quantized(streams)
        original, quantized = streams.original, streams.quantized
        block.replay.clear()
        block.compute_original()
        assert torch.equal(original, run_block(model, 0, streams.rows, None))
        block.compute_quantized()
        assert torch.equal(quantized, run_block(model, 0, streams.rows, None))
        return [*seen, original, quantized]

    plain, replayed = pass_through(False), pass_through(True)
    assert not torch.equal(plain[-1], plain[-2])
    assert all(torch.equal(a, b) for a, b in zip(plain, replayed, strict=True))


def counted(folder: Path, linear: str) -> tuple[Block, list[int]]:
    """A block, and a list that grows with every call of a linear of its attention."""
    save_tiny("llama", folder, num_hidden_layers=1)
    model = StreamedModel(folder, dtype=torch.float32)
    model.load_embedding()
    block, calls = Block.load(model, 0), []
    getattr(block.module.self_attn, linear).register_forward_hook(lambda *_: calls.append(1))
    return block, calls


def test_replay_spares_forwards(tmp_path):
    block, calls = counted(tmp_path, "o_proj")
    streams = Streams(tiny_rows(6, 16), paired=True)
    for key in [key for key in block.linears if "self_attn" in key]:
        block.quantized[key] = block.loaded[key].clone()
    block.replay_settled()
    down = next(key for key in block.linears if "down_proj" in key)
    stages = find_flow(block.model, 0, block.module, block.linears, {}, streams.rows, None)
    stage = next(stage for stage in stages if stage.keys == (down,))
    calls.clear()
    for _ in range(3):
        stage_moments(block, stage, streams)
    assert len(calls) == 2  # once a stream


def test_attention_runs_once_a_stream_and_batch(tmp_path):
    """But for the first batch, which tells that its output is that of its last linear."""
    block, calls = counted(tmp_path, "q_proj")
    streams = Streams(tiny_rows(6, BATCH_TOKENS), paired=True)
    stages = find_flow(block.model, 0, block.module, block.linears, {}, streams.rows[:1], None)
    block.quantized = {key: block.loaded[key].clone() for key in stages[0].keys}
    (o,) = stages[1].keys
    block.replay_last(o)
    calls.clear()
    stage_moments(block, stages[1], streams)
    block.quantized[o] = block.loaded[o].clone()
    block.replay_settled()
    for stage in stages[2:]:
        stage_moments(block, stage, streams)
    block.advance_original(streams)
    assert len(calls) == 2 * 6 + 1
