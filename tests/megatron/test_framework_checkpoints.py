"""Checkpoints as frameworks save and load them, by Megatron-Core's own functions, in folders and orders of theirs.

verl's: model, optimizer and the rest in a folder each, fully parallel strategies over data and context parallel ranks,
and its metadata. Megatron-Bridge's: all in one folder, whose metadata are read first.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from tests.checkpoints import differences
from tests.megatron import harness
from tests.megatron.harness import Layout, Run
from tests.megatron.loading import FINE, TIMEOUT, Outcome, failure, one_error
from tests.megatron.test_checkpoint_migration import BUFFERS
from tests.pool import RankPool

COMMON = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
NONE: dict[str, Any] = COMMON
"""Of a run without the distributed optimizer."""
BUCKETS = {**COMMON, "distrib_optim_sharding_type": "dp_reshardable"}
FULLY = {
    **COMMON,
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


def strategies() -> tuple[Any, Any]:
    """To save and to load, each rank a part."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.strategies import fully_parallel
    from megatron.core.dist_checkpointing.strategies import torch as strategies

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return (
        fully_parallel.FullyParallelSaveStrategyWrapper(strategies.TorchDistSaveShardedStrategy(), group),
        fully_parallel.FullyParallelLoadStrategyWrapper(strategies.TorchDistLoadShardedStrategy(), group),
    )


def save(state: dict[str, Any], folder: Path, metadata: dict[str, Any]) -> None:
    from megatron.core import dist_checkpointing

    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(state, str(folder), strategies()[0], content_metadata=dict(metadata))


def load(state: dict[str, Any], folder: Path) -> Any:
    from megatron.core import dist_checkpointing

    return dist_checkpointing.load(state, str(folder), strategies()[1])


def model_state(run: Run, metadata: dict[str, Any]) -> dict[str, Any]:
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {"model": harness.unwrap(run.chunks[0]).sharded_state_dict(metadata={**metadata, "dp_cp_group": group})}


def optimizer_state(run: Run, state: dict[str, Any], metadata: dict[str, Any], is_loading: bool) -> dict[str, Any]:
    found = run.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=dict(metadata))
    return {"optimizer": found, "lr_scheduler": {"steps": run.step}}


def save_parts(run: Run, root: str, metadata: dict[str, Any], order: str) -> None:
    """In three folders.

    ``model_first``: the optimizer's state is asked for after the model's was saved.
    """
    folder, state = Path(root), model_state(run, metadata)
    if order == "model_first":
        save(state, folder / "model", metadata)
        save(optimizer_state(run, state, metadata, False), folder / "optimizer", metadata)
    else:
        optimizer = optimizer_state(run, state, metadata, False)
        if order == "optimizer_first":
            save(optimizer, folder / "optimizer", metadata)
        save(state, folder / "model", metadata)
        if order != "optimizer_first":
            save(optimizer, folder / "optimizer", metadata)
    save({"step": run.step}, folder / "extra", metadata)


def load_parts(run: Run, root: str, order: str, metadata: dict[str, Any] | None = None) -> None:
    """From three folders.

    ``model_first``: the optimizer's state is asked for after the model's was loaded.
    """
    from megatron.core import dist_checkpointing

    folder = Path(root)
    if metadata is None:
        metadata = dist_checkpointing.load_content_metadata(str(folder / "model"))
        assert metadata is not None
    state = model_state(run, metadata)
    if order == "model_first":
        harness.unwrap(run.chunks[0]).load_state_dict(load(dict(state), folder / "model")["model"])
        optimizer = load(optimizer_state(run, state, metadata, True), folder / "optimizer")
    else:
        template = optimizer_state(run, state, metadata, True)
        if order == "optimizer_first":
            optimizer = load(template, folder / "optimizer")
        harness.unwrap(run.chunks[0]).load_state_dict(load(dict(state), folder / "model")["model"])
        if order != "optimizer_first":
            optimizer = load(template, folder / "optimizer")
    run.optimizer.load_state_dict(optimizer["optimizer"])
    run.step = load({}, folder / "extra")["step"]


ORDERS = {"model_first": NONE, "optimizer_first": BUCKETS, "both_asked_first": FULLY}


