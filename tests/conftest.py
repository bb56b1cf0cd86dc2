"""Fixtures of all tests."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

from tests.pool import RankPool
from tests.slow_cases import SLOW_CASES

# Matrices of tests are tiny: threads would only wait for one another, for seconds where a core has other work.
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases that ``make test`` leaves out."""
    slow = re.compile("|".join(SLOW_CASES))
    for item in items:
        if slow.search(item.nodeid):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Gloo ranks that live as long as the session."""
    ranks = RankPool()
    yield ranks
    ranks.close()
