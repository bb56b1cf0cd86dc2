"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_muon import cpu
from tests.megatron.planner import Planner
from tests.pool import RankPool

# Matrices of tests are tiny: threads would only wait for one another, for seconds where a core has other work.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Gloo ranks that live as long as the session."""
    ranks = RankPool()
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def planner() -> Iterator[Planner]:
    """A process that plans."""
    made = Planner()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def this_process_stays_what_it_was() -> Iterator[None]:
    """Redirects to the CPU belong into ranks: here they would turn the next test's ``device="cuda"`` into the CPU."""
    yield
    left = cpu.is_installed()
    cpu.uninstall()
    assert not left, "a test has left megatron_muon.cpu installed in pytest's own process"
