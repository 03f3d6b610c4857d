"""A block, from what enters it to what leaves it: load, capture, quantize, save, advance, free.

Two ways. In order (the default): two streams of states, the original's and the quantized model's,
travel side by side; linears are taken in the order of the block's own data flow, each captured
behind the quantized ones before it and asked to make up for their errors. At once: there is the
original's stream alone, and all linears are calibrated on what enters them there. So none depends
on the bits of others, and a splice of such quants is what a conversion with its bits would be.
"""

from collections.abc import Iterable
from functools import partial

import torch

from exl3.files import one_at_a_time
from exl3.jobs.block import Block
from exl3.jobs.experts import (
    ExpertInputs,
    expert_inputs,
    find_lacking,
    hidden_hessian,
    hidden_moments,
    input_moments,
    tell_counts,
)
from exl3.jobs.inputs import Calibration, block_hessians, stage_moments
from exl3.jobs.job import Job, encode_cost
from exl3.jobs.output_hessians import (
    OutputHessian,
    SavedHessian,
    block_output_hessians,
    load_output_hessians,
    save_output_hessians,
    with_hessians,
)
from exl3.jobs.quantize import Wanted, quantize
from exl3.jobs.routers import correct_router
from exl3.jobs.streams import SAMPLE_ROWS, Streams, enter, run_block, spread
from exl3.model.flow import Stage, find_flow
from exl3.quant.correction import Moments
from exl3.quant.hessian import Hessian


def convert_block(job: Job, i: int, streams: Streams) -> None:
    """Quantizes what is not yet quantized of block i, and moves the streams behind it."""
    job.progress.doing(f"{job.source.model.block_name(i)}, calibrating")
    block = Block.load(job.source.model, i)
    try:
        finished = [key for key in block.linears if job.work.has_layer(key)]
        job.progress.skip(sum(encode_cost(block.linears[key]) for key in finished))
        block.output_hessians = _output_hessians(job, block, set(finished))
        picked = spread(streams.rows, SAMPLE_ROWS)
        states = None if job.corrects else enter(streams.original, picked)  # a copy
        if job.corrects:
            _quantize_in_order(job, block, streams, set(finished))
        else:
            _quantize_at_once(job, block, streams, set(finished))
        for key, linear in block.linears.items():
            if key not in block.quantized:
                # If nothing ever enters it.
                quantize(job, [Wanted(key, linear, block.loaded[key])], None)
                block.settle(key, job.work)
            block.forget(key)
        if job.corrects:
            job.progress.doing(f"{block.name}, advancing")
            block.advance_quantized(streams)
            sample = streams.quantized[picked]
        else:
            block.compute_quantized()
            sample = run_block(block.model, block.i, streams.rows[picked], states)
    finally:
        block.free()
    error = relative_error(streams.original[picked], sample)
    job.progress.say(f"{block.name}: relative error {error:.4f}")
    job.progress.advance(job.forward_cost(i))


def _output_hessians(
    job: Job, block: Block, finished: set[str]
) -> dict[str, OutputHessian | SavedHessian]:
    """Of the linears that are not finished, as far as they are wanted; those that the backward pass
    has kept, or an earlier job with the same rows where --save_hessians has them."""
    missing = {k: m for k, m in with_hessians(block.linears).items() if k not in finished}
    if job.boundaries is None or not missing:
        return {}
    identity, shared = job.boundaries.identity, job.settings.save_hessians
    with one_at_a_time(shared):
        saved = load_output_hessians(shared or job.boundaries.folder, missing, identity)
        missing = {key: linear for key, linear in missing.items() if key not in saved}
        if not missing:
            return saved
        job.progress.doing(f"{block.name}, gradients")
        found = block_output_hessians(block.model, block.i, missing, job.boundaries)
        if shared:
            save_output_hessians(shared, found, identity)
    return saved | found


def _flow(block: Block, streams: Streams) -> list[Stage]:
    """The block's stages, experts last: nothing in a block waits for them."""
    part = streams.batches()[0]
    state = enter(streams.quantized if streams.paired else streams.original, part)
    stages = find_flow(
        block.model,
        block.i,
        block.module,
        block.plain_linears(),
        block.experts,
        streams.rows[part],
        state,
    )
    return sorted(stages, key=lambda stage: stage.experts)


# In order


