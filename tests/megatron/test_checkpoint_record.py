"""The record of an optimizer: saved by the first rank under a key of its own, told once, read in its older form."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_muon.checkpoint.keys import RECORD_KEY
from megatron_muon.checkpoint.record import RECORD, Recorder
from megatron_muon.checkpoint.stored import Stored
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.loading import TIMEOUT, failure, one_error
from tests.megatron.test_checkpoint_damage import flip_bit
from tests.pool import RankPool
from tests.slow import with_slow

LAYOUTS = {"tensor_parallel": Layout(tp=2), "layer_wise": Layout(layer_wise=True)}


def state_of(run: harness.Run, is_loading: bool = False) -> dict[str, Any]:
    state = harness.model_state(run.chunks)
    optimizer = run.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=harness.CHECKPOINT_METADATA)
    return {**state, "optimizer": optimizer}


def records(run: harness.Run, anew: bool = False) -> tuple[dict[str, Any] | None, int]:
    """The record as it would be saved now, and the bytes that this rank sends for it to the first."""
    sent, original = [0], dist.gather_object

    def counted(value: Any, *args: Any, **kwargs: Any) -> None:
        sent[0] += len(pickle.dumps(value))
        original(value, *args, **kwargs)

    dist.gather_object = counted
    canonical = run.optimizer.sharded_state_dict.__self__
    kept = canonical._recorder
    canonical._recorder = Recorder() if anew else kept
    try:
        return state_of(run)["optimizer"]["record"].data, sent[0]
    finally:
        dist.gather_object, canonical._recorder = original, kept


def save_several_times(layout: Layout) -> list[tuple[bool, int]]:
    """At each save, whether the record is that of one that was never saved before, and the bytes sent for it."""
    run = harness.start(layout, bf16=True)
    found = []

    def save() -> None:
        run.losses(1)
        record, sent = records(run)
        found.append((record == records(run, anew=True)[0], sent))
        assert (record is None) == (dist.get_rank() != 0)
        assert record is None or (record["step"], record["version"]) == (len(found), 3)

    save()
    save()
    for optimizer in run.optimizer.chained_optimizers:
        for group in optimizer.param_groups:
            group["momentum" if "momentum" in group else "max_lr"] = 0.25
    save()
    save()
    return found


@pytest.mark.parametrize("layout", with_slow(LAYOUTS, "tensor_parallel"))
def test_what_stays_the_same_between_saves_is_told_once(pool: RankPool, layout: str) -> None:
    for saves in pool.run(save_several_times, 2, LAYOUTS[layout], timeout=TIMEOUT):
        assert all(same for same, _ in saves)
        first, second, changed, after = (sent for _, sent in saves)
        assert second == after < first / 3 and changed > 2 * second


def save_in_both_forms(folders: list[str]) -> list[float]:
    """One state, as it is saved now and as form 1 was; the losses after it."""
    from megatron.core import dist_checkpointing

    run = harness.start(Layout(tp=2))
    run.losses(2)
    state = state_of(run)
    box = [records(run)[0]]
    dist.broadcast_object_list(box)
    old = {**box[0], "version": 1, "package": "0.0"}
    del old["digest"]
    for name in ("sums", "model"):
        old[name] = _low(old[name])
    for folder, changed in zip(folders, (state, state_of(run)), strict=True):
        if dist.get_rank() == 0:
            Path(folder).mkdir()
        dist.barrier()
        if changed is not state:
            changed["optimizer"][RECORD] = old
            del changed["optimizer"]["record"]
        dist_checkpointing.save({**changed, "step": run.step}, folder)
    return run.losses(2)


def _low(sums: Any) -> Any:
    """Form 1 had 64 bits."""
    return {key: _low(value) for key, value in sums.items()} if isinstance(sums, dict) else sums % 2**64


def resume_from_both(folders: list[str], damaged: str) -> list[Any]:
    """The losses; and what is said of a record whose tensors are others."""
    found = []
    for folder in folders:
        run = harness.start(Layout(tp=2))
        harness.load_run(run, folder)
        found.append(run.losses(2))
    return [*found, failure(lambda: harness.load_run(run, damaged))]


def test_form_1_is_read(pool: RankPool, tmp_path: Path) -> None:
    folders = [str(tmp_path / name) for name in ("new", "old")]
    expected = pool.run(save_in_both_forms, 2, folders, timeout=TIMEOUT)
    new, old = (Stored.read(folder) for folder in folders)
    assert new.record is not None and old.record is not None
    assert (new.record.version, old.record.version) == (3, 1)
    assert new.record.weights == old.record.weights and new.record.rules == old.record.rules
    # Others find a note of it in the state that is equal on all ranks, not the sums of their tensors.
    assert set(new.common["optimizer"]) == {RECORD} and new.common["optimizer"][RECORD].keys() == {
        "version",
        "package",
        "keys",
    }
    damaged = str(shutil.copytree(folders[1], tmp_path / "damaged"))
    flip_bit(Path(damaged))
    found = pool.run(resume_from_both, 2, folders, damaged, timeout=TIMEOUT)
    for losses, (first, second, _) in zip(expected, found, strict=True):
        assert losses == first == second
    assert "is damaged" in one_error([outcome for *_, outcome in found])


def load_strictly(folder: str) -> dict[str, list[Any]]:
    """Keys that were missing and unexpected, for each value of ``--dist-ckpt-strictness`` that tells them or raises."""
    from megatron.core import dist_checkpointing

    run = harness.start(Layout(tp=2))
    run.losses(1)
    harness.save_run(run, folder)
    found = {}
    for strict in ("raise_all", "raise_unexpected", "return_all", "return_unexpected"):
        loaded = dist_checkpointing.load(state_of(run, is_loading=True), folder, strict=strict)
        found[strict] = [] if isinstance(loaded, dict) else [key for keys in loaded[1:] for key in keys]
        state = loaded if isinstance(loaded, dict) else loaded[0]
        run.optimizer.load_state_dict(state["optimizer"])
    return found


def test_strict_loading_does_not_miss_it(pool: RankPool, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    for found in pool.run(load_strictly, 2, folder, timeout=TIMEOUT):
        assert not any(found.values()), found
    assert any(key.startswith(RECORD_KEY) for key in torch_keys(folder))


def torch_keys(folder: str) -> list[str]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    return list(FileSystemReader(folder).read_metadata().state_dict_metadata)
