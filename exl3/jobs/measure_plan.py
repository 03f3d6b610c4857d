"""What will be measured, in which passes, and what that takes."""

import math
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tqdm import tqdm

from exl3 import parallel
from exl3.errors import UserError
from exl3.format.layer import padded
from exl3.groups import Group, group
from exl3.jobs.measure_files import MeasureFiles
from exl3.jobs.measure_input import Input, Layers, MadeLayers, Request, padded_weights
from exl3.jobs.measure_layers import search_cost
from exl3.jobs.measure_shares import Shares
from exl3.jobs.measure_sweep import Stream, forward_cost, stream_cost
from exl3.memory import GIB
from exl3.model.quantized import OTHER_ROPE
from exl3.model.streamed import StreamedModel


@dataclass(frozen=True)
class Targets:
    """All there is to measure."""

    groups: tuple[Group, ...]
    head: str | None  # its key
    layers: tuple[Layers, ...]  # of each quant; without quants, those made here
    wholes: tuple[Stream, ...]  # each quant
    parts: tuple[Stream, ...]  # groups and heads out of each quant, by the block where they begin


def group_stream(idx: int, q: int) -> str:
    """The name of the stream with group idx of quant q."""
    return f"g{idx:05}-q{q}"


def head_stream(q: int) -> str:
    """The name of the stream with the head of quant q."""
    return f"head-q{q}"


def whole_stream(q: int) -> str:
    """The name of the stream that is quant q."""
    return f"whole-q{q}"


def make_targets(request: Request, found: Input, files: MeasureFiles) -> Targets:
    """Everything that the request asks for."""
    groups = group(found.keys_by_block(), request.level)
    layers = found.quants or (MadeLayers(files.work, _bias_bytes(found.original)),)
    chosen = range(1 if request.method == "swap" else 0, len(layers))
    parts = [
        Stream(group_stream(idx, q), g.block, g.keys, layers[q])
        for idx, g in enumerate(groups)
        for q in chosen
    ]
    if key := found.head_key():
        last = found.original.num_blocks - 1
        parts += [Stream(head_stream(q), last, (), layers[q], key) for q in chosen]
    wholes = tuple(Stream(whole_stream(q), 0) for q in range(len(found.quants)))
    ordered = tuple(sorted(parts, key=lambda stream: stream.block))
    return Targets(tuple(groups), found.head_key(), layers, wholes, ordered)


def _bias_bytes(model: StreamedModel) -> dict[str, int]:
    """Bytes that a quant stores for biases, by the key of their linear."""
    size = torch.float16.itemsize
    return {
        key: size * padded(linear.out_features)
        for key, linear in model.linears().items()
        if linear.bias is not None
    }


