"""What enters a block's linears, in the order of the block's own data flow."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from exl3.errors import JobError
from exl3.model.hooks import Hooks
from exl3.model.run import Stop
from exl3.model.streamed import StreamedModel


@dataclass
class Captured:
    """Linears that were given the same input, and that input (tokens, in_features)."""

    names: tuple[str, ...]
    inputs: torch.Tensor


class Capture(Hooks):
    """Runs block i and keeps what enters its linears, for one sweep over many rows.

    linears: name → module of block i, as `model.block_linears(i)` gives them. The hooks are there
    inside the `with` only; `run` may be called from several threads at once.
    """

    def __init__(self, model: StreamedModel, i: int, linears: dict[str, nn.Linear]):
        self.model, self.i, self.linears = model, i, linears
        self._local = _Local()

    def _register(self) -> Iterator[RemovableHandle]:
        for name, linear in self.linears.items():
            yield linear.register_forward_pre_hook(self._keep(name))

    def _keep(self, name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._local.calls is not None:
                self._local.calls.setdefault(name, []).append(_Seen(args[0], args[0]._version))

        return keep

    def run(
        self, input_ids: torch.Tensor, state: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[Captured]]:
        """Output of the block, as `run_block` gives it, and its linears' inputs.

        Linears which received the same input are one group; groups stand in the order of their
        first call (q, k, v; o; gate, up; down). A linear that was not called is in none.
        """
        self._local.calls = {}
        try:
            output = self.model.run_block(self.i, input_ids, state)
            return output, _groups(self._local.calls)
        finally:
            self._local.calls = None


@dataclass(frozen=True)
class _Seen:
    """An input as a hook saw it; holding it keeps its memory from being used again."""

    tensor: torch.Tensor
    version: int  # counts changes in place

    def identity(self) -> tuple[Any, ...]:
        x = self.tensor
        return x.data_ptr(), x.dtype, tuple(x.shape), x.stride(), self.version


class _Local(threading.local):
    calls: dict[str, list[_Seen]] | None = None


def _groups(calls: dict[str, list[_Seen]]) -> list[Captured]:
    """Linears with the same inputs together, in the order of `calls`."""
    same: dict[Any, list[str]] = {}
    for name, seen in calls.items():
        if any(s.tensor._version != s.version for s in seen):
            raise JobError(f"The input of {name} was overwritten while its block ran.")
        same.setdefault(tuple(s.identity() for s in seen), []).append(name)
    return [Captured(tuple(names), _tokens(calls[names[0]])) for names in same.values()]


def _tokens(seen: list[_Seen]) -> torch.Tensor:
    """(tokens, in_features): all calls of one linear, one after another."""
    rows = [s.tensor.reshape(-1, s.tensor.shape[-1]) for s in seen]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


class Taps(Hooks):
    """Runs block i up to one of its modules and tells what went into some of them on the way.

    modules: of the block, the last of which is where `run` ends. The hooks are there inside the
    `with` only; runs may be made in several threads at once.
    """

    def __init__(self, model: StreamedModel, i: int, modules: Sequence[nn.Module]):
        self.model, self.i, self.modules = model, i, modules
        self._local = _LocalTaps()

    def _register(self) -> Iterator[RemovableHandle]:
        for n, module in enumerate(self.modules):
            yield module.register_forward_pre_hook(self._tap(n), with_kwargs=True)

    def _tap(self, n: int) -> Any:
        def tap(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._local.seen is None:
                return
            self._local.seen[n] = seen = (*args, *kwargs.values())
            if self._local.through:
                # Copies: what comes after may change them.
                self._local.seen[n] = tuple(x.clone() if torch.is_tensor(x) else x for x in seen)
            elif n == len(self.modules) - 1:
                raise Stop(None)

        return tap

    def run(
        self, input_ids: torch.Tensor, state: torch.Tensor | None
    ) -> list[tuple[Any, ...]] | None:
        """The arguments of each module's call; None if the last was not called at all."""
        return self._run(input_ids, state, False)[0]

    def run_through(
        self, input_ids: torch.Tensor, state: torch.Tensor | None
    ) -> tuple[list[tuple[Any, ...]] | None, torch.Tensor]:
        """The same of a run that does not end there, and the block's output."""
        return self._run(input_ids, state, True)

    def _run(
        self, input_ids: torch.Tensor, state: torch.Tensor | None, through: bool
    ) -> tuple[list[tuple[Any, ...]] | None, torch.Tensor]:
        seen = self._local.seen = {}
        self._local.through = through
        try:
            output = self.model.run_block(self.i, input_ids, state)
        finally:
            self._local.seen = None
        if len(self.modules) - 1 not in seen:
            return None, output
        return [seen[n] for n in range(len(self.modules))], output


class _LocalTaps(threading.local):
    seen: dict[int, tuple[Any, ...]] | None = None
    through: bool = False


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The tensor that a module was called with first, if any."""
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)


def capture_inputs(
    model: StreamedModel,
    i: int,
    linears: dict[str, nn.Linear],
    input_ids: torch.Tensor,
    state: torch.Tensor | None,
) -> tuple[torch.Tensor, list[Captured]]:
    """`Capture.run` for one call: input_ids (rows, cols), state (rows, cols, hidden) or None."""
    with Capture(model, i, linears) as capture:
        return capture.run(input_ids, state)


def head_inputs(model: StreamedModel, input_ids: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """What enters the head, (tokens, hidden): the last block's output after the final norm."""
    inputs = model.run_norm(input_ids, state)
    return inputs.reshape(-1, inputs.shape[-1])
