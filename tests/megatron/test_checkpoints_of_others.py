"""Runs of Adam, ranks that take no part, and states that nothing was asked for: this package keeps out of their way."""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import io
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_muon.checkpoint import folders
from tests.checkpoints import differences
from tests.megatron import harness
from tests.megatron.harness import Layout, Run
from tests.megatron.loading import FINE, TIMEOUT, Outcome, failure, one_error
from tests.pool import RankPool

ACCEPT = {"muon_ckpt_changes": "accept"}
METADATA = harness.CHECKPOINT_METADATA
FULLY = {**METADATA, "distrib_optim_sharding_type": "fully_reshardable"}
"""In the other form the distributed optimizer saves what lies between weights, which nobody has written."""


class Collectives(TorchDispatchMode):
    """Counts what a rank sends and receives, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


# --- Adam, with this package and without -----------------------------------------------------------------------------


def trace_of_adam(layout: Layout, folder: str, install: bool) -> tuple[dict[str, Any], str]:
    """What a run of Adam does in a step, a save, a save over that one, and a load; what it prints."""
    from megatron.core import dist_checkpointing

    import megatron_muon

    megatron_muon.uninstall()
    output, found = io.StringIO(), {}
    with contextlib.redirect_stdout(output):
        run = harness.start(layout, install=install, num_layers=2, optimizer={"name": "adam"})

        def counted(what: str, function: Any) -> None:
            with Collectives() as collectives:
                found[f"{what} gives"] = function()
            found[what] = collectives.counts

        def save_over() -> None:
            state = harness.model_state(run.chunks)
            optimizer = run.optimizer.sharded_state_dict(state, metadata=FULLY)
            dist_checkpointing.save({**state, "optimizer": optimizer, "step": run.step}, folder)

        counted("step", lambda: run.losses(1))
        counted("save", lambda: harness.save_run(run, folder, FULLY))
        counted("save over", save_over)
        counted("load", lambda: harness.load_run(run, folder, FULLY))
        counted("step after", lambda: run.losses(1))
        found["rates"] = [
            {key: value for key, value in g.items() if key != "params"} for g in run.optimizer.param_groups
        ]
    return found, output.getvalue()


def trace_both(layout: Layout, root: str) -> list[Any]:
    return [trace_of_adam(layout, f"{root}/{install}", install) for install in (False, True)]


@pytest.mark.parametrize(
    "layout",
    [Layout(ddp_buffers=True, bucket_size=10**6), pytest.param(Layout(tp=2), marks=pytest.mark.slow)],
    ids=["distributed optimizer", "tp2"],
)
def test_a_run_of_adam_is_the_same_with_this_package(pool: RankPool, tmp_path: Path, layout: Layout) -> None:
    """In losses, collectives, files and what it prints."""
    for without, with_it in pool.run(trace_both, 2, layout, str(tmp_path), timeout=TIMEOUT):
        assert sum(without[0]["save"].values()) > 0 and sum(without[0]["step"].values()) > 0
        assert with_it == without
    contents = [
        {
            path.name: None if path.name == ".metadata" else hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (tmp_path / name).iterdir()
        }
        for name in ("False", "True")
    ]
    assert contents[0] == contents[1] and "metadata.json" in contents[0]


# --- writing over a checkpoint ---------------------------------------------------------------------------------------


def interrupt(state: dict[str, Any], folder: str) -> None:
    """A save that is killed when it begins to write."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    interrupted = mock.patch.object(TorchDistSaveShardedStrategy, "save", side_effect=KeyboardInterrupt)
    with interrupted, contextlib.suppress(KeyboardInterrupt):
        dist_checkpointing.save(state, folder)


def write_over_parts(root: str) -> tuple[dict[str, bool], str]:
    """Models and optimizers in folders of their own, saved and written over: which folders are whole then.

    And what is printed where the marks cannot be removed.
    """
    from megatron.core import dist_checkpointing

    whole = {}
    for name in ("muon", "adam"):
        run = harness.start(Layout(), num_layers=1, optimizer={"name": name})
        for part in ("model", "optimizer"):
            folder = Path(root, name, part)
            if dist.get_rank() == 0:
                folder.mkdir(parents=True)
            dist.barrier()

            def state(part: str = part, run: Run = run) -> dict[str, Any]:
                model = harness.model_state(run.chunks)
                return model if part == "model" else run.optimizer.sharded_state_dict(model, metadata=METADATA)

            dist_checkpointing.save(state(), str(folder))
            dist.barrier()  # the first rank writes the last mark, and takes it away below
            assert folders.is_whole(folder)
            dist.barrier()
            interrupt(state(), str(folder))
            dist.barrier()
            whole[f"{name} {part}"] = folders.is_whole(folder)
    run, output = harness.start(Layout(), num_layers=1), io.StringIO()
    refused = OSError(errno.EROFS, "Read-only file system")
    with mock.patch.object(Path, "unlink", side_effect=refused), contextlib.redirect_stdout(output):
        dist_checkpointing.save(harness.model_state(run.chunks), f"{root}/muon/model")
    return whole, output.getvalue()


