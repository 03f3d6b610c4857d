"""The experts of a block, one after another: what enters them, and what each is asked to be."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from exl3 import parallel
from exl3.jobs.block import Block
from exl3.jobs.inputs import tokens
from exl3.jobs.job import Job
from exl3.jobs.streams import BATCH_TOKENS, Streams, spread, waves
from exl3.model.capture import Taps
from exl3.model.experts import LinearExperts
from exl3.model.flow import Stage
from exl3.quant.correction import Moments
from exl3.quant.hessian import Hessian

FAIR = 0.1  # of its fair share of tokens: an expert with less is reported
# All tokens together count for an expert as so many of its own for every dimension, so that it is
# not fitted too closely to those few.
SHARED_TOKENS = 8.0


@dataclass
class ExpertInputs:
    """What enters the experts of a block, for all calibration tokens."""

    experts: LinearExperts
    # (tokens, hidden): in the quantized model, where that is followed, else in the original.
    entering: torch.Tensor
    index: torch.Tensor  # (tokens, k): the experts a token is sent to there
    share: torch.Tensor  # (tokens, k): by how much their outputs count
    # (tokens, hidden): in the original, where both are followed.
    original: torch.Tensor | None = None
    # (tokens, hidden): what the experts' output would have to add for the block to give what the
    # original's gives; None where that is not followed or not to be seen.
    lacking: torch.Tensor | None = None
    everyone: Moments | Hessian | None = None  # of what enters gate and up, all tokens alike

    @property
    def device(self) -> torch.device:
        """Where the experts compute; what enters them may lie elsewhere."""
        return self.experts.linears(0)["down"].weight.device

    def counts(self) -> list[int]:
        """Tokens that routing sends to each expert."""
        return torch.bincount(self.index.flatten(), minlength=self.experts.num_experts).tolist()

    def shares(self, e: int) -> torch.Tensor:
        """(tokens,): by how much expert e counts for each token, 0 where it is not asked."""
        return (self.share * (self.index == e)).sum(1)

    def output(self, e: int) -> torch.Tensor | None:
        """What expert e gives at present for the tokens that ask it; None if nothing is lacking."""
        if self.lacking is None:
            return None
        x = self.entering[self.shares(e) != 0]
        down = self.experts.linears(e)["down"]

        def given(x: torch.Tensor) -> torch.Tensor:
            return down(self.experts.hidden(e, x.to(down.weight.device)))

        return torch.cat(parallel.each(given, x.split(BATCH_TOKENS)))

    def settle(self, e: int, before: torch.Tensor | None) -> None:
        """Takes expert e's change, from its output `before` it was quantized, into account."""
        if before is not None:
            shares = self.shares(e)
            asked = shares != 0
            change = (before - self.output(e)).to(self.lacking.device)
            self.lacking[asked] += shares[asked, None] * change


def expert_inputs(block: Block, stage: Stage, streams: Streams) -> ExpertInputs:
    """What enters the experts of a stage; of two streams the quantized model's routing decides."""
    experts = block.experts[stage.keys[0]]
    with Taps(block.model, block.i, [experts]) as taps:
        if not streams.paired:
            run = partial(block.run_original, run=taps.run)
            return ExpertInputs(experts, *_all_tokens(streams, run, 3))
        quantized = _all_tokens(streams, partial(block.run_quantized, run=taps.run), 3)
        original = _all_tokens(streams, partial(block.run_original, run=taps.run), 1)
    return ExpertInputs(experts, *quantized, *original)


def find_lacking(
    block: Block, stage: Stage, inputs: ExpertInputs, streams: Streams
) -> torch.Tensor | None:
    """What the experts' output lacks, (tokens, hidden), while none of them is quantized yet.

    streams.original is behind the block already, streams.quantized in front of it.
    """
    if stage.residual is None:
        return None
    lacking = streams.empty(*streams.rows.shape, streams.original.shape[-1])
    for wave in streams.waves():
        run = partial(block.model.run_block, block.i)
        for part, out in zip(wave, block.run_quantized(streams, wave, run), strict=True):
            lacking[part] = (streams.original[part] - out.to(lacking.device)) / stage.residual.scale
    return tokens(lacking)


def _all_tokens(
    streams: Streams, run: Callable[[Streams, list[slice]], list[Any]], arguments: int
) -> list[torch.Tensor]:
    """The first arguments of the experts' calls, of all tokens: each (tokens, ...)."""
    found: list[torch.Tensor] = []
    cols = streams.rows.shape[1]
    for wave in streams.waves():
        for part, calls in zip(wave, run(streams, wave), strict=True):
            seen = [tokens(a) for a in calls[0][:arguments]]
            if not found:
                total = streams.rows.numel()
                found = [streams.empty(total, a.shape[1], dtype=a.dtype) for a in seen]
            for a, out in zip(seen, found, strict=True):
                out[part.start * cols : part.stop * cols] = a
    return found


def input_moments(inputs: ExpertInputs, e: int) -> Moments | Hessian:
    """Of what enters expert e's gate and up projections, by `token_weights`: its own tokens, and
    all together, which are summed up once for all experts."""
    if inputs.everyone is None:
        everyone = torch.arange(len(inputs.entering), device=inputs.entering.device)
        inputs.everyone = _input_moments(inputs, everyone, None)
    shares = inputs.shares(e)
    own = (shares != 0).nonzero()[:, 0]
    moments = _input_moments(inputs, own, own_weights(shares)[own])
    size, total = inputs.entering.shape[1], len(shares)
    moments.add_scaled(inputs.everyone, SHARED_TOKENS * size / total)
    return moments


