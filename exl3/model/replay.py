"""Parts of a block that would compute the same again give back what they gave."""

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from exl3.errors import JobError


class Replay:
    """Remembers what modules of a block gave for each run, once their weights are final.

    Runs are told apart by what `of` names them; outside of it modules compute as ever. Takes one
    output a module and run, and one input for each linear that is watched. May be used from several
    threads at once.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[nn.Module, Hashable], _Kept] = {}
        self._forwards: dict[nn.Module, Callable[..., Any]] = {}
        self._watched: dict[nn.Module, RemovableHandle] = {}
        self._entered: dict[tuple[nn.Module | None, Hashable], _Kept] = {}
        # A linear → an output of its module, if that is the linear's own; None: it is not.
        self._ends: dict[nn.Module, _Kept | None] = {}
        self._local = _Local()

    @contextmanager
    def of(self, run: Hashable) -> Iterator[None]:
        """Names the run that this thread makes inside."""
        self._local.run = run
        try:
            yield
        finally:
            self._local.run = None

    def watch(self, linear: nn.Module) -> None:
        """What enters the linear from now on is what will enter it in the same run for good. If the
        module around it, once settled, gives nothing but the linear's output, that is all there is
        to compute."""

        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._local.run is not None:
                self._entered[linear, self._local.run] = _Kept(args[0], None)

        self._watched[linear] = linear.register_forward_pre_hook(note)

    def settle(self, module: nn.Module) -> None:
        """From now on the module's weights do not change, in any of the runs."""
        if module in self._forwards:
            return
        forward = self._forwards[module] = module.forward
        last = next((m for m in module.modules() if m in self._watched), None)
        if last is not None:
            self._watched.pop(last).remove()

        def replaying(*args: Any, **kwargs: Any) -> Any:
            run = self._local.run
            if run is None:
                return forward(*args, **kwargs)
            if (module, run) not in self._kept:
                entered = self._entered.pop((last, run), None)
                kept = self._shortened(last, entered)
                if kept is None:
                    kept = _Kept.of(forward(*args, **kwargs))
                    self._compare(last, entered, kept)
                self._kept[module, run] = kept
            return self._kept[module, run].output()

        module.forward = replaying

    def _shortened(self, last: nn.Module | None, entered: "_Kept | None") -> "_Kept | None":
        """What a module gives, if that is known to be what its last linear gives."""
        form = self._ends.get(last)
        if entered is None or entered.overwritten or form is None:
            return None
        return form.like(last(entered.tensor))

    def _compare(self, last: nn.Module | None, entered: "_Kept | None", kept: "_Kept") -> None:
        """Learns from one run whether a module gives what its last linear gives."""
        if entered is None or entered.overwritten or last in self._ends:
            return
        own = last(entered.tensor)
        same = own.shape == kept.tensor.shape and torch.equal(own, kept.tensor)
        self._ends[last] = kept if same else None

    def clear(self) -> None:
        """Forgets everything; modules compute as ever."""
        for module, forward in self._forwards.items():
            module.forward = forward
        for hook in self._watched.values():
            hook.remove()
        for kept in (self._forwards, self._kept, self._watched, self._entered, self._ends):
            kept.clear()


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

    def like(self, tensor: torch.Tensor) -> "_Kept":
        """An output of the same form."""
        return _Kept(tensor, self.others)

    @property
    def overwritten(self) -> bool:
        return self.tensor._version != self.version

    def output(self) -> Any:
        if self.overwritten:
            raise JobError("A block overwrites what its parts give; convert with --no_correction.")
        return self.tensor if self.others is None else (self.tensor, *[None] * self.others)
