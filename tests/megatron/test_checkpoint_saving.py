"""Other ways to save and load: in the background, by another process, by all ranks in parallel. The same tensors."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader

from megatron_muon.checkpoint import folders, stored
from tests.checkpoints import differences
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.loading import FINE, TIMEOUT, Outcome, failure, load_each, one_error
from tests.pool import RankPool
from tests.slow import with_slow

WAYS = {
    "plain": Layout(),
    "layer_wise": Layout(layer_wise=True),
    "tensor_parallel": Layout(tp=2),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"bf16": True, "optimizer": {"muon_master": "remainder", "muon_momentum_dtype": "bf16"}},
    "layer_wise": {"bf16": True, "optimizer": {"muon_master": "remainder", "muon_momentum_dtype": "int8"}},
    "tensor_parallel": {"bf16": True},
}
"""How numbers are kept: copies are saved of some, others are saved where they lie."""


def whole_state(run: harness.Run) -> dict[str, Any]:
    """Of model and optimizer, as ``harness.save_run`` saves it."""
    state = harness.model_state(run.chunks)
    optimizer = run.optimizer.sharded_state_dict(state, metadata=harness.CHECKPOINT_METADATA)
    return {**state, "optimizer": optimizer, "step": run.step}


def make_folder(folder: str) -> None:
    if dist.get_rank() == 0:
        Path(folder).mkdir(parents=True)
    dist.barrier()


def save_in_the_background(way: str, plain: list[str], background: list[str]) -> list[tuple[bool, bool]]:
    """By the first rank, and by all in parallel, while a step is trained: whether it is whole before and after."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    run = harness.start(WAYS[way], **OPTIONS[way])
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    first: Any = TorchDistSaveShardedStrategy()
    found = []
    for strategy, now, later in zip(
        (first, FullyParallelSaveStrategyWrapper(first, group, True)), plain, background, strict=True
    ):
        run.losses(1)
        harness.save_run(run, now)
        make_folder(later)
        state = whole_state(run)
        request = dist_checkpointing.save(state, later, strategy, async_sharded_save=True, async_strategy="mcore")
        queue = AsyncCallsQueue()
        queue.schedule_async_request(request)
        run.losses(1)
        before = folders.is_whole(Path(later))
        dist.barrier()
        queue.close()
        found.append((before, folders.is_whole(Path(later))))
    return found


@pytest.mark.parametrize("way", with_slow(WAYS, "plain", "tensor_parallel"))
def test_saved_in_the_background_while_training(pool: RankPool, tmp_path: Path, way: str) -> None:
    plain, background = ([str(tmp_path / f"{name}{number}") for number in (1, 2)] for name in ("plain", "background"))
    results = pool.run(save_in_the_background, 2, way, plain, background, timeout=TIMEOUT)
    assert results == [[(False, True)] * 2] * 2
    for now, later in zip(plain, background, strict=True):
        assert differences(now, later) == []
    assert pool.run(load_each, 2, WAYS[way], OPTIONS[way], background, timeout=TIMEOUT) == [[FINE] * 2] * 2


def save_by_the_persistent_worker(
    way: str, plain: list[str], background: list[str], killed: str
) -> tuple[list[tuple[bool, bool]], Outcome]:
    """As ``--async-save --use-persistent-ckpt-worker --async-strategy mcore`` does, twice; then a worker is killed."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    run = harness.start(WAYS[way], **OPTIONS[way])
    queue = AsyncCallsQueue(persistent=True)
    found = []
    try:
        for now, later in zip(plain, background, strict=True):
            run.losses(1)
            harness.save_run(run, now)
            make_folder(later)
            request = dist_checkpointing.save(whole_state(run), later, async_sharded_save=True, async_strategy="mcore")
            queue.schedule_async_request(request)
            run.losses(3)
            before = folders.is_whole(Path(later))
            dist.barrier()
            queue.maybe_finalize_async_calls(blocking=True)
            found.append((before, folders.is_whole(Path(later))))
        worker = queue._persistent_caller.process
        if dist.get_rank() == 1:  # while it copies tensors, which the run waits for
            os.kill(worker.pid, signal.SIGSTOP)
            threading.Timer(0.5, os.kill, (worker.pid, signal.SIGKILL)).start()
        make_folder(killed)
        request = dist_checkpointing.save(whole_state(run), killed, async_sharded_save=True, async_strategy="mcore")
        queue.schedule_async_request(request)
        run.losses(1)
        told = failure(lambda: queue.maybe_finalize_async_calls(blocking=True))
        worker.join(TIMEOUT)
        return found, told
    finally:
        queue.close(abort=True)


@pytest.mark.parametrize(
    "way", ["layer_wise", *(pytest.param(way, marks=pytest.mark.slow) for way in ("plain", "tensor_parallel"))]
)
def test_saved_by_the_persistent_worker_while_training(pool: RankPool, tmp_path: Path, way: str) -> None:
    """Its process starts without the redirects to the CPU, and shares the memory of weights that training changes."""
    plain, background = ([str(tmp_path / f"{name}{number}") for number in (1, 2)] for name in ("plain", "background"))
    killed = str(tmp_path / "killed")
    results = pool.run(save_by_the_persistent_worker, 2, way, plain, background, killed, timeout=2 * TIMEOUT)
    assert [found for found, _ in results] == [[(False, True)] * 2] * 2
    assert "of rank 1: exit status -9" in one_error([told for _, told in results])
    assert not folders.is_whole(Path(killed))
    for now, later in zip(plain, background, strict=True):
        assert differences(now, later) == []
    assert pool.run(load_each, 2, WAYS[way], OPTIONS[way], background[1:], timeout=TIMEOUT) == [[FINE]] * 2


def staged() -> tuple[bool, bool]:
    """Whether a tensor that is staged for writing is the one that was given: of own, and of shared memory."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    found = []
    for tensor in (torch.ones(3), torch.ones(3).share_memory_()):
        ((_, _, (_, [(_, copy)])),) = FileSystemWriterAsync.preload_tensors([("file", "key", ([], [(None, tensor)]))])
        assert torch.equal(copy, tensor)
        found.append(copy.data_ptr() == tensor.data_ptr())
    return found[0], found[1]