def _input_moments(
    inputs: ExpertInputs, picked: torch.Tensor, weights: torch.Tensor | None
) -> Moments | Hessian:
    """Of some tokens, by their numbers (n,), each counting as much as weights (n,) say."""
    size, device = inputs.entering.shape[1], inputs.device
    seen = Hessian(size, device) if inputs.original is None else Moments(size, device=device)
    for a in range(0, len(picked), BATCH_TOKENS):
        part = picked[a : a + BATCH_TOKENS]
        w = None if weights is None else weights[a : a + BATCH_TOKENS]
        if isinstance(seen, Hessian):
            seen.add(inputs.entering[part], w)
        else:
            seen.add(inputs.entering[part], inputs.original[part], weights=w)
    return seen


def hidden_hessian(inputs: ExpertInputs, e: int) -> Hessian:
    """Of what enters expert e's down projection, as the expert computes at present."""
    size = inputs.experts.linears(e)["down"].in_features
    weights = token_weights(inputs.shares(e), size)
    hessian = Hessian(size, inputs.device)
    for wave in _waves(weights):
        for part, x in zip(wave, _hidden(inputs, e, inputs.entering, wave), strict=True):
            hessian.add(x, weights[part])
    return hessian


def hidden_moments(inputs: ExpertInputs, e: int, block: Block, entering: list[str]) -> Moments:
    """Of what enters expert e's down projection as it is quantized, and as it was.

    Where it is known what the experts lack, the expert is asked for its own original output and
    for all of that besides, as far as it counts: those after it are asked for what is left. Else
    it is asked for what it would give in the original.

    entering: the keys of its gate and up projections, which take turns in computing as they are
    quantized and as they were.
    """
    shares, down = inputs.shares(e), inputs.experts.linears(e)["down"]
    weights = token_weights(shares, down.in_features)
    asking = own_weights(shares) / weights.where(weights > 0, 1.0) / shares.where(shares != 0, 1.0)
    outputs = None if inputs.lacking is None else down.out_features
    moments = Moments(down.in_features, outputs, inputs.device)
    source = inputs.original if inputs.lacking is None else inputs.entering
    for wave in _waves(weights):
        block.compute_original(entering)
        originals = _hidden(inputs, e, source, wave)
        block.compute_quantized(entering)
        quantized = _hidden(inputs, e, inputs.entering, wave)
        for part, xq, xf in zip(wave, quantized, originals, strict=True):
            residual = None
            if inputs.lacking is not None:
                residual = inputs.lacking[part] * asking[part, None]
            moments.add(xq, xf, residual, weights[part])
    return moments


def _hidden(
    inputs: ExpertInputs, e: int, x: torch.Tensor, wave: list[torch.Tensor]
) -> list[torch.Tensor]:
    return parallel.each(lambda part: inputs.experts.hidden(e, x[part].to(inputs.device)), wave)


def _waves(weights: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """The tokens that count, by their numbers: in batches, as many as run at the same time."""
    return waves(list(weights.nonzero()[:, 0].split(BATCH_TOKENS)))


def token_weights(shares: torch.Tensor, size: int) -> torch.Tensor:
    """How much each token says about an expert, from its shares (tokens,): 0 where it is not asked.

    Its own tokens count by the square of their share, as errors of its output do in the block's;
    on average 1. So that an expert with few of them is not fitted to those alone, others count
    besides, evenly spread over all, as SHARED_TOKENS * size of its own: a poorly fed Hessian is
    that of all tokens, more or less, and a dead expert's is exactly that. (All of them instead of
    as many as they count for: the same KLD on ref-moe, and with 256 experts 30 times the time.)
    """
    weights = own_weights(shares)
    besides = spread(shares, int(SHARED_TOKENS * size)).to(shares.device)
    weights[besides] += SHARED_TOKENS * size / len(besides)
    return weights


def own_weights(shares: torch.Tensor) -> torch.Tensor:
    """How much its own tokens say about an expert, (tokens,): squared shares, on average 1."""
    own = shares.square()
    asked = own > 0
    return own / own[asked].mean() if asked.any() else own


def tell_counts(job: Job, name: str, counts: list[int]) -> None:
    """Tells how many tokens routing sent to each expert, and keeps it in the work folder."""
    job.work.save_counts(name, counts)
    ordered = sorted(counts)
    fair = sum(counts) / len(counts)
    job.progress.say(
        f"{name}: {ordered[0]:,} to {ordered[-1]:,} tokens an expert, "
        f"median {ordered[len(ordered) // 2]:,}"
    )
    poor = [e for e, count in enumerate(counts) if count < FAIR * fair]
    if poor:
        few = ", ".join(f"{e} ({counts[e]:,})" for e in poor[:8]) + ", ..." * (len(poor) > 8)
        job.progress.say(
            f"   WARNING: {len(poor)} experts got less than a tenth of their fair share of "
            f"{fair:,.0f} tokens: {few}; they are calibrated mostly on all tokens. More or other "
            "calibration text (-cr, -c) may reach them"
        )
