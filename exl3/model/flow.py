"""The order in which data passes through a block, found by watching one forward of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from exl3.model.capture import Capture, first_tensor
from exl3.model.hooks import Hooks
from exl3.model.streamed import StreamedModel

MOST_WRITERS = 3  # that write to the residual stream at once (parallel attention and MLP; experts)
SAME = 1e-3  # relative difference that rounding may make


@dataclass(frozen=True)
class Residual:
    """How a linear's output, or that of experts, gets into the residual stream."""

    place: str  # the module of the block whose input is the stream before; "": the block itself
    scale: float  # the output is added times this


@dataclass(frozen=True)
class Stage:
    """Linears of a block with the same input, or the experts of one of its modules."""

    keys: tuple[str, ...]  # of linears; for experts the module's path in the block, alone
    residual: Residual | None = None  # None: they do not write to the residual stream, visibly
    experts: bool = False


def find_flow(
    model: StreamedModel,
    i: int,
    block: nn.Module,
    linears: dict[str, nn.Linear],
    experts: dict[str, nn.Module],
    input_ids: torch.Tensor,
    state: torch.Tensor | None,
) -> list[Stage]:
    """The stages of loaded block i in the order of its own forward.

    linears: key → module, experts' own left out; experts: path in the block → module. What is not
    called in this forward is in no stage. input_ids (rows, cols), state (rows, cols, hidden).
    """
    watched = {**linears, **experts}
    with Capture(model, i, watched) as capture, _Watch(block, watched) as watch:
        output, groups = capture.run(input_ids, state)
    residuals = _residuals(watch.events, output, experts)
    for name, module in experts.items():
        residuals[name] = _experts_residual(model, i, module, input_ids, state, output)
    stages = []
    for group in groups:
        keys = tuple(name for name in group.names if name not in experts)
        if keys:
            # A writer has its input to itself in every block known.
            stages.append(Stage(keys, residuals.get(keys[0]) if len(keys) == 1 else None))
        stages += [
            Stage((name,), residuals.get(name), experts=True)
            for name in group.names
            if name in experts
        ]
    return stages


def _experts_residual(
    model: StreamedModel,
    i: int,
    module: nn.Module,
    input_ids: torch.Tensor,
    state: torch.Tensor | None,
    output: torch.Tensor,
) -> Residual | None:
    """How experts' output enters the block's: found by adding something to it, for others may be
    added to the same place. None if not in proportion. output: the block's without."""
    added: list[torch.Tensor] = []

    def add(module: nn.Module, args: tuple[Any, ...], given: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(given.shape, generator=generator) * given.float().std().cpu()
        added.append(noise.to(given))
        return given + added[-1]

    hook = module.register_forward_hook(add)
    try:
        changed = model.run_block(i, input_ids, state)
    finally:
        hook.remove()
    if len(added) != 1:
        return None
    scale = _scale(_tokens(changed - output), _tokens(added[0]))
    return None if scale is None else Residual("", scale)


@dataclass(frozen=True)
class _Event:
    """A tensor as wide as the residual stream that went into a module, or came out of a linear."""

    name: str
    tensor: torch.Tensor
    written: bool  # the output of a linear or of experts


class _Watch(Hooks):
    """Notes what goes into the modules of a block and what comes out of its linears."""

    def __init__(self, block: nn.Module, watched: dict[str, nn.Module]):
        self.block, self.watched = block, watched
        self.events: list[_Event] = []

    def _register(self) -> Iterator[RemovableHandle]:
        for name, module in self.block.named_modules():
            yield module.register_forward_pre_hook(self._enters(name), with_kwargs=True)
        for name, module in self.watched.items():
            yield module.register_forward_hook(self._leaves(name))

    def _enters(self, name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = first_tensor(args, kwargs)
            # As large as what enters the block, the first of all: what enters experts is not kept.
            if tensor is not None and (
                not self.events or tensor.numel() == self.events[0].tensor.numel()
            ):
                self.events.append(_Event(name, _tokens(tensor), False))

        return note

    def _leaves(self, name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.events.append(_Event(name, _tokens(output), True))

        return note


def _tokens(x: torch.Tensor) -> torch.Tensor:
    # A copy: what is added in place later must not change it.
    return x.reshape(-1, x.shape[-1]).clone()


def _residuals(
    events: list[_Event], output: torch.Tensor, experts: dict[str, nn.Module]
) -> dict[str, Residual]:
    """The writers to the residual stream: name → where the stream before them is seen.

    The stream is followed from what enters the block: wherever something goes into a module, or
    out of the block, that is the stream so far plus the last outputs, those have been added.
    """
    stream, place = events[0].tensor, events[0].name  # the block's own input comes first
    pending: list[_Event] = []
    found: dict[str, Residual] = {}
    for event in [*events[1:], _Event("", _tokens(output), False)]:
        if event.tensor.shape != stream.shape:
            continue
        if event.written:
            pending.append(event)
            continue
        for n in range(1, min(MOST_WRITERS, len(pending)) + 1):
            added = pending[-n:]
            scale = _scale(event.tensor - stream, sum(e.tensor for e in added))
            if scale is not None:
                # One of them takes the blame for all: a linear that sees every token, if any.
                writer = next((e for e in reversed(added) if e.name not in experts), added[-1])
                found[writer.name] = Residual(place, scale)
                stream, place, pending = event.tensor, event.name, []
                break
    return found


def _scale(change: torch.Tensor, written: torch.Tensor) -> float | None:
    """The factor that makes `written` the change of the stream, None if there is none."""
    change, written = change.double(), written.double()
    power = float((written * written).sum())
    if power == 0:
        return None
    scale = float((change * written).sum()) / power
    if abs(scale) < SAME or float((change - scale * written).norm()) > SAME * float(change.norm()):
        return None
    return round(scale, 5)
