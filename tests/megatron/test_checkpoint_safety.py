"""Checkpoints that ranks read differently or that are half written, and trackers that say nothing: one clear error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_muon.checkpoint import folders
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.loading import FINE, TIMEOUT, Outcome, failure, one_error, save_after_a_step
from tests.pool import RankPool

# --- ranks that read different things --------------------------------------------------------------------------------


@contextlib.contextmanager
def wrong_on_rank_1(what: str) -> Iterator[None]:
    """After loading, one element of a weight or of its momentum is another number on rank 1."""
    from megatron_muon.checkpoint.request import Request

    original = Request.fill

    def fill(self: Request, loaded: dict[str, Any]) -> Any:
        record = original(self, loaded)
        if dist.get_rank() == 1:
            held = next(each for each in self.held if "momentum_buffer" in each.tensors)
            tensor = held.param.data if what == "weight" else held.tensors[what]
            tensor.view(-1)[3] += 1
        return record

    with mock.patch.object(Request, "fill", fill):
        yield


def load_wrongly(layout: Layout, options: dict[str, Any], folder: str, whats: list[str]) -> tuple[list[Outcome], str]:
    """What is raised for each, and the name of the weight."""
    run = harness.start(layout, **options)
    from megatron_muon.plugin.optimizer_state import param_states

    held = next(each for each in param_states(run.optimizer, create=True) if "momentum_buffer" in each.tensors)
    names = {id(param): name for name, param in run.chunks[0].named_parameters()}
    found = []
    for what in whats:
        with wrong_on_rank_1(what):
            found.append(failure(lambda: harness.load_run(run, folder)))
    return found, names[id(held.param)]


@pytest.mark.parametrize(
    "options,whats",
    [
        pytest.param({"bf16": True}, ["weight", "momentum_buffer", "fp32_param"], marks=pytest.mark.slow),
        (
            {"bf16": True, "optimizer": {"muon_master": "remainder", "muon_momentum_dtype": "int8"}},
            ["weight", "momentum_buffer", "momentum_scale", "master_remainder", "master_ties"],
        ),
    ],
    ids=["float32", "other forms"],
)
def test_copies_that_differ_after_loading(
    pool: RankPool, tmp_path: Path, options: dict[str, Any], whats: list[str]
) -> None:
    folder = str(tmp_path / "checkpoint")
    pool.run(save_after_a_step, 2, Layout(), options, folder)
    (mine, name), (theirs, _) = pool.run(load_wrongly, 2, Layout(), options, folder, whats, timeout=TIMEOUT)
    for what, *outcomes in zip(whats, mine, theirs, strict=True):
        text = one_error(outcomes)
        wanted = name if what == "weight" else f"{what} of {name}"
        assert [line.strip() for line in text.splitlines()[1:-1]] == [wanted]


# --- writing over a checkpoint ---------------------------------------------------------------------------------------


def overwrite_and_fail(first: str, second: str, late: bool) -> tuple[Outcome, Outcome, list[float]]:
    """A save that writes over ``second`` and is interrupted; what loading the two then gives."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    run = harness.start(Layout())
    run.losses(1)
    harness.save_run(run, first)
    losses = run.losses(1)
    harness.save_run(run, second)
    run.losses(1)
    original = TorchDistSaveShardedStrategy.save

    def save(self: Any, *args: Any) -> None:
        if late:
            original(self, *args)
        raise KeyboardInterrupt

    state = harness.model_state(run.chunks)
    state["optimizer"] = run.optimizer.sharded_state_dict(state, metadata=harness.CHECKPOINT_METADATA)
    with mock.patch.object(TorchDistSaveShardedStrategy, "save", save), contextlib.suppress(KeyboardInterrupt):
        dist_checkpointing.save({**state, "step": run.step}, second)
    error = failure(lambda: harness.load_run(run, second))
    other = failure(lambda: harness.load_run(run, first))
    return error, other, [*losses, *run.losses(1)]


