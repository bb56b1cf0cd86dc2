"""Fixtures of tests on Megatron-Core models."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.megatron.crossing")

from tests.megatron.crossing import Crossing  # noqa: E402
from tests.pool import RankPool  # noqa: E402


@pytest.fixture(scope="session")
def crossing(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Crossing:
    """Checkpoints of every layout, loaded at every layout."""
    return Crossing(pool, tmp_path_factory.mktemp("crossing"))
