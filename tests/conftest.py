"""Fixtures that several files share."""

import pytest
from tiny_quants import Tiny, make_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny model and its quants; made once, so nothing may be changed in them."""
    return make_tiny(tmp_path_factory.mktemp("tiny"))