@pytest.mark.parametrize("late", [pytest.param(False, marks=pytest.mark.slow), True])
def test_interrupted_writing_over_a_checkpoint(pool: RankPool, tmp_path: Path, late: bool) -> None:
    """Before the data is written, or between the index and the last mark."""
    first, second = tmp_path / "iter_0000001", tmp_path / "iter_0000002"
    results = pool.run(overwrite_and_fail, 2, str(first), str(second), late, timeout=TIMEOUT)
    assert [folders.is_whole(folder) for folder in (first, second)] == [True, False]
    assert folders.newest(tmp_path) == 1
    text = one_error([error for error, _, _ in results])
    assert str(second) in text and "--ckpt-step" in text, text
    for _, other, (once, again) in results:
        assert other == FINE
        assert once == again


# --- the tracker -----------------------------------------------------------------------------------------------------


def read_tracker(path: str) -> Outcome | tuple[int, bool]:
    """With this package's hooks."""
    import megatron_muon

    megatron_muon.install()
    from megatron.training import checkpointing

    found: list[tuple[int, bool]] = []
    error = failure(lambda: found.append(checkpointing.read_metadata(path)))
    return found[0] if found else error


def make_folders(root: Path, marks: dict[int, tuple[str, ...]]) -> None:
    for iteration, names in marks.items():
        folder = root / f"iter_{iteration:07d}"
        folder.mkdir()
        (folder / "__0_0.distcp").write_bytes(b"data")
        for name in names:
            (folder / name).write_text("{}")


BOTH = (".metadata", "metadata.json")
GARBLED = {"empty": b"", "blank": b" \n", "zeros": b"\0\0\0", "words": b"iter 2", "bytes": b"\xff\xfe2"}


@pytest.mark.parametrize("content", GARBLED.values(), ids=GARBLED)
def test_tracker_that_names_nothing(pool: RankPool, tmp_path: Path, content: bytes) -> None:
    make_folders(tmp_path, {1: BOTH, 3: BOTH, 20: (), 21: BOTH[:1], 22: BOTH[1:]})
    tracker = tmp_path / folders.TRACKER
    tracker.write_bytes(content)
    assert pool.run(read_tracker, 2, str(tracker), timeout=TIMEOUT) == [(3, False)] * 2
    assert tracker.read_bytes() == content


def test_tracked_iteration_that_was_being_written_over(pool: RankPool, tmp_path: Path) -> None:
    """A run that saves an iteration once more and is killed goes on from the one before."""
    make_folders(tmp_path, {3: BOTH, 4: BOTH})
    folders.write_tracker(tmp_path, "4")
    tracker = str(tmp_path / folders.TRACKER)
    assert pool.run(read_tracker, 2, tracker, timeout=TIMEOUT) == [(4, False)] * 2
    folders.forget(tmp_path / "iter_0000004")
    assert pool.run(read_tracker, 2, tracker, timeout=TIMEOUT) == [(3, False)] * 2


def test_tracker_that_names_nothing_where_nothing_is_whole(pool: RankPool, tmp_path: Path) -> None:
    make_folders(tmp_path, {1: BOTH[:1], 2: ()})
    tracker = tmp_path / folders.TRACKER
    tracker.write_text("")
    text = one_error(pool.run(read_tracker, 2, str(tracker), timeout=TIMEOUT))
    assert str(tracker) in text and "--load" in text


@pytest.mark.parametrize("content,wanted", [("1", (1, False)), ("1\n", (1, False)), ("release", (0, True))])
def test_good_tracker_is_as_ever(pool: RankPool, tmp_path: Path, content: str, wanted: tuple[int, bool]) -> None:
    make_folders(tmp_path, {1: BOTH, 3: BOTH})
    tracker = tmp_path / folders.TRACKER
    tracker.write_text(content)
    assert pool.run(read_tracker, 2, str(tracker), timeout=TIMEOUT) == [wanted] * 2