def every_order(layouts: list[Layout], root: str) -> list[list[list[float]]]:
    """Two losses after the checkpoint: of the run, and of each that was loaded in an order from what another saved."""
    losses = []
    for number, layout in enumerate(layouts):
        # Where owners have the state, in forms that are read into copies.
        forms = {"muon_master": "remainder", "muon_momentum_dtype": "int8"} if layout.layer_wise else {}
        run = harness.start(layout, bf16=True, num_layers=2, seed=1, optimizer=forms)
        run.losses(2)
        for order, metadata in ORDERS.items():
            save_parts(run, f"{root}/{number}/{order}", metadata, order)
        losses.append([run.losses(2)])
        again = harness.start(layout, bf16=True, num_layers=2, seed=2, optimizer=forms)
        for saved, order in zip(ORDERS, ("optimizer_first", "both_asked_first", "model_first"), strict=True):
            load_parts(again, f"{root}/{number}/{saved}", order)
            losses[-1].append(again.losses(2))
    return losses


@pytest.mark.parametrize(
    "layouts",
    [[Layout(), Layout(layer_wise=True)], pytest.param([Layout(tp=2)], marks=pytest.mark.slow)],
    ids=["dp2", "tp2"],
)
def test_model_and_optimizer_in_folders_of_their_own(pool: RankPool, tmp_path: Path, layouts: list[Layout]) -> None:
    for found in pool.run(every_order, 2, layouts, str(tmp_path), timeout=TIMEOUT):
        for losses in found:
            assert losses == [losses[0]] * 4
    for number in range(len(layouts)):
        first, *others = (str(tmp_path / str(number) / order / "optimizer") for order in ORDERS)
        assert [differences(first, other) for other in others] == [[], []]


# --- other optimizers ------------------------------------------------------------------------------------------------

ACCEPT = {"muon_ckpt_changes": "accept"}
ADAM = BUFFERS
"""With the distributed optimizer, as frameworks have it."""


def save_whole(run: Run, folder: str, metadata: dict[str, Any]) -> None:
    state = model_state(run, metadata)
    save({**state, **optimizer_state(run, state, metadata, False), "step": run.step}, Path(folder), metadata)


def load_whole(run: Run, folder: str) -> None:
    """As Megatron-Bridge does."""
    from megatron.core import dist_checkpointing

    metadata = dist_checkpointing.load_content_metadata(folder) or {}
    state = model_state(run, metadata)
    loaded = load({**state, **optimizer_state(run, state, metadata, True)}, Path(folder))
    harness.unwrap(run.chunks[0]).load_state_dict(loaded["model"])
    run.optimizer.load_state_dict(loaded["optimizer"])
    run.step = loaded["step"]


def adam_meets_muon(root: str) -> tuple[float, list[float], list[Outcome]]:
    """The loss after the checkpoint, those of Adam from it in each form, and what it is told without consent."""
    run = harness.start(Layout(), bf16=True, num_layers=2)
    run.losses(2)
    for name, metadata in (("none", NONE), ("buckets", BUCKETS), ("fully", FULLY)):
        save_parts(run, f"{root}/{name}", metadata, "both_asked_first")
    save_whole(run, f"{root}/whole", NONE)
    following = run.losses(1)[0]
    adam = harness.start(ADAM, bf16=True, num_layers=2, optimizer={"name": "adam", **ACCEPT}, seed=2)
    losses = []
    for name in ("none", "buckets", "fully"):
        load_parts(adam, f"{root}/{name}", "model_first")
        losses += adam.losses(1)
    load_whole(adam, f"{root}/whole")
    losses += adam.losses(1)
    strict = harness.start(ADAM, bf16=True, num_layers=2, optimizer={"name": "adam"}, seed=2)
    refused = [
        failure(lambda: load_parts(strict, f"{root}/none", "model_first")),
        failure(lambda: load_whole(strict, f"{root}/whole")),
    ]
    return following, losses, refused


def test_adam_that_meets_a_checkpoint_of_muon(pool: RankPool, tmp_path: Path) -> None:
    """Whatever the metadata say of the distributed optimizer's form, which Muon's checkpoints do not have."""
    results = pool.run(adam_meets_muon, 2, str(tmp_path), timeout=TIMEOUT)
    for following, losses, _ in results:
        assert losses == [following] * 4
    for outcomes in zip(*(refused for _, _, refused in results), strict=True):
        text = one_error(outcomes)
        assert "was trained with other rules" in text and "--muon-ckpt-changes accept" in text


def muon_meets_adam(root: str) -> tuple[float, list[float], list[Outcome]]:
    """The loss after Adam's checkpoint, those of Muon from it, and what Adam is told of a form that it has not."""
    adam = harness.start(ADAM, bf16=True, num_layers=2, optimizer={"name": "adam"})
    adam.losses(2)
    for name, metadata in (("buckets", BUCKETS), ("fully", FULLY)):
        save_parts(adam, f"{root}/{name}", metadata, "both_asked_first")
    following = adam.losses(1)[0]
    load_parts(adam, f"{root}/fully", "both_asked_first")
    losses = adam.losses(1)
    run = harness.start(Layout(), bf16=True, num_layers=2, optimizer=ACCEPT, seed=2)
    for name in ("buckets", "fully"):
        load_parts(run, f"{root}/{name}", "model_first")
        losses += run.losses(1)
    none = failure(lambda: load_parts(adam, f"{root}/fully", "both_asked_first", metadata=NONE))
    return following, losses, [none]