class Plan:
    """What is left to do. UserError if it does not fit memory or disk."""

    def __init__(
        self, request: Request, found: Input, targets: Targets, files: MeasureFiles, shares: Shares
    ) -> None:
        self.request, self.found, self.targets, self.files = request, found, targets, files
        self.shares = shares
        self.left = [s for s in targets.parts if not files.has_kld(s.name)]
        self.wholes = [s for s in targets.wholes if not files.has_kld(s.name)]
        self.original_left = not files.original.is_file()
        self.every = torch.cat([found.rows, found.hessian_rows])
        self.passes = self._passes()
        self._refuse_full_disk()

    def _passes(self) -> list[list[Stream]]:
        """Streams that fit the memory together, first those of a sweep that was interrupted."""
        size, limit = self._state_bytes(self.found.rows), int(self.request.max_sys * GIB)
        need = max(2 * size, self._state_bytes(self.every))
        if need > limit:
            raise UserError(
                f"-ms {self.request.max_sys:g}: the states of a single candidate and of the model "
                f"it is put into take {need / GIB:.3g} GiB; give more, or fewer or shorter rows"
            )
        most = limit // size - 1  # one more is that of the model itself
        under_way = set(self.files.saved_streams("home"))
        first = [stream for stream in self.left if stream.name in under_way]
        if len(first) > most:
            first = []
        rest = [stream for stream in self.left if stream not in first]
        passes = [rest[a : a + most] for a in range(0, len(rest), most)]
        return [first, *passes] if first else passes

    def cost(self) -> float:
        """Of all that is left, in products of a weight and a token."""
        model, rows = self.found.original, self.found.rows
        cost = sum(stream_cost(model, rows, s) for s in (*self.left, *self.wholes))
        last = max((stream.block for stream in self.left), default=0)
        cost += self._blocks_cost(rows, range(last))  # of the model that they begin from
        if not self.original_left:
            return cost
        cost += self._blocks_cost(self.every, range(model.num_blocks))
        if not self.found.quants:
            work = self.files.work
            cost += sum(
                search_cost(linear)
                for key, linear in model.linears().items()
                if not work.has_layer(key)
            )
        return cost

    def _blocks_cost(self, rows: torch.Tensor, blocks: Iterable[int]) -> float:
        model = self.found.original
        return sum(forward_cost(model.block_linears(i).values(), rows) for i in blocks)

    def text(self) -> str:
        """The plan, told before it is carried out."""
        r, rows, targets = self.request, self.found.rows, self.targets
        quants = len(targets.wholes)
        what = f"{quants} quants" if quants else f"at {r.bits} bits, {r.codebook}"
        lines = [
            f"Measuring {r.original}: {len(targets.groups)} groups (level {r.level}) {what}, "
            f"{r.method}: {len(targets.parts)} candidates",
            f"  {len(rows)} rows of {rows.shape[1]} tokens of {r.text_name}",
        ]
        if corrected := [str(q.folder) for q in self.found.quants if q.quant.corrected]:
            lines.append(
                f"  NOTE: {' and '.join(corrected)} corrected every layer for the errors before "
                "it; alone in another model its layers look worse than they are. Measure without "
                "-i, or quants made with convert.py --no_correction"
            )
        if self.found.original.rope_parameters:
            lines.append(f"  NOTE: {OTHER_ROPE}")
        if len(self.left) < len(targets.parts):
            lines.append(f"  {len(targets.parts) - len(self.left)} candidates are measured already")
        if self.shares.left:
            lines.append(
                f"  gradients of {self.shares.rows.numel():,} tokens first, to foretell what "
                "each tensor costs"
            )
        count = len(self.passes)
        states = (self._together() + 1) * self._state_bytes(rows)
        seconds = math.ceil(self.cost() * _seconds_a_product())
        lines.append(
            f"  {count} pass{'es' * (count != 1)} through the blocks; states up to "
            f"{states / GIB:.2f} of {r.max_sys:g} GiB (-ms), disk up to "
            f"{self._disk_bytes() / GIB:.2f} GiB, about {tqdm.format_interval(seconds)}"
        )
        return "\n".join(lines)

    def _together(self) -> int:
        """Most streams of a pass."""
        return max(map(len, self.passes), default=0)

    def _state_bytes(self, rows: torch.Tensor) -> int:
        """Of the hidden states of one stream."""
        model = self.found.original
        hidden = model.config.get_text_config(decoder=True).hidden_size
        return rows.numel() * hidden * model.dtype.itemsize

    def _disk_bytes(self) -> int:
        """Of the work folder at its largest: states, while they are replaced both old and new."""
        targets = self.targets
        klds = 8 * self.found.rows.numel() * (len(targets.parts) + len(targets.wholes))
        states = max(self._together() + 1, 1) * self._state_bytes(self.found.rows)
        if self.found.quants:
            made = 0
        else:
            states = max(states, self._state_bytes(self.every))
            weights = sum(map(padded_weights, self.found.original.linears().values()))
            made = self.request.bits * weights // 8
        passing = 2 * states + 3 * self._state_bytes(self.found.rows) + klds + made
        return max(passing, self.shares.disk_bytes)  # gradients are gone by then

    def _refuse_full_disk(self) -> None:
        folder = self.files.path
        there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        need, free = self._disk_bytes() - there, shutil.disk_usage(folder).free
        if need > free:
            raise UserError(
                f"the disk of {folder} has {free / GIB:,.2f} GiB free, the job may need "
                f"{need / GIB:,.2f} GiB; make room, give less to -ms, or choose another -o"
            )


def _seconds_a_product() -> float:
    """Of a weight and a token, on this machine: from one product of matrices."""
    matrix = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    matrix @ matrix
    began = time.monotonic()
    matrix @ matrix
    return (time.monotonic() - began) / 1024**3 / parallel.threads()
