"""Hidden states of many almost equal models on their way through the blocks, side by side.

A stream is a model that differs in one place from the one that is loaded: it begins there, from
the state that all have in common, and goes on through the same blocks as the others. Every row is
a forward of its own, so neither what travels together nor the number of threads changes a bit.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import nn

from exl3 import parallel
from exl3.evaluate.metrics import row_kld
from exl3.evaluate.stream import row_logits
from exl3.jobs.measure_files import MeasureFiles, Saved
from exl3.jobs.measure_input import Layers, padded_weights
from exl3.model.streamed import StreamedModel
from exl3.progress import Progress
from exl3.quant.linear import weight_error

CHECKPOINT_SECONDS = 60.0  # least time between saves of the states
SAVING_SHARE = 20  # and at least so many times as long as a save takes


@dataclass(frozen=True)
class Stream:
    """A model that differs from the one that is loaded in some linears of one block, or in its
    head."""

    name: str  # of its files
    block: int  # where it begins
    keys: tuple[str, ...] = ()  # linears of that block that are taken from `layers`
    layers: Layers | None = None
    head: str | None = None  # the head's key, if it is taken from `layers`


@dataclass
class Live:
    """A stream on its way."""

    states: torch.Tensor  # (rows, cols, hidden)
    error: float | None = None  # relative squared error of what was taken


BeforeBlock = Callable[[int, "dict[str, Live]"], None]


@dataclass
class Sweep:
    """One pass through a model's blocks with streams that begin on the way.

    following: the block where the next sweep will begin; what enters it is kept. before_block: is
    called with each block loaded.
    """

    model: StreamedModel
    name: str  # of the model, for files
    rows: torch.Tensor  # ids (rows, cols)
    streams: Sequence[Stream]
    files: MeasureFiles
    progress: Progress
    following: int | None = None
    before_block: BeforeBlock | None = None
    live: dict[str, Live] = field(default_factory=dict)
    home: torch.Tensor | None = None  # what the loaded model itself has here, while it is needed

    def run(self) -> dict[str, Live]:
        """What leaves the last block, of every stream."""
        first = self._resume()
        saver = _Saver()
        self.model.load_embedding()
        for i in range(first, self.model.num_blocks):
            self.progress.doing(self.model.block_name(i))
            self.model.load_block(i)
            try:
                self._block(i)
            finally:
                self.model.free_block(i)
            if saver.due():
                with saver.timed():
                    self.files.save_states(self._snapshot(i + 1))
        self.model.free_embedding()
        return self.live

    def _block(self, i: int) -> None:
        if self.before_block is not None:
            self.before_block(i, self.live)
        linears = self.model.block_linears(i)
        cost = forward_cost(linears.values(), self.rows)
        older = [live.states for live in self.live.values()]
        for stream in self.streams:
            if stream.block == i:
                self.live[stream.name] = self._begin(stream, linears)
                self.progress.advance(cost)
        forward(self.model, i, self.rows, [(states, states) for states in older])
        self.progress.advance(cost * len(older))
        if self._needs_home(i + 1) and (i == 0 or self.home is not None):
            out = self._empty() if self.home is None else self.home
            forward(self.model, i, self.rows, [(self.home, out)])
            self.home = out
            self.progress.advance(cost)
        else:
            self.home = None
        if i + 1 == self.following and self.home is not None:
            self.files.save_entering(self.name, i + 1, self.home)

    def _begin(self, stream: Stream, linears: Mapping[str, nn.Linear]) -> Live:
        out = self._empty()
        with replaced(linears, stream.keys, stream.layers) as error:
            forward(self.model, stream.block, self.rows, [(self.home, out)])
        return Live(out, error)

    def _needs_home(self, i: int) -> bool:
        """Whether what enters block i of the loaded model itself is needed, or what comes later."""
        return any(stream.block >= i for stream in self.streams) or i <= (self.following or 0)

    def _empty(self) -> torch.Tensor:
        hidden = self.model.config.get_text_config(decoder=True).hidden_size
        return torch.empty(*self.rows.shape, hidden, dtype=self.model.dtype)

    def _resume(self) -> int:
        """Takes up saved states, if there are any of these streams; returns the first block."""
        names = [stream.name for stream in self.streams]
        if saved := self.files.load_states(self.name, names):
            self.live = {n: Live(states, saved.errors[n]) for n, states in saved.states.items()}
            self.home = saved.home
            first = saved.block
        else:
            first, self.home = self.files.load_entering(
                self.name, min(s.block for s in self.streams)
            )
        self.progress.skip(self._cost_before(first))
        return first

    def _cost_before(self, block: int) -> float:
        return sum(
            forward_cost(self.model.block_linears(i).values(), self.rows)
            for i in range(block)
            for stream in self.streams
            if stream.block <= i
        )

    def _snapshot(self, block: int) -> Saved:
        return Saved(
            self.name,
            block,
            tuple(stream.name for stream in self.streams),
            self.home,
            {name: live.states for name, live in self.live.items()},
            {name: live.error for name, live in self.live.items()},
        )


class _Saver:
    """When states are saved: not too often, and less often where that takes long."""

    def __init__(self) -> None:
        self.last, self.took = time.monotonic(), 0.0

    def due(self) -> bool:
        pause = max(CHECKPOINT_SECONDS, SAVING_SHARE * self.took)
        return time.monotonic() - self.last >= pause

    @contextmanager
    def timed(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.last = time.monotonic()
        self.took = self.last - began


def forward(
    model: StreamedModel,
    i: int,
    rows: torch.Tensor,
    pairs: Iterable[tuple[torch.Tensor | None, torch.Tensor]],
) -> None:
    """Block i on all rows of several states: (what enters or None, where the output goes)."""

    def one(item: tuple[tuple[torch.Tensor | None, torch.Tensor], int]) -> None:
        (states, out), row = item
        part = slice(row, row + 1)
        out[part] = model.run_block(i, rows[part], None if states is None else states[part])

    parallel.each(one, product(pairs, range(len(rows))))


@contextmanager
def replaced(
    linears: Mapping[str, nn.Linear], keys: Sequence[str], layers: Layers | None
) -> Iterator[float | None]:
    """Some linears compute with other layers' tensors inside the context.

    Gives their relative squared error, the mean over their weights; None if there are none.
    """
    before = {key: _tensors(linears[key]) for key in keys}
    total = weights = 0.0
    try:
        for key in keys:
            error = _replace(key, linears[key], layers)
            size = padded_weights(linears[key])
            total, weights = total + error * size, weights + size
        yield total / weights if weights else None
    finally:
        for key, tensors in before.items():
            for leaf, tensor in tensors.items():
                getattr(linears[key], leaf).data = tensor


def _tensors(linear: nn.Linear) -> dict[str, torch.Tensor]:
    found = {"weight": linear.weight, "bias": linear.bias}
    return {leaf: tensor.data for leaf, tensor in found.items() if tensor is not None}


def _replace(key: str, linear: nn.Linear, layers: Layers) -> float:
    """Puts a layer's tensors in, without their padding; returns its error."""
    original = linear.weight.data
    for leaf, tensor in layers.tensors(key).items():
        place = getattr(linear, leaf)
        cut = tensor[tuple(slice(n) for n in place.shape)]
        place.data = cut.to(place.device, place.dtype).contiguous()
    error = weight_error(original.float(), linear.weight.data.float())
    known = layers.error(key)
    return error if known is None else known


