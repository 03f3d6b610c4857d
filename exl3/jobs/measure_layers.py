"""Quantizes every layer of the original by itself, plainly: what it costs a group to have so few
bits, with nothing corrected for the errors of others."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from exl3 import parallel
from exl3.jobs.inputs import head_hessian, sum_hessians
from exl3.jobs.measure_input import padded_weights
from exl3.jobs.measure_sweep import Live
from exl3.jobs.quantize import quantized
from exl3.jobs.streams import enter, waves
from exl3.jobs.workdir import WorkDir
from exl3.model.capture import Capture, Captured
from exl3.model.streamed import StreamedModel
from exl3.progress import Progress
from exl3.quant.hessian import Hessian

HESSIAN_BYTES = 4 << 30  # of the Hessians in memory at a time, one for each linear
SEARCH_TOKENS = 20_000  # a weight's search takes about as long as its part in their forwards


@dataclass(frozen=True)
class LayerMaker:
    """Makes the layers of one block after another, on what enters the original's.

    rows: ids (rows, cols) to calibrate with; first: where they begin in the states of a sweep.
    """

    model: StreamedModel
    rows: torch.Tensor
    first: int
    bits: int
    codebook: str
    work: WorkDir
    progress: Progress

    def block(self, i: int, live: dict[str, Live]) -> None:
        """What is not there yet of loaded block i; live: the one stream, before the block."""
        linears = self.model.block_linears(i)
        missing = {k: linear for k, linear in linears.items() if not self.work.has_layer(k)}
        if not missing:
            return
        states = next((x.states[self.first :] for x in live.values()), None)
        for part in _parts(missing):
            for keys, hessian in self._hessians(i, part, states):
                for key in keys:
                    self._make(key, missing[key], hessian)
        for key, linear in missing.items():
            if not self.work.has_layer(key):  # nothing ever enters it
                self._make(key, linear, None)

    def head(self, states: torch.Tensor) -> None:
        """The head; states: what leaves the last block, of all rows of the sweep."""
        key, linear = self.model.head()
        if self.work.has_layer(key):
            return
        self.model.load_embedding()
        self.model.load_tail()
        hessian = head_hessian(self.model, self.rows, states[self.first :], self._single_rows())
        self._make(key, linear, hessian)
        self.model.free_tail()
        self.model.free_embedding()

    def _hessians(
        self, i: int, linears: Mapping[str, nn.Linear], states: torch.Tensor | None
    ) -> list[tuple[tuple[str, ...], Hessian]]:
        """Of the inputs of block i's linears, one for those that share their input."""

        def captured(row: slice) -> list[Captured]:
            return capture.run(self.rows[row], enter(states, row))[1]

        with Capture(self.model, i, dict(linears)) as capture:
            return sum_hessians(
                found
                for wave in waves(self._single_rows())
                for found in parallel.each(captured, wave)
            )

    def _single_rows(self) -> list[slice]:
        return [slice(r, r + 1) for r in range(len(self.rows))]

    def _make(self, key: str, linear: nn.Linear, hessian: Hessian | None) -> None:
        self.progress.doing(key)
        if hessian is not None and hessian.tokens < linear.in_features:
            hessian = None  # of a rarely asked expert: feedback would suit these few tokens only
        mean = None if hessian is None else hessian.mean()
        made, report = quantized(key, linear.weight, mean, self.bits, self.codebook)
        self.work.save_layer(key, made.tensors, report)
        self.progress.advance(search_cost(linear))


def _parts(linears: Mapping[str, nn.Linear]) -> Iterator[dict[str, nn.Linear]]:
    """Linears, in their order, as many at a time as have room for their Hessians."""
    part: dict[str, nn.Linear] = {}
    size = 0
    for key, linear in linears.items():
        more = 4 * linear.in_features**2
        if part and size + more > HESSIAN_BYTES:
            yield part
            part, size = {}, 0
        part[key] = linear
        size += more
    yield part


def search_cost(linear: nn.Linear) -> float:
    """Of finding a layer's codes, in products of a weight and a token."""
    return SEARCH_TOKENS * float(padded_weights(linear))
