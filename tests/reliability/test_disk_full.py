"""A disk without room: what was saved before stays, and all ranks say where and what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muon.checkpoint import conversion, folders
from megatron_muon.commands import plot
from megatron_muon.monitor import metrics
from megatron_muon.monitor.recorder import Recorder
from tests.checkpoints import differences
from tests.megatron import harness
from tests.megatron.harness import Layout, Run
from tests.megatron.loading import Outcome, failure, one_error
from tests.megatron.test_checkpoint_saving import make_folder, whole_state
from tests.megatron.test_nonfinite import state_of
from tests.pool import RankPool

SIZE = 8 << 20
SCALARS = {"learning_rate": 0.1, "grad_norm": 1.0}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of some MiB; where nobody may mount one, a folder, and :func:`full` bounds the size of files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def full(disk: Path, left: int = 0) -> Iterator[None]:
    """Within, there is no room on the disk but for ``left`` bytes; one process is to fill it."""
    filler = disk / "filler"
    if os.path.ismount(disk):
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(1 << 12)):
                pass
        with filler.open("r+b") as file:
            file.truncate(max(0, filler.stat().st_size - left))
        try:
            yield
        finally:
            filler.unlink()
    else:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (left, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def full_for_all(disk: str, left: int = 0) -> Iterator[None]:
    """As :func:`full`, for all ranks."""
    fills = dist.get_rank() == 0 or not os.path.ismount(disk)
    with full(Path(disk), left) if fills else contextlib.nullcontext():
        dist.barrier()
        yield
        dist.barrier()


@contextlib.contextmanager
def full_from(name: str) -> Iterator[None]:
    """From the moment at which a process opens a file of this name, which is small, no file may become larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    names = [name]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if names and event == "open" and names[0] in str(arguments[0]) and set(str(arguments[1])) & set("wx"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))

    sys.addaudithook(hook)  # for good
    try:
        yield
    finally:
        names.clear()
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save(run: Run, folder: str, way: str) -> None:
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    if way == "plain":
        harness.save_run(run, folder)
        return
    strategy: Any = TorchDistSaveShardedStrategy()
    if way == "parallel":
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelSaveStrategyWrapper(strategy, group, True)
    queue = AsyncCallsQueue(persistent=way == "worker")
    try:
        options = {"async_sharded_save": True, "async_strategy": "mcore"}
        queue.schedule_async_request(dist_checkpointing.save(whole_state(run), folder, strategy, **options))
        queue.maybe_finalize_async_calls(blocking=True)
    finally:
        queue.close(abort=True)


def fail_to_save(disk: str, ways: list[str]) -> tuple[list[Outcome], list[Outcome], list[bool]]:
    """Save; then fail to, in each way: for tensors, for the index, and for the mark. What was saved is as it was."""
    from megatron.core.dist_checkpointing import core

    run = harness.start(Layout(layer_wise=True), bf16=True, num_layers=2)
    run.losses(1)
    first = f"{disk}/iter_0000001"
    harness.save_run(run, first)
    losses = run.losses(1)
    found = []
    for number, way in enumerate(ways, 2):
        folder = f"{disk}/iter_{number:07d}"
        make_folder(folder)
        with full_for_all(disk):
            found.append(failure(lambda folder=folder, way=way: save(run, folder, way)))
    late = []
    for number, name in enumerate((".metadata", core.CONFIG_FNAME), 10):
        folder = f"{disk}/iter_{number:07d}"
        make_folder(folder)
        with full_from(name):
            late.append(failure(lambda folder=folder: harness.save_run(run, folder)))
    state = state_of(run)
    harness.load_run(run, first)
    same = run.losses(1) == losses
    return found, late, [same, *(torch.equal(state[name], each) for name, each in state_of(run).items())]