def test_what_another_process_writes_is_a_copy(pool: RankPool) -> None:
    assert pool.run(staged, 1) == [(True, False)]


def save_and_load_in_parallel(way: str, plain: str, parallel: str, again: str) -> list[float]:
    """Every data-parallel rank writes and reads a part; losses before and after."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelLoadStrategyWrapper,
        FullyParallelSaveStrategyWrapper,
    )
    from megatron.core.dist_checkpointing.strategies.torch import (
        TorchDistLoadShardedStrategy,
        TorchDistSaveShardedStrategy,
    )

    run = harness.start(WAYS[way], **OPTIONS[way])
    run.losses(2)
    harness.save_run(run, plain)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    make_folder(parallel)
    strategy = FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy(), group, True)
    dist_checkpointing.save(whole_state(run), parallel, strategy)
    losses = run.losses(1)

    state = harness.model_state(run.chunks)
    template = run.optimizer.sharded_state_dict(state, is_loading=True, metadata=harness.CHECKPOINT_METADATA)
    loading = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), group)
    loaded = dist_checkpointing.load({**state, "optimizer": template}, parallel, loading)
    harness.unwrap(run.chunks[0]).load_state_dict(loaded["model"])
    run.optimizer.load_state_dict(loaded["optimizer"])
    run.step = loaded["step"]
    harness.save_run(run, again)
    return [*losses, *run.losses(1)]


@pytest.mark.parametrize("way", with_slow(WAYS, "plain", "tensor_parallel"))
def test_saved_and_loaded_by_all_ranks_in_parallel(pool: RankPool, tmp_path: Path, way: str) -> None:
    names = [str(tmp_path / name) for name in ("plain", "parallel", "again")]
    for once, again in pool.run(save_and_load_in_parallel, 2, way, *names, timeout=TIMEOUT):
        assert once == again
    assert differences(names[0], names[1]) == []
    assert differences(names[0], names[2]) == []


def save_over_and_look(folder: str) -> tuple[list[dict[str, int]], list[float], list[float]]:
    """Load, save over what was loaded, and load in the same process again: how often each question is asked."""
    read = FileSystemReader.read_metadata
    run, again = harness.start(Layout(layer_wise=True)), harness.start(Layout(layer_wise=True))
    asked = []
    for _ in range(2):
        run.losses(1)
        harness.save_run(run, folder)
        with (
            mock.patch.object(FileSystemReader, "read_metadata", autospec=True, side_effect=read) as index,
            mock.patch.object(stored, "check_marks", wraps=stored.check_marks) as marks,
            mock.patch.object(stored, "sizes_in", wraps=stored.sizes_in) as sizes,
        ):
            harness.load_run(again, folder)
        asked.append({"index": index.call_count, "marks": marks.call_count, "sizes": sizes.call_count})
    losses = run.losses(1)
    return asked, losses, again.losses(1)


def test_the_first_rank_looks_and_each_reads_the_index_once(pool: RankPool, tmp_path: Path) -> None:
    results = pool.run(save_over_and_look, 2, str(tmp_path / "checkpoint"), timeout=TIMEOUT)
    for rank, (asked, losses, again) in enumerate(results):
        assert asked == [{"index": 1, "marks": 1 - rank, "sizes": 1 - rank}] * 2
        assert again == losses
