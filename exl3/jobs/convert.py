"""A conversion: source, rows, then block by block: load, capture, quantize, save, advance, free;
last, the head, tuning if it is wanted, and the files. Every step may be cut short at any moment and
done again."""

import time

import torch

from exl3 import parallel
from exl3.devices import pick_device
from exl3.jobs import out_folder, output
from exl3.jobs.blocks import convert_block
from exl3.jobs.boundaries import Boundaries, boundary_gradients, boundary_work
from exl3.jobs.check import check_quant
from exl3.jobs.estimate import estimate, refuse_full_disks
from exl3.jobs.inputs import Calibration, head_hessian, head_moments, head_output_hessian
from exl3.jobs.job import Job, total_cost
from exl3.jobs.output_hessians import all_saved
from exl3.jobs.plan import UNQUANTIZED, Plan, make_plan
from exl3.jobs.quantize import quantize
from exl3.jobs.settings import Request, Settings, forget_job, save_settings
from exl3.jobs.source import Source, open_model, open_source
from exl3.jobs.stored import refuse_what_cannot_be_stored
from exl3.jobs.streams import Streams
from exl3.jobs.thrift import Thrift, choose_thrift
from exl3.jobs.tune import tune
from exl3.jobs.tune_plan import tuning_cost, tuning_way
from exl3.jobs.workdir import WorkDir
from exl3.memory import Spill
from exl3.progress import Progress


def convert(request: Request) -> None:
    """Does what is left of a conversion. UserError for bad input."""
    settings = request.settings
    work = WorkDir(settings.work_dir)
    with work.locked(), parallel.one_thread_per_op():
        device, note = pick_device(settings.devices)
        for line in (*request.notes, *filter(None, [note])):
            print(line)
        out_folder.refuse_strangers(settings.out_dir)
        if request.fresh:
            forget_job(work.path)
            save_settings(settings)
        source = open_source(settings, work, device)
        save_settings(settings)
        if out_folder.is_complete(settings.out_dir, source.job_id):
            print(f"{settings.out_dir} is complete already")
            return check_quant(settings, source)
        plan = make_plan(settings, source.model)
        thrift = choose_thrift(settings, source.model, plan, len(source.rows))
        refuse_full_disks(settings, source.model, plan, len(source.rows), thrift)
        way = tuning_way(settings, work, source, plan, thrift) if settings.tune else None
        _introduce(settings, source, plan, request.resumed)
        if thrift != Thrift():
            print(f"  memory is short: {thrift}")
        if not request.resumed:
            refuse_what_cannot_be_stored(settings, source.model, plan)
        total = total_cost(source, plan) + tuning_cost(settings, source, plan)
        source.model.load_embedding()
        boundaries = trace_back(settings, work, source) if settings.hessian == "kron" else None
        with Progress(total, "Converting") as progress:
            saved = time.monotonic()
            job = Job(settings, work, source, plan, progress, thrift, boundaries, saved)
            streams = convert_blocks(job)
            convert_head(job, streams)
            if way is not None:
                tune(job, streams, way)
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


def trace_back(settings: Settings, work: WorkDir, source: Source) -> Boundaries:
    """The original's gradients at the boundaries of its blocks, on some of the rows; none are made
    where --save_hessians has all that is made of them."""
    rows, model = source.rows, source.model
    count = min(settings.hessian_rows, len(rows))
    picked = rows[torch.linspace(0, len(rows) - 1, count).long()]
    boundaries = Boundaries(work.path / "gradients", model, picked, settings.seed)
    linears = {k: m for i in range(model.num_blocks) for k, m in model.block_linears(i).items()}
    if settings.save_hessians and all_saved(settings.save_hessians, linears):
        return boundaries
    with Progress(boundary_work(model, count), "Tracing back") as progress:
        boundary_gradients(model, boundaries, progress)
    return boundaries


def convert_blocks(job: Job) -> Streams:
    """All blocks, from the last saved states on. Returns what leaves the last block."""
    streams = Streams(job.source.rows, paired=job.corrects)
    if job.thrift.spill:
        streams.spill = Spill(job.work.path)
    first = job.work.load_states(streams)
    if any(m.block < first and not job.work.has_layer(m.key) for m in job.plan.modules):
        first, streams.quantized, streams.original = 0, None, None  # a layer was lost
    job.progress.skip(sum(job.block_cost(i) for i in range(first)))
    for i in range(first, job.source.model.num_blocks):
        convert_block(job, i, streams)
        last = i + 1 == job.source.model.num_blocks
        if last or time.monotonic() - job.saved >= job.settings.checkpoint_interval:
            job.progress.doing("saving the state")
            job.work.save_states(i + 1, streams)
            job.saved = time.monotonic()
    return streams


def convert_head(job: Job, streams: Streams) -> None:
    """Quantizes the head, on what enters it."""
    model = job.source.model
    key, head = model.head()
    if key not in job.plan.bits or job.work.has_layer(key):
        return
    job.progress.doing("the head, calibrating")
    model.load_tail()
    seen = (head_moments if job.corrects else head_hessian)(model, streams)
    by_outputs = None
    if job.settings.hessian == "kron":
        by_outputs = head_output_hessian(model, streams, job.settings.hessian_rows)
    quantize(job, key, head, head.weight, Calibration.of(seen), by_outputs)
    model.free_tail()


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
