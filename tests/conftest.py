"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.pool import RankPool

# Matrices of tests are tiny: threads would only wait for one another, for seconds where a core has other work.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Gloo ranks that live as long as the session."""
    ranks = RankPool()
    yield ranks
    ranks.close()
