"""Modules on ranks that are not there leave a process as it was."""

from __future__ import annotations

import torch.distributed as dist

from tests.megatron import harness
from tests.megatron.fused_modules import (
    GDN,
    gpt,
    weights,
)
from tests.megatron.harness import Layout
from tests.pool import RankPool


def losses_after_fake_worlds() -> tuple[list[float], list[float]]:
    """A real run in this process before and after the fake worlds."""

    def run() -> list[float]:
        losses = harness.start(Layout()).losses(2)
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        return losses

    before = run()
    weights(gpt, GDN, [{}], (8,))
    return before, run()


def test_fake_groups_leave_no_state_behind(pool: RankPool) -> None:
    before, after = pool.run(losses_after_fake_worlds, 1)[0]
    assert before == after
    assert pool.run(dist_backend, 2) == ["gloo", "gloo"]


def dist_backend() -> str:
    assert dist.get_world_size() == 2
    return str(dist.get_backend())
