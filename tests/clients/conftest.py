"""Ranks that have imported the frameworks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.pool import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Gloo ranks of the frameworks, which take a quarter of a minute to import."""
    ranks = RankPool(preload="tests.clients.preload")
    yield ranks
    ranks.close()
