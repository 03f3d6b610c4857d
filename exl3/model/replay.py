"""Parts of a block that would compute the same again give back what they gave."""

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from exl3.errors import JobError


class Replay:
    """Remembers what modules of a block gave for each run, once their weights are final.

    Runs are told apart by what `of` names them; outside of it modules compute as ever. Takes one
    output a module and run. May be used from several threads at once.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[nn.Module, Hashable], _Kept] = {}
        self._forwards: dict[nn.Module, Callable[..., Any]] = {}
        self._local = _Local()

    @contextmanager
    def of(self, run: Hashable) -> Iterator[None]:
        """Names the run that this thread makes inside."""
        self._local.run = run
        try:
            yield
        finally:
            self._local.run = None

    def settle(self, module: nn.Module) -> None:
        """From now on the module's weights do not change, in any of the runs."""
        if module in self._forwards:
            return
        forward = self._forwards[module] = module.forward

        def replaying(*args: Any, **kwargs: Any) -> Any:
            run = self._local.run
            if run is None:
                return forward(*args, **kwargs)
            if (module, run) not in self._kept:
                self._kept[module, run] = _Kept.of(forward(*args, **kwargs))
            return self._kept[module, run].output()

        module.forward = replaying

    def clear(self) -> None:
        """Forgets everything; modules compute as ever."""
        for module, forward in self._forwards.items():
            module.forward = forward
        self._forwards.clear()
        self._kept.clear()


class _Local(threading.local):
    run: Hashable | None = None


class _Kept:
    """An output: a tensor, or a tuple whose first is one. What else is in it (attention weights)
    is for nobody inside a block, and would take much."""

    def __init__(self, tensor: torch.Tensor, others: int | None):
        self.tensor, self.others, self.version = tensor, others, tensor._version

    @classmethod
    def of(cls, output: Any) -> "_Kept":
        if isinstance(output, tuple):
            return cls(output[0], len(output) - 1)
        return cls(output, None)

    def output(self) -> Any:
        if self.tensor._version != self.version:
            raise JobError("A block overwrites what its parts give; convert with --no_correction.")
        return self.tensor if self.others is None else (self.tensor, *[None] * self.others)