def test_muon_that_meets_a_checkpoint_of_adam(pool: RankPool, tmp_path: Path) -> None:
    """Adam that meets its own is as ever, an error of Megatron-Core's included."""
    results = pool.run(muon_meets_adam, 2, str(tmp_path), timeout=TIMEOUT)
    for following, losses, [(name, text)] in results:
        assert losses == [following] * 3
        assert (name, text) == ("CheckpointingException", "ShardedTensor.flattened_range is not supported.")


# --- strictness ------------------------------------------------------------------------------------------------------

STRICT = ("log_unexpected", "log_all", "raise_unexpected", "raise_all", "return_unexpected", "return_all", "ignore_all")


def load_strictly(root: str) -> list[Any]:
    """What comes of each value of ``--dist-ckpt-strictness``: keys that do not match, or an error."""
    from megatron.core import dist_checkpointing

    run = harness.start(Layout(), num_layers=1)
    save_whole(run, root, NONE)
    found: list[Any] = []
    for strict in STRICT:
        state = model_state(run, NONE)
        state |= optimizer_state(run, state, NONE, True)
        found.append(failure(lambda state=state, strict=strict: dist_checkpointing.load(state, root, strict=strict)))
    return found


def test_every_strictness(pool: RankPool, tmp_path: Path) -> None:
    """With torch 2.15 only the default worked: what it stores of a tensor is not what ``torch.empty`` takes."""
    assert pool.run(load_strictly, 2, str(tmp_path / "a"), timeout=TIMEOUT) == [[FINE] * len(STRICT)] * 2


# --- weights that the model does not save ----------------------------------------------------------------------------


def start_without_saving(what: str, megatron: bool) -> tuple[Outcome, Outcome, str]:
    """A run whose last layer, or whole model, does not say how it is saved; one step and a save; what is printed.

    ``megatron``: whether ``megatron.training`` is to save it.
    """
    from megatron.training.global_vars import set_args

    if megatron:
        set_args(SimpleNamespace(save="folder", ckpt_format="torch_dist", no_save_optim=None))
    layout = Layout(pp=2)
    layout.initialize()
    original = harness.build_model

    def build_model(*args: Any, **kwargs: Any) -> list[Any]:
        chunks = original(*args, **kwargs)
        if what == "model":
            chunks[0].sharded_state_dict = lambda *args, **kwargs: [][0]
        elif dist.get_rank() == 1:
            chunks[0].decoder.layers[-1].mlp.linear_fc2.sharded_state_dict = lambda *args, **kwargs: {}
        return chunks

    runs: list[Run] = []

    def save_after_a_step() -> None:
        runs[0].losses(1)
        model = {} if what == "model" else model_state(runs[0], NONE)
        optimizer_state(runs[0], model, NONE, False)

    output = io.StringIO()
    with mock.patch.object(harness, "build_model", build_model), contextlib.redirect_stdout(output):
        started = failure(lambda: runs.append(harness.start(layout, num_layers=2)))
        saved = failure(save_after_a_step) if runs else FINE
    return started, saved, output.getvalue().partition("megatron_muon: WARNING ")[2]


def test_weights_that_are_not_saved_are_told_at_the_start(pool: RankPool) -> None:
    """By name; in a run that is to be saved by Megatron's own scripts, as an error on all ranks."""
    name = "module.decoder.layers.0.mlp.linear_fc2.weight of shape 32 x "
    (mine, saved, said), (theirs, saved_there, _) = pool.run(start_without_saving, 2, "layer", False)
    assert mine == theirs == FINE and said.startswith("weights that are trained, but not saved:") and name in said
    assert name in one_error([saved, saved_there])
    (mine, _, said), (theirs, _, _) = pool.run(start_without_saving, 2, "layer", True)
    text = one_error([mine, theirs])
    assert text.startswith("Weights that are trained, but not saved:") and name in text and said == ""
    for mine, saved, said in pool.run(start_without_saving, 2, "model", True)[:1]:
        assert mine == FINE and "of the model fails: IndexError: list index out of range" in said
        assert "Weights that are trained, but not saved" in one_error([saved])
