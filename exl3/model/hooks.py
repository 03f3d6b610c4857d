"""Hooks on a model's modules that are there for a while."""

from collections.abc import Iterator
from types import TracebackType
from typing import TypeVar

from torch.utils.hooks import RemovableHandle

Own = TypeVar("Own", bound="Hooks")


class Hooks:
    """What `_register` hooks on is there inside a `with` only."""

    _handles: list[RemovableHandle]

    def _register(self) -> Iterator[RemovableHandle]:
        raise NotImplementedError

    def __enter__(self: Own) -> Own:
        self._handles = list(self._register())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._handles:
            self._handles.pop().remove()
