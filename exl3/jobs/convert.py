"""A conversion: source, rows, then block by block: load, capture, quantize, save, advance, free;
last, the head and the files. Every step may be cut short at any moment and done again."""

import time
from dataclasses import dataclass

import torch

from exl3 import parallel
from exl3.devices import pick_device
from exl3.format.layer import decode_layer, padded
from exl3.jobs import output
from exl3.jobs.blocks import (
    block_hessians,
    head_hessian,
    quantize_and_save,
    relative_error,
    run_block,
    sample,
)
from exl3.jobs.check import check_quant
from exl3.jobs.estimate import estimate, refuse_full_disks
from exl3.jobs.plan import UNQUANTIZED, Plan, make_plan
from exl3.jobs.settings import Request, Settings, forget_job, save_settings
from exl3.jobs.source import Source, open_model, open_source
from exl3.jobs.stored import refuse_what_cannot_be_stored
from exl3.jobs.workdir import WorkDir
from exl3.progress import Progress
from exl3.quant.hessian import Hessian


@dataclass
class Job:
    """What every step of a conversion needs to know."""

    settings: Settings
    work: WorkDir
    source: Source
    plan: Plan
    progress: Progress
    saved: float = 0.0  # when the states were saved last


def convert(request: Request) -> None:
    """Does what is left of a conversion. UserError for bad input."""
    settings = request.settings
    work = WorkDir(settings.work_dir)
    with work.locked(), parallel.one_thread_per_op():
        device, note = pick_device(settings.devices)
        for line in (*request.notes, *filter(None, [note])):
            print(line)
        output.refuse_strangers(settings)
        if request.fresh:
            forget_job(work.path)
            save_settings(settings)
        source = open_source(settings, work, device)
        save_settings(settings)
        if output.is_complete(settings, source.job_id):
            print(f"{settings.out_dir} is complete already")
            return check_quant(settings, source)
        plan = make_plan(settings, source.model)
        refuse_full_disks(settings, source.model, plan, len(source.rows))
        _introduce(settings, source, plan, request.resumed)
        if not request.resumed:
            refuse_what_cannot_be_stored(settings, source.model, plan)
        with Progress(_total_cost(source, plan), "Converting") as progress:
            job = Job(settings, work, source, plan, progress, time.monotonic())
            source.model.load_embedding()
            states = convert_blocks(job)
            convert_head(job, states)
            progress.doing("writing the model")
            written = output.write(settings, work, source, plan)
        print(f"Wrote {settings.out_dir}: {written}")
        check_quant(settings, source)


def dry_run(request: Request) -> None:
    """Tells what a conversion will make and take, and does nothing."""
    for line in request.notes:
        print(line)
    with parallel.one_thread_per_op():
        model = open_model(request.settings, pick_device(request.settings.devices)[0])
        print(estimate(request.settings, model, make_plan(request.settings, model)).text())


def convert_blocks(job: Job) -> torch.Tensor:
    """All blocks, from the last saved states on. Returns what leaves the last block."""
    first, states = job.work.load_states()
    job.progress.skip(sum(_block_cost(job, i) for i in range(first)))
    for i in range(first, job.source.model.num_blocks):
        states = convert_block(job, i, states)
        last = i + 1 == job.source.model.num_blocks
        if last or time.monotonic() - job.saved >= job.settings.checkpoint_interval:
            job.progress.doing("saving the state")
            job.work.save_states(i + 1, states)
            job.saved = time.monotonic()
    return states


def convert_block(job: Job, i: int, states: torch.Tensor | None) -> torch.Tensor:
    """Quantizes what is not yet quantized of block i; returns what leaves the quantized block."""
    model, rows = job.source.model, job.source.rows
    name = model.block_name(i)
    job.progress.doing(f"{name}, calibrating")
    model.load_block(i)
    linears = model.block_linears(i)
    picked = sample(rows)
    reference = run_block(model, i, rows[picked], None if states is None else states[picked])
    missing = {key: linear for key, linear in linears.items() if not job.work.has_layer(key)}
    job.progress.skip(sum(_encode_cost(linears[key]) for key in linears if key not in missing))
    if missing:
        for keys, hessian in block_hessians(model, i, missing, rows, states):
            for key in keys:
                _quantize(job, key, linears[key], hessian)
    for key, linear in linears.items():
        if not job.work.has_layer(key):  # nothing ever enters it
            _quantize(job, key, linear, None)
        weight = decode_layer(job.work.load_layer(key))
        linear.weight.data = weight[: linear.in_features, : linear.out_features].T.contiguous()
    job.progress.doing(f"{name}, advancing")
    states = run_block(model, i, rows, states, out=states)
    model.free_block(i)
    error = relative_error(reference, states[picked])
    job.progress.say(f"{name}: relative error {error:.4f}")
    job.progress.advance(_forward_cost(job, i))
    return states


def convert_head(job: Job, states: torch.Tensor) -> None:
    """Quantizes the head, on what enters it."""
    model = job.source.model
    key, head = model.head()
    if key not in job.plan.bits or job.work.has_layer(key):
        return
    job.progress.doing("the head, calibrating")
    model.load_tail()
    hessian = head_hessian(model, job.source.rows, states)
    _quantize(job, key, head, hessian)
    model.free_tail()


def _quantize(job: Job, key: str, linear: torch.nn.Linear, hessian: Hessian | None) -> None:
    quantize_and_save(
        job.settings, job.work, job.progress, key, linear, hessian, job.plan.bits[key]
    )
    job.progress.advance(_encode_cost(linear))


def _introduce(settings: Settings, source: Source, plan: Plan, resumed: bool) -> None:
    """Tells what will be done."""
    rows, cols = source.rows.shape
    print(f"{'Resuming' if resumed else 'Converting'} {settings.in_dir}")
    head = "unquantized" if settings.head_bits == UNQUANTIZED else settings.head_bits
    print(
        f"  {plan.average:.3f} bits per weight ({settings.bits:g} asked), head {head}, "
        f"codebook {settings.codebook}; {source.model.num_blocks} blocks, {plan.weights:,} weights"
    )
    print(f"  {rows} calibration rows of {cols} tokens")
    if rows < settings.cal_rows:
        print(f"  {settings.cal_file} holds no more rows than that ({settings.cal_rows} asked)")
    if settings.verbose:
        print(f"  work folder {settings.work_dir}, {parallel.threads()} threads")
        for key in sorted(source.model.dropped_keys):
            print(f"  not part of the model, left out: {key}")
    elif dropped := source.model.dropped_keys:
        print(f"  {len(dropped)} tensors are not part of the model and left out (-v lists them)")


# Rough costs, to tell how much is left: only their ratios matter. A weight's search takes about
# as long as its part in the forwards of 20,000 tokens.
ENCODE = 1.0
TOKEN = 1 / 20_000


def _encode_cost(linear: torch.nn.Linear) -> float:
    return ENCODE * padded(linear.in_features) * padded(linear.out_features)


def _forward_cost(job: Job, i: int) -> float:
    weights = sum(m.weights for m in job.plan.modules if m.block == i)
    return TOKEN * job.source.rows.numel() * weights


def _block_cost(job: Job, i: int) -> float:
    weights = sum(m.weights for m in job.plan.modules if m.block == i)
    return _forward_cost(job, i) + ENCODE * weights


def _total_cost(source: Source, plan: Plan) -> float:
    key, head = source.model.head()
    last = _encode_cost(head) if key in plan.bits else 0
    return plan.weights * (ENCODE + TOKEN * source.rows.numel()) + last
