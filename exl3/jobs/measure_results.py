"""The measurement that finished streams make together."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from exl3.data.rows import rows_hash
from exl3.evaluate.metrics import mean_and_error
from exl3.format.layer import UNQUANTIZED
from exl3.format.stored_layer import StoredLayer
from exl3.groups import Group
from exl3.jobs.measure_files import MeasureFiles
from exl3.jobs.measure_input import Input, Request, padded_weights
from exl3.jobs.measure_plan import Targets, group_stream, head_stream, whole_stream
from exl3.jobs.measure_shares import Shares, tensors_of
from exl3.measurement import (
    Candidate,
    MeasuredGroup,
    Measurement,
    Original,
    Part,
    Quant,
    Rows,
)


@dataclass
class Results:
    """Makes the measurement of what is finished. Errors are standard errors over rows: the tokens
    of a row resemble each other, so counting them as independent makes errors too small.
    Differences are taken position by position, where most of the noise of the text cancels."""

    request: Request
    found: Input
    targets: Targets
    files: MeasureFiles
    shares: Shares
    job: str

    def __post_init__(self) -> None:
        self._weights = {
            key: padded_weights(linear) for key, linear in self.found.original.linears().items()
        }
        self._stored: dict[tuple[int, str], StoredLayer] = {}
        self._fingerprint = self.found.original.checkpoint.fingerprint()

    def measurement(self) -> Measurement:
        """Groups of which every stream is finished, and the quants that are measured."""
        base, *alts = self._quants()
        groups = [self._group(idx) for idx in range(len(self.targets.groups))]
        head = self._head()
        wanted = len(groups) + (self.targets.head is not None)
        complete = len([g for g in (*groups, head) if g]) == wanted
        known = all(self.files.has_kld(stream.name) for stream in self.targets.wholes)
        rows, request = self.found.rows, self.request
        return Measurement(
            arch_string=self.found.arch_string,
            base=base,
            alts=tuple(alts),
            groups=tuple(g for g in groups if g),
            head=head,
            method=request.method,
            level=request.level,
            model=Original(str(request.original), self._fingerprint, self._codebook()),
            rows=Rows(*rows.shape, rows_hash(rows), request.text_name),
            complete=complete and known,
            base_kld=base.kld,
            job=self.job,
        )

    def _quants(self) -> list[Quant]:
        if not self.found.quants:
            return [Quant(None, None)]
        return [
            Quant(str(quant.folder), quant.quant.bpw, *self._mean(whole_stream(q)))
            for q, quant in enumerate(self.found.quants)
        ]

    def _codebook(self) -> str | None:
        """That of all layers, None where they differ."""
        if not self.found.quants:
            return self.request.codebook
        keys = (key for g in self.targets.groups for key in g.keys)
        numbers = range(len(self.found.quants))
        books = {self._layer(q, key).codebook for key in keys for q in numbers} - {""}
        return books.pop() if len(books) == 1 else None

    def _group(self, idx: int) -> MeasuredGroup | None:
        g = self.targets.groups[idx]
        names = [group_stream(idx, q) for q in range(len(self.targets.layers))]
        found = self._measured(idx, g.block, g.name, g.keys, names)
        whole = self.shares.sensitivity(g.keys)
        return found and replace(found, parts=self._parts(g, whole), sensitivity=whole)

    def _parts(self, measured: Group, whole: float | None) -> tuple[Part, ...]:
        """A group's tensors, as far as they are known; none if it is a single one.

        whole: the group's sensitivity.
        """
        tensors = tensors_of(measured)
        if len(tensors) < 2 or not whole:
            return ()
        return tuple(self._part(t, self.shares.sensitivity(t.keys) / whole) for t in tensors)

    def _part(self, tensor: Group, share: float) -> Part:
        layers = [[self._layer(q, k) for k in tensor.keys] for q in range(len(self.targets.layers))]
        return Part(
            name=tensor.name,
            layers=tensor.keys,
            weights=sum(self._weights[key] for key in tensor.keys),
            share=share,
            bits=tuple(8 * sum(layer.nbytes for layer in own) for own in layers),
            k=tuple(tuple(sorted({layer.bits for layer in own})) for own in layers),
        )

    def _head(self) -> MeasuredGroup | None:
        if self.targets.head is None:
            return None
        names = [head_stream(q) for q in range(len(self.targets.layers))]
        return self._measured(len(self.targets.groups), None, "head", (self.targets.head,), names)

    def _measured(
        self, idx: int, block: int | None, name: str, keys: tuple[str, ...], streams: list[str]
    ) -> MeasuredGroup | None:
        """A group out of every quant, None while it is not finished. streams: by quant."""
        isolated = self.request.method == "isolate"
        if not isolated:
            streams = [whole_stream(0), *streams[1:]]  # the base's tensors in the base
        if not all(map(self.files.has_kld, streams)):
            return None
        kld, kld_error = self._mean(streams[0]) if isolated else (None, None)
        bits = [8 * sum(self._layer(q, k).nbytes for k in keys) for q in range(len(streams))]
        candidates = []
        for q in range(1, len(streams)):
            dkld, error = self._mean_difference(streams[q], streams[0])
            dbits = bits[q] - bits[0]
            candidates.append(
                Candidate(dkld, dbits, error, self._error(streams[q]), self._ks(q, keys))
            )
        return MeasuredGroup(
            idx=idx,
            layers=keys,
            candidates=tuple(candidates),
            block=block,
            name=name,
            weights=sum(self._weights[key] for key in keys),
            kld=kld,
            kld_error=kld_error,
            bits=bits[0],
            k=self._ks(0, keys),
            error=self._error(streams[0]),
        )

    def _ks(self, q: int, keys: Iterable[str]) -> tuple[int, ...]:
        return tuple(sorted({self._layer(q, key).bits for key in keys} - {UNQUANTIZED}))

    def _layer(self, q: int, key: str) -> StoredLayer:
        if (q, key) not in self._stored:
            self._stored[q, key] = self.targets.layers[q].stored(key)
        return self._stored[q, key]

    def _error(self, stream: str) -> float | None:
        """Of what the stream took; only known where it was put into the original."""
        isolated = self.request.method == "isolate"
        return self.files.load_kld(stream)[1] if isolated else None

    def _mean(self, stream: str) -> tuple[float | None, float | None]:
        """Mean KLD and its error, None while it is not known."""
        if not self.files.has_kld(stream):
            return None, None
        return _mean(self.files.load_kld(stream)[0])

    def _mean_difference(self, stream: str, base: str) -> tuple[float, float | None]:
        (a, _), (b, _) = self.files.load_kld(stream), self.files.load_kld(base)
        return _mean(a - b)


def _mean(values: torch.Tensor) -> tuple[float, float | None]:
    """Mean of values (rows, cols) and its standard error."""
    mean, error, _ = mean_and_error(list(values))
    return mean, None if math.isnan(error) else error