def test_folders_with_muons_weights_or_state_are_not_whole_while_they_are_written_over(
    pool: RankPool, tmp_path: Path
) -> None:
    results = pool.run(write_over_parts, 2, str(tmp_path), timeout=TIMEOUT)
    for whole, _ in results:
        assert whole == {"muon model": False, "muon optimizer": False, "adam model": True, "adam optimizer": True}
    assert not (tmp_path / "adam" / "model" / "being_written_over").exists()
    assert [said.count("WARNING") for _, said in results] == [1, 0] and "Read-only file system" in results[0][1]


# --- some of the ranks -----------------------------------------------------------------------------------------------


def load_on_some(root: str, readers: list[int]) -> Outcome | None:
    """All ask, some read: Muon's state by Muon and by Adam; its momentum, and Adam's, are those that were saved."""
    from megatron.core import dist_checkpointing

    from megatron_muon.plugin.optimizer_state import param_states

    run = harness.start(Layout(), num_layers=1)
    run.losses(1)
    harness.save_run(run, root)
    saved = [
        each.tensors["momentum_buffer"] for each in param_states(run.optimizer) if "momentum_buffer" in each.tensors
    ]
    group = dist.new_group(readers)
    outcome: Outcome | None = None
    for name, state in (("muon", "momentum_buffer"), ("adam", "exp_avg")):
        again = harness.start(Layout(), num_layers=1, optimizer={"name": name, **ACCEPT}, seed=2)
        model = harness.model_state(again.chunks)
        template = again.optimizer.sharded_state_dict(model, is_loading=True, metadata=METADATA)
        if dist.get_rank() in readers:
            loaded = dist_checkpointing.load({**model, "optimizer": template}, root, process_group=group)
            outcome = failure(lambda loaded=loaded, again=again: again.optimizer.load_state_dict(loaded["optimizer"]))
            if outcome != FINE:
                return outcome
            held = [each.tensors for each in param_states(again.optimizer)]
            for tensor in saved:
                assert any(state in each and torch.equal(each[state], tensor) for each in held)
    return outcome


@pytest.mark.parametrize(
    "ranks,readers", [pytest.param(2, [0], marks=pytest.mark.slow), (4, [0, 1, 2])], ids=["1 of 2", "3 of 4"]
)
def test_ranks_that_do_not_read_are_not_waited_for(
    pool: RankPool, tmp_path: Path, ranks: int, readers: list[int]
) -> None:
    found = pool.run(load_on_some, ranks, str(tmp_path / "a"), readers, timeout=TIMEOUT)
    assert found == [FINE if rank in readers else None for rank in range(ranks)]


# --- what is asked for, and what is given ----------------------------------------------------------------------------


def ask(run: Run) -> dict[str, Any]:
    state = harness.model_state(run.chunks)
    return {**state, "optimizer": run.optimizer.sharded_state_dict(state, is_loading=True, metadata=METADATA)}


def give_and_ask(root: str) -> list[Any]:
    """Each way in which a load may be asked for and not come, or come late: what is raised, and the state then."""
    from megatron.core import dist_checkpointing

    def load(state: dict[str, Any], name: str) -> Any:
        return dist_checkpointing.load(state, f"{root}/{name}")["optimizer"]

    found: list[Any] = []
    run = harness.start(Layout(tp=2), num_layers=1)
    for name in "ab":
        run.losses(1)
        harness.save_run(run, f"{root}/{name}")
    for optimizer in ({"name": "muon"}, {"name": "adam", **ACCEPT}):
        again = harness.start(Layout(tp=2), num_layers=1, optimizer=optimizer, seed=2)
        load_state, plain = again.optimizer.load_state_dict, again.optimizer.state_dict
        # Asked for, and never read; or not to be read.
        ask(again)
        found.append(failure(lambda load_state=load_state, plain=plain: load_state(copy.deepcopy(plain()))))
        request = ask(again)
        assert failure(lambda request=request: load(request, "nowhere")) != FINE
        found.append(failure(lambda load_state=load_state, plain=plain: load_state(copy.deepcopy(plain()))))
        # Two requests, read in turn and the other way round; one that was copied.
        first, second = ask(again), copy.deepcopy(ask(again))
        for name, request in (("b", second), ("a", first)):
            loaded = dist_checkpointing.load(request, f"{root}/{name}")
            harness.load_model(again.chunks[0], loaded["model"])
            load_state(loaded["optimizer"])
            again.step = loaded["step"]
            harness.save_run(again, f"{root}/{name} by {optimizer['name']}")
    # Not what load() returned.
    again = harness.start(Layout(tp=2), num_layers=1, seed=3)
    other = harness.start(Layout(tp=2), num_layers=1, seed=3)
    loaded = load(ask(again), "a")
    found += [
        failure(lambda: again.optimizer.load_state_dict(ask(again)["optimizer"])),
        failure(lambda: other.optimizer.load_state_dict(loaded)),
    ]
    return found


