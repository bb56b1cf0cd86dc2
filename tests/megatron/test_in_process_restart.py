"""A run that goes on in the same processes: all is torn down after a failure, and built and loaded again.

As ``nvidia-resiliency-ext`` restarts ``pretrain``: process groups are destroyed, modules stay imported. What has failed
is still there, as tracebacks and cycles keep it: nothing of it may be waited for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from tests.megatron import harness
from tests.megatron.harness import Layout, Run
from tests.megatron.loading import TIMEOUT, failure
from tests.pool import COLLECTIVE_TIMEOUT_S, RankPool


class CrashError(Exception):
    pass


def fail(*args: Any, **kwargs: Any) -> Any:
    raise CrashError


class Abandoned:
    """A gather whose other ranks are gone. Not a real one: gloo now and then ends a process that keeps it."""

    def wait(self) -> None:
        raise AssertionError("a gather of the run that was torn down is waited for")


def in_step(run: Run, folder: str) -> None:
    """Some weights are being gathered."""
    groups = [group for chunk in run.chunks for group in chunk.bucket_groups]
    started: list[int] = []
    if not run.layout.layer_wise:
        run.optimizer.step = fail
    else:
        for group in groups:
            group.start_param_sync = lambda start=group.start_param_sync: (
                fail() if len(started) > 1 else (started.append(1), start())
            )
    try:
        run.losses(1)
    finally:
        for group in groups:
            if getattr(group, "param_gather_handle", None) is not None:
                group.param_gather_handle.wait()
                group.param_gather_handle = Abandoned()


def in_save(run: Run, folder: str) -> None:
    """When the state was asked for, before it is written."""
    with mock.patch("megatron.core.dist_checkpointing.save", fail):
        harness.save_run(run, f"{folder}-{run.step}-again")


def in_load(run: Run, folder: str) -> None:
    """When the state was read, before the optimizer takes it."""
    with mock.patch.object(harness, "load_model", fail):
        harness.load_run(run, folder)


def in_resolution(run: Run, folder: str) -> None:
    """On one rank, while it is decided what to read: all fail."""
    problem = mock.patch("megatron_muon.checkpoint.request.choose", fail)
    with problem if dist.get_rank() == 1 else contextlib.nullcontext():
        harness.load_run(run, folder)


CRASHES: list[Callable[[Run, str], None]] = [in_resolution, in_step, in_save, in_load, fail]


def build_anew(layout: Layout, store: Path) -> None:
    from megatron.core import parallel_state

    world = dist.get_world_size()
    rank = dist.get_rank()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(store), world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )


def restart(layout: Layout, options: dict[str, Any], crashes: int, root: str) -> tuple[list[float], list[Any]]:
    """Two losses after a checkpoint, and those after each failure with its name."""
    run = harness.start(layout, num_layers=2, **options)
    run.losses(2)
    harness.save_run(run, f"{root}/saved")
    expected, found, dead = run.losses(2), [], []
    for number, crash in enumerate(CRASHES[:crashes]):
        name, _ = failure(lambda crash=crash, run=run: crash(run, f"{root}/saved"))  # type: ignore[misc]
        dead.append(run)
        build_anew(layout, Path(root) / f"store{number}")
        run = harness.start(layout, num_layers=2, seed=3 + number, **options)
        harness.load_run(run, f"{root}/saved")
        found.append((name, run.losses(2)))
    return expected, found


LAYER_WISE = Layout(layer_wise=True), {"bf16": True}


@pytest.mark.parametrize(
    ("layout", "options", "crashes"),
    [
        (*LAYER_WISE, 2),
        pytest.param(*LAYER_WISE, len(CRASHES), marks=pytest.mark.slow),
        pytest.param(Layout(), {}, len(CRASHES), marks=pytest.mark.slow),
        pytest.param(Layout(tp=2), {}, len(CRASHES), marks=pytest.mark.slow),
    ],
)
def test_a_run_is_built_again_in_the_same_processes(
    pool: RankPool, tmp_path: Path, layout: Layout, options: dict[str, Any], crashes: int
) -> None:
    for expected, found in pool.run(restart, 2, layout, options, crashes, str(tmp_path), timeout=TIMEOUT):
        assert found == [("CrashError", expected)] * crashes
