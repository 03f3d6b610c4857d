"""Tuning: with all codes fixed, scales and norm weights move so that the quant predicts more like
its original. Some calibration rows are held out: the best step is found on them, and nothing is
kept that is not better there than before.

Two ways. The whole model at once, on KL(original || quant), where all its weights fit in memory.
Else block by block, each on its original's output, then norm and head on KL(original || quant).
"""

import time
from typing import Any

import torch

from exl3.jobs.job import Job
from exl3.jobs.streams import Streams, run_block
from exl3.jobs.tune_fits import BlockFit, Fit, TailFit, WholeFit
from exl3.jobs.tune_parts import open_block, open_tail
from exl3.jobs.tune_plan import BLOCKS, WHOLE, TuningRows, tuning_cost
from exl3.quant.tuning import Descent, descend

RATES = {WHOLE: 1e-3, BLOCKS: 1e-3}
RESULT = "result"
Tensors = dict[str, torch.Tensor]


def tune(job: Job, streams: Streams, way: str) -> None:
    """Tunes what is finished, in one of the two ways, and saves what became better.

    streams: what leaves the last block; they are not needed any more.
    """
    found = job.work.load_tuning(RESULT)
    if found is None:
        rows = TuningRows.of(job.source.rows, job.settings.seed)
        work = _tune_whole if way == WHOLE else _tune_blocks
        tensors, before, after = work(job, streams, rows)
        better = after < before
        facts = {
            "steps": job.settings.tune,
            "way": way,
            "held_out_rows": len(rows.held),
            "kld_before": before,
            "kld_after": after if better else before,
        }
        found = (tensors if better else {}), facts
        job.work.save_tuning(RESULT, *found)
    else:
        job.progress.skip(tuning_cost(job.settings, job.source, job.plan))
    _tell(job, *found)


def _tell(job: Job, tensors: Tensors, facts: dict[str, Any]) -> None:
    on = f"tuning {facts['way']}: KL divergence on {facts['held_out_rows']} held-out rows"
    if tensors:
        job.progress.say(f"{on} {facts['kld_before']:.5f} before, {facts['kld_after']:.5f} after")
    else:
        job.progress.say(f"{on} {facts['kld_before']:.5f}; no step made it less, nothing changes")


def _descend(job: Job, name: str, fit: Fit, rows: TuningRows, rate: float, cost: float) -> Descent:
    """The descent of a fit from where it was saved last. cost: of all its steps."""
    steps, descent = job.settings.tune, _load_descent(job, name, fit.gains.size)
    job.progress.skip(cost * descent.step / steps)

    def done(descent: Descent) -> None:
        job.progress.advance(cost / steps)
        last = descent.step == steps
        if last or time.monotonic() - job.saved >= job.settings.checkpoint_interval:
            _save_descent(job, name, descent)
            job.saved = time.monotonic()

    descend(
        descent,
        steps,
        rate,
        lambda step, moved: fit.gradient(rows.of_step(step), moved),
        lambda moved: fit.error(rows.held, moved),
        done,
    )
    return descent


def _load_descent(job: Job, name: str, size: int) -> Descent:
    found = job.work.load_tuning(name)
    return Descent.begin(size) if found is None else Descent(**found[0], **found[1])


def _save_descent(job: Job, name: str, descent: Descent) -> None:
    state = vars(descent)
    tensors = {key: x for key, x in state.items() if isinstance(x, torch.Tensor)}
    facts = {key: x for key, x in state.items() if key not in tensors}
    job.work.save_tuning(name, tensors, facts)


# The whole model


def _tune_whole(job: Job, streams: Streams, rows: TuningRows) -> tuple[Tensors, float, float]:
    """The tuned tensors; the KL divergence on held-out rows before and after."""
    job.progress.doing("tuning the whole model")
    streams.quantized = None
    fit = WholeFit(job, streams.original)
    try:
        cost = tuning_cost(job.settings, job.source, job.plan)
        descent = _descend(job, "model", fit, rows, RATES[WHOLE], cost)
    finally:
        fit.close()
    return fit.gains.tuned(descent.best), descent.first, descent.least


# Block by block


def _tune_blocks(job: Job, streams: Streams, rows: TuningRows) -> tuple[Tensors, float, float]:
    """The tuned tensors; the KL divergence on held-out rows before and after."""
    model = job.source.model
    untuned = streams.quantized[rows.held] if streams.paired else None
    streams.quantized = streams.original = None
    quantized = original = None
    tuned: Tensors = {}
    for i in range(model.num_blocks):
        job.progress.doing(f"tuning {model.block_name(i)}")
        opened = open_block(job, i)
        opened.part.compute_original()
        original = _advance(job, streams, i, original)
        opened.part.compute_tuned()
        if not streams.paired:
            untuned = run_block(model, i, job.source.rows[rows.held], untuned)
        fit = BlockFit(job, i, opened, quantized, original)
        cost = tuning_cost(job.settings, job.source, job.plan) / model.num_blocks
        descent = _descend(job, f"block.{i}", fit, rows, RATES[BLOCKS], cost)
        tuned |= fit.gains.tuned(descent.best)
        opened.part.set(fit.gains.rounded(descent.best))
        quantized = _advance(job, streams, i, quantized)
        opened.part.close()
        model.free_block(i)
    opened = open_tail(job)
    fit = TailFit(job, opened, quantized, original)
    descent = _descend(job, "tail", fit, rows, RATES[BLOCKS], 0)
    before = fit.error_of(rows.held, untuned, torch.zeros(fit.gains.size))
    opened.part.close()
    model.free_tail()
    return tuned | fit.gains.tuned(descent.best), before, descent.least


def _advance(job: Job, streams: Streams, i: int, states: torch.Tensor | None) -> torch.Tensor:
    """Moves the states of all rows behind block i, where they are."""
    model, rows = job.source.model, job.source.rows
    if states is None:
        hidden = model.config.get_text_config(decoder=True).hidden_size
        return run_block(model, i, rows, None, out=streams.empty(*rows.shape, hidden))
    return run_block(model, i, rows, states, out=states)
