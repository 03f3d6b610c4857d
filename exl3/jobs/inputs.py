"""What enters the linears of a block, summed up over the calibration rows."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from exl3 import parallel
from exl3.format.hadamard import HADAMARD
from exl3.jobs.block import Block
from exl3.jobs.streams import Streams
from exl3.model.capture import Capture, Taps, head_inputs
from exl3.model.flow import Stage
from exl3.model.streamed import StreamedModel
from exl3.quant.correction import Correction, Moments
from exl3.quant.hessian import Hessian

# Of a correction: with 2.5%, as for codes, it follows the calibration rows too closely.
DAMPING = 0.1
TAIL_TOKENS = 64  # of one piece of a row in norm and head; part of the result's definition


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
        """What a linear with the original weight (in, out) is asked to be; None: just that."""
        if self.moments is None:
            return None
        return self.correction.target(weight, self.moments.shift(), self.moments.residual())

    @property
    def notes(self) -> list[str]:
        """What the user should know."""
        return self.correction.notes if self.correction else []


def block_hessians(
    block: Block, keys: list[str], streams: Streams
) -> list[tuple[tuple[str, ...], Hessian]]:
    """Hessians of the inputs of some of a block's linears, one for those that share their input.

    All in one go: what the quantized model's states make of the block's present weights.
    """
    hessians: dict[tuple[str, ...], Hessian] = {}
    linears = {key: block.linears[key] for key in keys}

    with Capture(block.model, block.i, linears) as capture:
        for wave in streams.waves():
            for _, groups in block.run_quantized(streams, wave, capture.run):
                for group in groups:
                    size = group.inputs.shape[-1]
                    hessians.setdefault(group.names, Hessian(size)).add(group.inputs)
    return list(hessians.items())


def stage_moments(block: Block, stage: Stage, streams: Streams) -> Moments:
    """What enters a stage in the quantized model, what enters it in the original, and what the
    residual stream lacks there."""
    linear = block.linears[stage.keys[0]]
    places = [linear]
    if stage.residual is not None:
        places.insert(0, block.module.get_submodule(stage.residual.place))
    moments = Moments(linear.in_features, linear.out_features if len(places) > 1 else None)
    with Taps(block.model, block.i, places) as taps:
        for wave in streams.waves():
            originals = block.run_original(streams, wave, taps.run)
            quantized = block.run_quantized(streams, wave, taps.run)
            for of, q in zip(originals, quantized, strict=True):
                residual = None
                if stage.residual is not None:
                    residual = tokens(of[0][0] - q[0][0]) / stage.residual.scale
                moments.add(tokens(q[-1][0]), tokens(of[-1][0]), residual)
    return moments


def head_hessian(model: StreamedModel, streams: Streams) -> Hessian:
    """Hessian of what enters the head, from the last block's output."""
    hessian = Hessian(streams.quantized.shape[-1])
    for wave in streams.waves():
        for x in _head_inputs(model, streams, streams.quantized, wave):
            hessian.add(x)
    return hessian


def head_moments(model: StreamedModel, streams: Streams) -> Moments:
    """What enters the head in the quantized model, and in the original."""
    moments = Moments(streams.quantized.shape[-1])
    for wave in streams.waves():
        quantized = _head_inputs(model, streams, streams.quantized, wave)
        originals = _head_inputs(model, streams, streams.original, wave)
        for q, of in zip(quantized, originals, strict=True):
            moments.add(q, of)
    return moments


def head_output_hessian(model: StreamedModel, streams: Streams, rows: int) -> torch.Tensor:
    """The loss's second moments by the head's outputs, from some evenly spread rows.

    Their expectation is known, without sampling: diag(p) - p p^T with the original's predictions p
    (where it is not followed, with those behind the quantized blocks). Of it the blocks of 128
    outputs, which the Hadamard transform mixes: (blocks, 128, 128). All would be vocab^2.
    """
    count = len(streams.rows)
    picked = torch.linspace(0, count - 1, min(rows, count)).long().tolist()
    states = streams.original if streams.paired else streams.quantized
    cols = streams.rows.shape[1]
    pieces = [
        (row, slice(a, a + TAIL_TOKENS)) for row in picked for a in range(0, cols, TAIL_TOKENS)
    ]

    def moments(piece: tuple[int, slice]) -> torch.Tensor:
        row, part = piece
        logits = model.run_tail(streams.rows[row, part][None], states[row, part][None])
        p = logits[0].float().softmax(-1)
        blocks = F.pad(p, (0, -p.shape[1] % HADAMARD)).unflatten(1, (-1, HADAMARD)).transpose(0, 1)
        return torch.diag_embed(blocks.sum(1)) - blocks.mT @ blocks

    total, size = None, parallel.threads()
    for a in range(0, len(pieces), size):
        for found in parallel.each(moments, pieces[a : a + size]):
            total = found if total is None else total.add_(found)
    return total / (len(picked) * cols)


def _head_inputs(
    model: StreamedModel, streams: Streams, states: torch.Tensor, wave: list[slice]
) -> list[torch.Tensor]:
    return parallel.each(lambda part: head_inputs(model, streams.rows[part], states[part]), wave)


def tokens(x: torch.Tensor) -> torch.Tensor:
    """(..., features) → (tokens, features)."""
    return x.reshape(-1, x.shape[-1])
