"""Parts of a quant being tuned: how they are opened, and passed forwards and backwards."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from exl3 import parallel
from exl3.format.directory import stored_dtype
from exl3.format.layer import decode_layer
from exl3.jobs.job import Job
from exl3.jobs.streams import TAIL_TOKENS, batches, enter, waves
from exl3.model.streamed import TAIL, StreamedModel
from exl3.model.tunable import Gradients, TunablePart
from exl3.quant.tuning import divergence


@dataclass
class Opened:
    """A part, and the vectors of it that are tuned: key → as stored, and how many entries count."""

    part: TunablePart
    stored: dict[str, torch.Tensor]
    used: dict[str, int]


def open_block(job: Job, i: int) -> Opened:
    """Block i, loaded, with its finished layers. Close the part and free the block afterwards."""
    job.source.model.load_block(i)
    routers = job.source.model.block_routers(i).values()
    corrected = {m: job.work.load_router(key) for key, m in routers if job.work.has_router(key)}
    return _open(job, i, job.source.model.block_linears(i), corrected)


def open_tail(job: Job) -> Opened:
    """Norm and head, loaded, with the finished head if that is quantized."""
    model = job.source.model
    model.load_tail()
    key, head = model.head()
    return _open(job, TAIL, {key: head} if key in job.plan.bits else {}, {})


def _open(
    job: Job,
    which: int | str,
    linears: dict[str, nn.Linear],
    routers: dict[nn.Module, torch.Tensor],
) -> Opened:
    model = job.source.model
    norms, stored, used, weights = model.norms(which), {}, {}, {}
    for key, linear in linears.items():
        layer = job.work.load_layer(key)
        into, out = linear.in_features, linear.out_features
        weights[key] = decode_layer(layer)[:into, :out].T.contiguous()
        stored |= {f"{key}.suh": layer["suh"], f"{key}.svh": layer["svh"]}
        used |= {f"{key}.suh": into, f"{key}.svh": out}
    kept = {}
    for key in norms:
        dtype = stored_dtype(key, model.checkpoint.dtype(key), embedding=False)
        kept[key] = model.checkpoint.tensor(key).to(dtype)
        used[key] = len(kept[key])
    return Opened(TunablePart(linears, weights, norms, kept, routers), stored | kept, used)


def add_up(found: Iterable[Gradients]) -> Gradients:
    """The sum of gradients, in their order."""
    total: Gradients = {}
    for own in found:
        for key, gradient in own.items():
            total[key] = total[key] + gradient if key in total else gradient
    return total


def block_pass(
    model: StreamedModel,
    i: int,
    part: TunablePart,
    ids: torch.Tensor,
    states: torch.Tensor | None,
    at_output: Callable[[slice, torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, Gradients]:
    """Gradients at what enters block i, (rows, cols, hidden), and of its gains.

    ids (rows, cols); states: what enters; at_output(rows, output): the gradient at the output.
    """

    def batch(here: slice) -> tuple[torch.Tensor, Gradients]:
        entered, output = model.block_graph(i, ids[here], enter(states, here))
        return part.gradients(output, entered, at_output(here, output.detach()))

    results = parallel.each(batch, batches(ids))
    return torch.cat([first for first, _ in results]), add_up(own for _, own in results)


def tail_pass(
    model: StreamedModel,
    part: TunablePart,
    ids: torch.Tensor,
    states: torch.Tensor,
    original: torch.Tensor,
    follow: bool = False,
) -> tuple[float, torch.Tensor | None, Gradients]:
    """KL(original || quant), mean over tokens; with `follow` its gradients, as `block_pass`.

    ids (rows, cols); states, original: what leaves the last block of both, (rows, cols, hidden).
    Logits are made for a few tokens at a time, the original's as well: nothing keeps them.
    """
    gradient = torch.empty_like(states) if follow else None

    def reference(here: tuple[slice, slice]) -> torch.Tensor:
        return model.run_tail(ids[here], original[here])

    def piece(given: tuple[tuple[slice, slice], torch.Tensor]) -> tuple[float, Gradients]:
        here, expected = given
        if not follow:
            return divergence(expected, model.run_tail(ids[here], states[here]))[0], {}
        entered, logits = model.tail_graph(ids[here], states[here])
        kld, error = divergence(expected, logits.detach())
        gradient[here], own = part.gradients(logits, entered, error.div_(ids.numel()))
        return kld, own

    results: list[tuple[float, Gradients]] = []
    pieces = [
        (slice(row, row + 1), slice(start, start + TAIL_TOKENS))
        for row in range(len(ids))
        for start in range(0, ids.shape[1], TAIL_TOKENS)
    ]
    for wave in waves(pieces):
        part.compute_original()
        expected = parallel.each(reference, wave)
        part.compute_tuned()
        results += parallel.each(piece, zip(wave, expected, strict=True))
    kld = sum(kld for kld, _ in results) / ids.numel()
    return kld, gradient, add_up(own for _, own in results)
