"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.pool import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Gloo ranks that live as long as the session."""
    ranks = RankPool()
    yield ranks
    ranks.close()