@pytest.mark.parametrize(
    "ways", [["plain", "background"], pytest.param(["parallel", "worker"], marks=pytest.mark.slow)]
)
def test_a_save_that_finds_no_room_ends_all_ranks(pool: RankPool, disk: Path, ways: list[str]) -> None:
    results = pool.run(fail_to_save, 2, str(disk), ways)
    for number in range(len(ways)):
        text = one_error([found[number] for found, _, _ in results])
        assert (
            text.startswith(f"{disk}/iter_{number + 2:07d} could not be written (Worker failure: ") and "--save" in text
        )
        assert "; 0 B are free there" in text or not os.path.ismount(disk), text
    for number, folder in enumerate(("iter_0000010", "iter_0000011")):
        text = one_error([late[number] for _, late, _ in results])
        assert f"{disk}/{folder} could not be written (" in text and os.strerror(errno.EFBIG) in text, text
    assert all(all(same) for _, _, same in results)
    assert folders.newest(disk) == 1


def sleep_without_room(disk: str) -> tuple[Outcome, bool, list[float], list[float]]:
    import megatron_muon

    run, other = (harness.start(Layout(layer_wise=True), bf16=True, num_layers=2) for _ in range(2))
    run.losses(1), other.losses(1)
    before = state_of(run)
    with full_for_all(disk):
        told = failure(lambda: megatron_muon.sleep(run.optimizer, to=disk))
    same = all(torch.equal(before[name], tensor) for name, tensor in state_of(run).items())
    return told, same, run.losses(1), other.losses(1)


def test_state_that_cannot_go_to_sleep_stays(pool: RankPool, disk: Path) -> None:
    for (kind, text), same, losses, others in pool.run(sleep_without_room, 2, str(disk)):
        assert kind == "OSError" and str(disk) in text and "nothing is lost: give sleep(to=...) a folder" in text
        assert same and losses == others
    assert list(disk.iterdir()) == []


def test_a_record_without_room_is_told_and_read(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run goes on without it: what was recorded before is there, and the next start goes on writing."""
    path = disk / "metrics.jsonl"
    recorder = Recorder(path, 0, {"train_iters": 9})
    losses = {"lm loss": torch.tensor(1.0)}
    for iteration in range(1, 9):
        recorder.add(losses, False)
        with full(disk) if iteration > 4 else contextlib.nullcontext():
            recorder.log(iteration, 0.1, True, **SCALARS, note="x" * 2000)
    told = capsys.readouterr().out
    assert told.count("WARNING") == 1 and str(path) in told and "nothing more is recorded" in told
    found = [line for line in path.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
    assert len(found) >= 4
    assert metrics.read(path) is not None
    again = Recorder(path, 4, {"train_iters": 9})
    again.add(losses, False)
    again.log(5, 0.1, True, **SCALARS)
    assert metrics.read(path) is not None
    with full(disk), pytest.raises(OSError, match=r"No space left|too large"):
        Recorder(disk / "other.jsonl", 0, {"text": "x" * 9000})


def save_one(folder: str) -> None:
    run = harness.start(Layout(), num_layers=2)
    run.losses(1)
    harness.save_run(run, folder)


def test_a_conversion_without_room_goes_on_later(pool: RankPool, tmp_path: Path, disk: Path) -> None:
    source, target = tmp_path / "run" / "iter_0000001", disk / "adam"
    pool.run(save_one, 1, str(source))
    conversion.convert(source, tmp_path / "straight", "adam")
    for left in (0, 1 << 14, 1 << 17):
        with full(disk, left):
            kind, text = failure(lambda: conversion.convert(source, target, "adam"))
        assert kind == "CheckpointError" and str(target) in text, text
        assert folders.newest(target) is None
    conversion.convert(source, target, "adam")
    assert differences(str(tmp_path / "straight" / source.name), str(target / source.name)) == []


def test_a_picture_without_room_is_refused_by_name(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, picture = tmp_path / "metrics.jsonl", disk / "losses.png"
    recorder = Recorder(record, 0, {"train_iters": 1})
    recorder.add({"lm loss": torch.tensor(1.0)}, False)
    recorder.log(1, 0.1, True, **SCALARS)
    with full(disk), pytest.raises(SystemExit, match="2"):
        plot.main([str(record), "--out", str(picture)])
    told = capsys.readouterr().err
    assert f"error: {picture}: " in told and "there is room for it" in told