def _quantize_in_order(job: Job, block: Block, streams: Streams, finished: set[str]) -> None:
    """Quantizes the block, moves the original's stream behind it."""
    stages = _flow(block, streams)
    for key in finished.intersection(block.plain_linears()):
        block.settle(key, job.work)
    inputs: list[tuple[Stage, ExpertInputs]] = []
    advanced = False
    for stage in stages:
        if stage.experts:
            job.progress.doing(f"{block.name}.{stage.keys[0]}, inputs")
            correct_router(block, stage, streams, job.work)
            inputs.append((stage, expert_inputs(block, stage, streams)))
        elif not finished.issuperset(stage.keys):
            last = stage is stages[-1]
            again = job.thrift.replay and not last
            if again and len(stage.keys) == 1:
                block.replay_last(stage.keys[0])
            _quantize_stage(job, block, stage, streams, last)
            advanced = last
            if again:
                block.replay_settled()
    if not advanced:
        job.progress.doing(f"{block.name}, advancing the original")
        block.advance_original(streams)
    for key in block.plain_linears():
        if key in block.quantized:
            block.forget(key)
    for stage, entering in inputs:
        entering.lacking = find_lacking(block, stage, entering, streams)
        _quantize_experts(job, block, stage, entering)


def _quantize_stage(job: Job, block: Block, stage: Stage, streams: Streams, last: bool) -> None:
    """last: nothing will be asked of the original any more, whose stream moves behind the block."""
    job.progress.doing(f"{stage.keys[0]}, calibrating")
    _quantize_alike(job, block, stage.keys, stage_moments(block, stage, streams, last))
    for key in stage.keys:
        block.settle(key, job.work)


def _quantize_alike(job: Job, block: Block, keys: Iterable[str], seen: Moments | Hessian) -> None:
    """Quantizes linears with the same input."""
    wanted = [
        Wanted(key, block.linears[key], block.loaded[key], partial(block.output_hessian, key))
        for key in keys
    ]
    quantize(job, wanted, Calibration.of(seen))


# At once


def _quantize_at_once(job: Job, block: Block, streams: Streams, finished: set[str]) -> None:
    """Quantizes the block; before that moves the original's stream behind it."""
    missing = [key for key in block.plain_linears() if key not in finished]
    flow = _flow(block, streams) if block.experts else []
    stages = [stage for stage in flow if stage.experts]
    inputs = [(stage, expert_inputs(block, stage, streams)) for stage in stages]
    hessians = block_hessians(block, missing, streams) if missing else []
    job.progress.doing(f"{block.name}, advancing")
    block.advance_original(streams)
    for keys, hessian in hessians:
        _quantize_alike(job, block, keys, hessian)
    for stage, entering in inputs:
        _quantize_experts(job, block, stage, entering)


# Experts, in both ways


def _quantize_experts(job: Job, block: Block, stage: Stage, inputs: ExpertInputs) -> None:
    tell_counts(job, f"{block.name}.{stage.keys[0]}", inputs.counts())
    keys = block.keys()
    for e in range(inputs.experts.num_experts):
        parts = {role: keys[linear] for role, linear in inputs.experts.linears(e).items()}
        before = inputs.output(e)
        if not all(job.work.has_layer(key) for key in parts.values()):
            _quantize_expert(job, block, inputs, e, parts)
        for key in parts.values():
            block.settle(key, job.work)
            block.forget(key)
        inputs.settle(e, before)


def _quantize_expert(
    job: Job, block: Block, inputs: ExpertInputs, e: int, parts: dict[str, str]
) -> None:
    """Gate and up; then down, in order behind them as they are quantized by then."""
    entering = [key for role, key in parts.items() if role != "down"]
    job.progress.doing(f"{entering[0]}, calibrating")
    _quantize_alike(job, block, entering, input_moments(inputs, e))
    job.progress.doing(f"{parts['down']}, calibrating")
    if job.corrects:
        for key in entering:
            block.settle(key, job.work)
        seen = hidden_moments(inputs, e, block, entering)
    else:
        seen = hidden_hessian(inputs, e)
    _quantize_alike(job, block, [parts["down"]], seen)


def relative_error(reference: torch.Tensor, other: torch.Tensor) -> float:
    """|other - reference| / |reference|, Frobenius norms."""
    other = other.to(reference.device)
    return float((other - reference).double().norm() / reference.double().norm())
