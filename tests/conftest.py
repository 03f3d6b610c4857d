"""Fixtures that several files share."""

from collections.abc import Iterator
from unittest import mock

import pytest
from tiny_quants import Tiny, make_tiny

from exl3.quant import scale

ALL_TILES = scale.STRATA
FEW_TILES = ((0.9, 4), (0.1, 4))


@pytest.fixture(scope="session", autouse=True)
def few_tiles() -> Iterator[None]:
    """Scales are searched on 8 tiles instead of 64, which takes most of a tiny conversion's time.
    Programs that tests start do as always."""
    with mock.patch.object(scale, "STRATA", FEW_TILES):
        yield


@pytest.fixture
def all_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales are searched as always: for tests of quality."""
    monkeypatch.setattr(scale, "STRATA", ALL_TILES)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny model and its quants; made once, so nothing may be changed in them."""
    return make_tiny(tmp_path_factory.mktemp("tiny"))