# -- The end of the model ------------------------------------------------------------------------


def stream_klds(
    original: StreamedModel,
    model: StreamedModel,
    rows: torch.Tensor,
    reference: Callable[[int], torch.Tensor],
    streams: Sequence[Stream],
    live: dict[str, Live],
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """KL(original || stream) of every position of every row, float64 (rows, cols), by stream.

    reference: what leaves the original's last block, (1, cols, hidden) of a row. model: what the
    streams went through. Logits of a row at a time are in memory.
    """
    found: dict[str, list[torch.Tensor]] = {stream.name: [] for stream in streams}
    models = {id(m): m for m in (original, model)}.values()
    for m in models:
        m.load_embedding()
        m.load_tail()
    cost = tail_cost(model, rows[:1])
    for part in _by_head(streams):
        key = part[0].head
        linears = {key: model.head()[1]} if key else {}
        for r in range(len(rows)):
            row = rows[r : r + 1]
            expected = row_logits(original, row, reference(r))
            with replaced(linears, [*linears], part[0].layers) as error:
                for stream in part:
                    logits = row_logits(model, row, live[stream.name].states[r : r + 1])
                    found[stream.name].append(row_kld(logits, expected))
                    live[stream.name].error = error if key else live[stream.name].error
                    progress.advance(cost)
    for m in models:
        m.free_tail()
        m.free_embedding()
    return {name: torch.stack(klds) for name, klds in found.items()}


def _by_head(streams: Sequence[Stream]) -> list[list[Stream]]:
    """Those with the loaded model's own head together; every other head by itself."""
    own = [stream for stream in streams if stream.head is None]
    return [part for part in (own, *([s] for s in streams if s.head is not None)) if part]


# -- Costs: products of a weight and a token -----------------------------------------------------


def forward_cost(linears: Iterable[nn.Linear], rows: torch.Tensor) -> float:
    """Of one stream through a block."""
    return float(rows.numel()) * sum(map(padded_weights, linears))


def tail_cost(model: StreamedModel, rows: torch.Tensor) -> float:
    """Of one stream through norm, head and comparison."""
    return float(rows.numel()) * padded_weights(model.head()[1])


def stream_cost(model: StreamedModel, rows: torch.Tensor, stream: Stream) -> float:
    """Of one stream from its beginning to its end."""
    blocks = range(stream.block, model.num_blocks)
    through = sum(forward_cost(model.block_linears(i).values(), rows) for i in blocks)
    return through + tail_cost(model, rows)
