"""A conversion: source, rows, then block by block: load, capture, quantize, save, advance, free;
last, the head, tuning if it is wanted, and the files. Every step may be cut short at any moment and
done again."""

import time

from exl3 import parallel
from exl3.devices import CPU, pick_devices
from exl3.errors import UserError
from exl3.format.layer import UNQUANTIZED
from exl3.jobs import out_folder, output
from exl3.jobs.blocks import convert_block
from exl3.jobs.boundaries import TRACED_ROWS
from exl3.jobs.check import check_quant
from exl3.jobs.estimate import estimate, refuse_full_disks
from exl3.jobs.inputs import Calibration, head_hessian, head_moments, head_output_hessian
from exl3.jobs.job import Job, total_cost
from exl3.jobs.plan import Plan, make_plan, shared_by_gradients
from exl3.jobs.quantize import Wanted, quantize
from exl3.jobs.routers import router_keys
from exl3.jobs.settings import Request, Settings, forget_job, make_shared, save_settings
from exl3.jobs.source import Source, open_model, open_source
from exl3.jobs.stored import refuse_what_cannot_be_stored
from exl3.jobs.streams import Streams
from exl3.jobs.thrift import choose_thrift
from exl3.jobs.trace_back import trace_back
from exl3.jobs.tune import tune
from exl3.jobs.tune_plan import tuning_cost, tuning_way
from exl3.jobs.workdir import WorkDir
from exl3.memory import Spill
from exl3.progress import Progress


def convert(request: Request) -> None:
    """Does what is left of a conversion. UserError for bad input."""
    settings = request.settings
    work = WorkDir(settings.work_dir)
    devices, note = pick_devices(settings.devices)
    with work.locked(), parallel.one_thread_per_op(), parallel.work_on(devices[0]):
        for line in (*request.notes, *filter(None, [note])):
            print(line)
        out_folder.refuse_strangers(settings.out_dir)
        if request.fresh:
            forget_job(work.path)
            save_settings(settings)
        source = open_source(settings, work, devices[0])
        save_settings(settings)
        make_shared(settings)
        if out_folder.is_complete(settings.out_dir, source.job_id):
            work.drop_gradients()
            print(f"{settings.out_dir} is complete already")
            return check_quant(settings, source)
        plan = make_plan(settings, source.model)
        thrift = choose_thrift(settings, source.model, plan, len(source.rows), devices[1:])
        refuse_full_disks(settings, source.model, plan, len(source.rows), thrift)
        way = tuning_way(settings, work, source, plan, thrift) if settings.tune else None
        _introduce(settings, source, plan, way, request.resumed)
        if not thrift.replay:
            print(f"  memory is short: {thrift}")
        if not request.resumed:
            refuse_what_cannot_be_stored(settings, source.model, plan)
        total = total_cost(settings, source, plan) + tuning_cost(settings, source, plan)
        source.model.load_embedding()
        plan, boundaries = trace_back(settings, work, source, plan)
        refuse_other_bits(work, plan)
        if shared_by_gradients(settings):
            print(f"  by the model's own gradients: {plan.shares}")
        with Progress(total, "Converting") as progress:
            saved = time.monotonic()
            job = Job(settings, work, source, plan, progress, thrift, boundaries, saved, devices)
            streams = convert_blocks(job)
            convert_head(job, streams)
            if way is not None:
                tune(job, streams, way)
            progress.doing("writing the model")
            with parallel.work_on(CPU):
                written = output.write(settings, work, source, plan)
        work.drop_gradients()
        print(f"Wrote {settings.out_dir}: {written}")
        check_quant(settings, source)


def refuse_other_bits(work: WorkDir, plan: Plan) -> None:
    """UserError if a finished layer has other bits than planned, as of another version's job."""
    for key, bits in plan.bits.items():
        if work.has_layer(key) and (found := work.layer_bits(key)) != bits:
            raise UserError(
                f"{work.layer_path(key)} has {found} bits, {bits} are planned: another version of "
                "exl3 began this job; start afresh in another work folder (-w), or with -nr"
            )


