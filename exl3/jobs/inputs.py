"""What enters the linears of a block, summed up over the calibration rows."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F

from exl3 import parallel
from exl3.format.hadamard import HADAMARD
from exl3.jobs.block import Block
from exl3.jobs.output_hessians import WHOLE_HEAD
from exl3.jobs.streams import TAIL_TOKENS, Streams, spread, waves
from exl3.model.capture import Capture, Captured, Taps, head_inputs
from exl3.model.flow import Stage
from exl3.model.streamed import StreamedModel
from exl3.quant.correction import Correction, Moments, trust
from exl3.quant.hessian import Hessian

# Of a correction: with 2.5%, as for codes, it follows the calibration rows too closely.
DAMPING = 0.1


@dataclass
class Calibration:
    """What the calibration rows say about linears that share their input."""

    hessian: torch.Tensor  # (in, in)
    moments: Moments | None = None  # where they are to make up for the errors before them
    correction: Correction | None = None

    @classmethod
    def of(cls, seen: Moments | Hessian) -> "Calibration":
        if isinstance(seen, Hessian):
            return cls(seen.mean())
        hessian = seen.hessian.mean()
        return cls(hessian, seen, Correction(hessian, DAMPING))

    def target(self, weight: torch.Tensor) -> torch.Tensor | None:
        """What a linear with the original weight (in, out) is asked to be; None: just that.

        What few tokens say is believed in part: with too few, a correction at 8 bits harms.
        """
        if self.moments is None:
            return None
        device, residual = weight.device, self.moments.residual()
        residual = None if residual is None else residual.to(device)
        shift = self.moments.shift().to(device)
        strength = trust(self.moments.hessian.weight, len(self.hessian))
        return self.correction.to(device).target(weight, shift, residual, strength)

    @property
    def notes(self) -> list[str]:
        """What the user should know."""
        return self.correction.notes if self.correction else []


def block_hessians(
    block: Block, keys: list[str], streams: Streams
) -> list[tuple[tuple[str, ...], Hessian]]:
    """Hessians of the inputs of some of a block's linears, one for those that share their input.

    All in one go, in the original.
    """
    linears = {key: block.linears[key] for key in keys}
    with Capture(block.model, block.i, linears) as capture:
        return sum_hessians(
            captured
            for wave in streams.waves()
            for _, captured in block.run_original(streams, wave, capture.run)
        )


def sum_hessians(runs: Iterable[list[Captured]]) -> list[tuple[tuple[str, ...], Hessian]]:
    """Hessians of what was captured in several runs, one for linears that share their input."""
    hessians: dict[tuple[str, ...], Hessian] = {}
    for captured in runs:
        for group in captured:
            if group.names not in hessians:
                hessians[group.names] = Hessian(group.inputs.shape[-1], group.inputs.device)
            hessians[group.names].add(group.inputs)
    return list(hessians.items())


def stage_moments(block: Block, stage: Stage, streams: Streams, advance: bool = False) -> Moments:
    """What enters a stage in the quantized model, what enters it in the original, and what the
    residual stream lacks there.

    advance: moves the original's stream behind the block, in the same forwards.
    """
    linear = block.linears[stage.keys[0]]
    places = [linear]
    if stage.residual is not None:
        places.insert(0, block.module.get_submodule(stage.residual.place))
    outputs = linear.out_features if len(places) > 1 else None
    moments = Moments(linear.in_features, outputs, block.model.device)
    behind = block.behind(streams, streams.original) if advance else None
    with Taps(block.model, block.i, places) as taps:
        for wave in streams.waves():
            run = taps.run_through if advance else taps.run
            originals = block.run_original(streams, wave, run)
            quantized = block.run_quantized(streams, wave, taps.run)
            for part, of, q in zip(wave, originals, quantized, strict=True):
                of, output = of if advance else (of, None)
                residual = None
                if stage.residual is not None:
                    residual = tokens(of[0][0] - q[0][0]) / stage.residual.scale
                moments.add(tokens(q[-1][0]), tokens(of[-1][0]), residual)
                if advance:
                    behind[part] = output
    if advance:
        streams.original = behind
    return moments


def head_hessian(
    model: StreamedModel, rows: torch.Tensor, states: torch.Tensor, parts: list[slice]
) -> Hessian:
    """Hessian of what enters the head, from the last block's output: states (rows, cols, hidden).

    parts: slices of the rows, for one forward each.
    """
    hessian = Hessian(states.shape[-1], model.device)
    for wave in waves(parts):
        for x in _head_inputs(model, rows, states, wave):
            hessian.add(x)
    return hessian


def head_moments(model: StreamedModel, streams: Streams) -> Moments:
    """What enters the head in the quantized model, and in the original."""
    moments = Moments(streams.quantized.shape[-1], device=model.device)
    for wave in streams.waves():
        quantized = _head_inputs(model, streams.rows, streams.quantized, wave)
        originals = _head_inputs(model, streams.rows, streams.original, wave)
        for q, of in zip(quantized, originals, strict=True):
            moments.add(q, of)
    return moments


def head_output_hessian(model: StreamedModel, streams: Streams, rows: int) -> torch.Tensor:
    """The loss's second moments by the head's outputs, from some evenly spread rows.

    Their expectation is known, without sampling: diag(p) - p p^T with the original's predictions
    p. All of it, (out, out), for heads of WHOLE_HEAD outputs at most; of larger ones the blocks of
    128 outputs, which the Hadamard transform mixes: (blocks, 128, 128).
    """
    picked = spread(streams.rows, rows).tolist()
    states = streams.original
    cols = streams.rows.shape[1]
    pieces = [
        (row, slice(a, a + TAIL_TOKENS)) for row in picked for a in range(0, cols, TAIL_TOKENS)
    ]

    def predictions(piece: tuple[int, slice]) -> torch.Tensor:
        row, part = piece
        logits = model.run_tail(streams.rows[row, part][None], states[row, part][None])
        return logits[0].float().softmax(-1)

    found = (parallel.each(predictions, wave) for wave in waves(pieces))
    whole = model.head()[1].out_features <= WHOLE_HEAD
    return (_whole_moments if whole else _block_moments)(found) / (len(picked) * cols)


def _whole_moments(predictions: Iterable[list[torch.Tensor]]) -> torch.Tensor:
    """Sum over tokens of diag(p) - p p^T, of lists of p (tokens, out)."""
    products, total = None, None
    for p in chain.from_iterable(predictions):
        if products is None:
            products, total = Hessian(p.shape[1], p.device), torch.zeros_like(p[0])
        products.add(p)
        total += p.sum(0)
    moments = products.mean().mul_(-products.tokens)
    moments.diagonal().add_(total)
    return moments


def _block_moments(predictions: Iterable[list[torch.Tensor]]) -> torch.Tensor:
    """Of that sum the blocks of 128."""

    def blocks(p: torch.Tensor) -> torch.Tensor:
        own = F.pad(p, (0, -p.shape[1] % HADAMARD)).unflatten(1, (-1, HADAMARD)).transpose(0, 1)
        return torch.diag_embed(own.sum(1)) - own.mT @ own

    total = None
    for wave in predictions:
        for found in parallel.each(blocks, wave):
            total = found if total is None else total.add_(found)
    return total


def _head_inputs(
    model: StreamedModel, rows: torch.Tensor, states: torch.Tensor, wave: list[slice]
) -> list[torch.Tensor]:
    return parallel.each(lambda part: head_inputs(model, rows[part], states[part]), wave)


def tokens(x: torch.Tensor) -> torch.Tensor:
    """(..., features) → (tokens, features)."""
    return x.reshape(-1, x.shape[-1])