def test_requests_for_a_checkpoint_and_their_answers(pool: RankPool, tmp_path: Path) -> None:
    mine, theirs = pool.run(give_and_ask, 2, str(tmp_path), timeout=TIMEOUT)
    assert mine[:4] == theirs[:4] == [FINE] * 4
    assert "no checkpoint was read for" in one_error([mine[4], theirs[4]])
    assert "another optimizer has asked for" in one_error([mine[5], theirs[5]])
    for name in "ab":
        assert differences(str(tmp_path / name), str(tmp_path / f"{name} by muon")) == []
        changed = differences(str(tmp_path / name), str(tmp_path / f"{name} by adam"))
        assert changed and not [key for key in changed if not key.startswith("optimizer")]


def ask_by_position(root: str) -> list[Any]:
    """Adam, of each class of Megatron-Core's, meets a checkpoint of Muon; and one that this package does not know."""
    from megatron.core import dist_checkpointing

    import megatron_muon
    from megatron_muon.plugin.canonical_state import keep_canonical

    run = harness.start(Layout(), num_layers=1)
    run.losses(1)
    harness.save_run(run, root)
    following, found = run.losses(1), []
    for layout, arguments in ((Layout(), (METADATA,)), (Layout(ddp_buffers=True), (None, METADATA))):
        adam = harness.start(layout, num_layers=1, optimizer={"name": "adam"}, seed=2)
        (optimizer,) = adam.optimizer.chained_optimizers
        optimizer.config.muon_ckpt_changes = "accept"
        keep_canonical(optimizer, optimizer.config, adam.chunks, None)
        state = harness.model_state(adam.chunks)
        template = optimizer.sharded_state_dict(state, True, *arguments)
        loaded = dist_checkpointing.load({**state, "optimizer": template}, root)
        harness.load_model(adam.chunks[0], loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
        adam.step = 1
        found.append(adam.losses(1))
    megatron_muon.uninstall()
    for layout in (Layout(), Layout(ddp_buffers=True)):
        unknown = harness.start(layout, num_layers=1, optimizer={"name": "adam"}, seed=2, install=False)
        megatron_muon.install()
        found.append(failure(lambda unknown=unknown: harness.load_run(unknown, root)))
        megatron_muon.uninstall()
    return [following, *found]


def test_adam_of_each_class_meets_a_checkpoint_of_muon(pool: RankPool, tmp_path: Path) -> None:
    root = str(tmp_path / "a")
    for following, plain, buffers, *unknown in pool.run(ask_by_position, 2, root, timeout=TIMEOUT):
        assert plain == buffers == following
        for name, text in unknown:
            assert name == "CheckpointError" and text.startswith(root) and "before megatron_muon.install()" in text


# --- counts of steps -------------------------------------------------------------------------------------------------


def counts(run: Run) -> list[tuple[list[Any], list[str]]]:
    """Of every optimizer but Muon's: the steps in param groups, the names of its state."""
    from megatron_muon.plugin.optimizer_state import leaves

    inner = [leaf.optimizer for leaf, _ in leaves(run.optimizer) if "Muon" not in type(leaf.optimizer).__name__]
    return [
        ([group.get("step") for group in each.param_groups], sorted(set().union(*each.state.values())))
        for each in inner
    ]


def count_after_loading(root: str) -> list[list[Any]]:
    """Of Adam in a run of Muon, by Megatron-Core alone and here: after no step, and loaded after two."""
    import megatron_muon

    found = []
    for layer_wise in (False, True):
        options: dict[str, Any] = {"num_layers": 1, "bf16": True, "optimizer": {"muon_fp32_matmul_prec": "high"}}
        found.append([])
        for install in (False, True):
            megatron_muon.uninstall()
            for steps in (0, 2):
                run = harness.start(Layout(layer_wise=layer_wise), install=install, **options)
                fresh = counts(run)
                if not steps and not install:  # what has no state yet Megatron-Core cannot save and load
                    found[-1].append([steps for steps, _ in fresh])
                    continue
                run.losses(steps)
                folder = f"{root}/{layer_wise} {install} {steps}"
                harness.save_run(run, folder, FULLY)
                again = harness.start(Layout(layer_wise=layer_wise), install=install, **options)
                again.losses(1 - steps // 2)
                harness.load_run(again, folder, FULLY)
                found[-1].append(counts(again) if steps else [steps for steps, _ in counts(again)])
    return found


def test_steps_are_counted_as_after_megatron_cores_own_load(pool: RankPool, tmp_path: Path) -> None:
    for found in pool.run(count_after_loading, 2, str(tmp_path), timeout=TIMEOUT):
        for fresh, loaded, our_fresh, our_loaded in found:
            assert our_fresh == fresh == [[None] * len(groups) for groups in fresh]
            assert our_loaded == loaded and loaded[0] == ([2] * len(fresh[0]), ["exp_avg", "exp_avg_sq"])