def dry_run(request: Request) -> None:
    """Tells what a conversion will make and take, and does nothing."""
    for line in request.notes:
        print(line)
    (first, *others), note = pick_devices(request.settings.devices)
    if note:
        print(note)
    with parallel.one_thread_per_op(), parallel.work_on(first):
        model = open_model(request.settings, first)
        plan = make_plan(request.settings, model)
        print(estimate(request.settings, model, plan, others).text())


def convert_blocks(job: Job) -> Streams:
    """All blocks, from the last saved states on. Returns what leaves the last block."""
    streams = Streams(job.source.rows, paired=job.corrects)
    if job.thrift.on_card:
        streams.device = job.source.model.device
    if job.thrift.spill:
        streams.spill = Spill(job.work.path)
    first = job.work.load_states(streams)
    if _lost(job, first):
        first, streams.quantized, streams.original = 0, None, None
    job.progress.skip(sum(job.block_cost(i) for i in range(first)))
    for i in range(first, job.source.model.num_blocks):
        convert_block(job, i, streams)
        last = i + 1 == job.source.model.num_blocks
        if last or time.monotonic() - job.saved >= job.settings.checkpoint_interval:
            job.progress.doing("saving the state")
            job.work.save_states(i + 1, streams)
            job.saved = time.monotonic()
    return streams


def _lost(job: Job, blocks: int) -> bool:
    """Whether anything is missing of what the first blocks gave."""
    routers = router_keys(job.source.model, blocks) if job.corrects else []
    return any(m.block < blocks and not job.work.has_layer(m.key) for m in job.plan.modules) or any(
        not job.work.has_router(key) for key in routers
    )


def convert_head(job: Job, streams: Streams) -> None:
    """Quantizes the head, on what enters it."""
    model = job.source.model
    key, head = model.head()
    if key not in job.plan.bits or job.work.has_layer(key):
        return
    job.progress.doing("the head, calibrating")
    model.load_tail()
    if job.corrects:
        seen = head_moments(model, streams)
    else:
        seen = head_hessian(model, streams.rows, streams.original, streams.batches())
    by_outputs = None
    if job.settings.hessian == "kron":
        by_outputs = head_output_hessian(model, streams, job.settings.hessian_rows or TRACED_ROWS)
    quantize(job, [Wanted(key, head, head.weight, lambda: by_outputs)], Calibration.of(seen))
    model.free_tail()


def _introduce(
    settings: Settings, source: Source, plan: Plan, way: str | None, resumed: bool
) -> None:
    """Tells what will be done."""
    rows, cols = source.rows.shape
    print(f"{'Resuming' if resumed else 'Converting'} {settings.in_dir}")
    head = "unquantized" if settings.head_bits == UNQUANTIZED else settings.head_bits
    if shared_by_gradients(settings):
        bits = f"{settings.bits:g} bits per weight on average"
    else:
        bits = f"{plan.average:.3f} bits per weight ({settings.bits:g} asked)"
    print(
        f"  {bits}, head {head}, codebook {settings.codebook}; "
        f"{source.model.num_blocks} blocks, {plan.weights:,} weights"
    )
    print(f"  {rows} calibration rows of {cols} tokens")
    if rows < settings.cal_rows:
        print(f"  {settings.cal_file} holds no more rows than that ({settings.cal_rows} asked)")
    if way is not None:
        print(f"  --tune {settings.tune}, {way}")
    if settings.verbose:
        print(f"  work folder {settings.work_dir}, {parallel.threads()} threads")
        for key in sorted(source.model.dropped_keys):
            print(f"  not part of the model, left out: {key}")
    elif dropped := source.model.dropped_keys:
        print(f"  {len(dropped)} tensors are not part of the model and left out (-v lists them)")
