"""Local checkpoints: of Megatron-Core's ``MCoreTensorAwareStateDict``, which each rank keeps for itself.

What it needs of ``nvidia-resiliency-ext`` is a base class without contents; its manager of files is not used here.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.megatron import harness
from tests.megatron.harness import CHECKPOINT_METADATA, Layout, Run
from tests.megatron.loading import FINE, TIMEOUT, Outcome, failure, one_error
from tests.pool import RankPool
from tests.slow import with_slow

ALGORITHMS = ("atomic", "fully_parallel")
LAYOUTS = {
    "dp2": (Layout(), {}),
    "tp2": (Layout(tp=2), {}),
    "layer_wise": (
        Layout(layer_wise=True),
        {"bf16": True, "optimizer": {"muon_master": "remainder", "muon_momentum_dtype": "int8"}},
    ),
}


def data_parallel() -> Any:
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def save(run: Run, algo: str, cache: Any = None) -> tuple[Any, Any]:
    """What a rank is to write into its file, and what Megatron keeps for the next save."""
    from megatron.core.dist_checkpointing import tensor_aware_state_dict as module

    state = harness.model_state(run.chunks)
    state["optimizer"] = run.optimizer.sharded_state_dict(state, metadata=CHECKPOINT_METADATA)
    with mock.patch.object(module, "HAVE_NVRX", True):
        saved, cache = module.MCoreTensorAwareStateDict.from_state_dict(
            {**state, "step": run.step, "iteration": run.step}, algo, data_parallel(), cache
        )
    saved.copy_tensors_to_cpu()
    return saved, cache


def written(saved: Any) -> bytes:
    """The file."""
    file = io.BytesIO()
    torch.save(saved, file)
    return file.getvalue()


def load(run: Run, content: bytes, algo: str, change: Callable[[Any], None] = lambda saved: None) -> None:
    saved = torch.load(io.BytesIO(content), weights_only=False)
    saved.restore_tensor_device()
    change(saved)
    state = harness.model_state(run.chunks)
    state["optimizer"] = run.optimizer.sharded_state_dict(state, is_loading=True, metadata=CHECKPOINT_METADATA)
    loaded = saved.to_state_dict(state, algo, parallelization_group=data_parallel())
    for chunk in run.chunks:
        harness.load_model(chunk, loaded["model"])
    run.optimizer.load_state_dict(loaded["optimizer"])
    run.step = loaded["step"]


def contents(run: Run) -> list[torch.Tensor]:
    """All weights and state on this rank, in an order of their own."""
    from megatron_muon.plugin.optimizer_state import param_states

    state = [tensor for each in param_states(run.optimizer) for _, tensor in sorted(each.tensors.items())]
    return [
        tensor.clone() for tensor in (*(param.data for chunk in run.chunks for param in chunk.parameters()), *state)
    ]


def resume(layout: Layout, options: dict[str, Any]) -> tuple[list[list[float]], list[bool]]:
    """Two losses after each checkpoint, of the run and of one that was loaded from it; whether the state is the same.

    The second checkpoint of an algorithm is saved with what the first has left (``--ckpt-assume-constant-structure``),
    and written when the run has gone on (``--async-save``).
    """
    run = harness.start(layout, num_layers=2, **options)
    losses, same = [], []
    for algo in ALGORITHMS:
        cache = None
        for _ in range(2):
            run.losses(1)
            saved, cache = save(run, algo, cache)
        before, following = contents(run), run.losses(2)
        again = harness.start(layout, num_layers=2, seed=2, **options)
        load(again, written(saved), algo)
        same.append(all(torch.equal(*pair) for pair in zip(before, contents(again), strict=True)))
        losses.append([*following, *again.losses(2)])
    return losses, same


@pytest.mark.parametrize("name", with_slow(LAYOUTS, "dp2", "tp2"))
def test_a_run_goes_on_from_a_local_checkpoint(pool: RankPool, name: str) -> None:
    layout, options = LAYOUTS[name]
    for losses, same in pool.run(resume, 2, layout, options, timeout=TIMEOUT):
        assert same == [True, True]
        for first, second, again, then in losses:
            assert (again, then) == (first, second)


# --- what cannot be read ---------------------------------------------------------------------------------------------


def state_parts(saved: Any) -> list[Any]:
    return [part for parts in saved.sharded_state_dict["optimizer"]["weights"].values() for part in parts.values()]


def damage(saved: Any) -> None:
    """One bit on the first rank; of a copy, the comparison of replicas tells."""
    if dist.get_rank() == 0:
        state_parts(saved)[0][0].data.view(torch.int32).view(-1)[3] += 1


def lose(saved: Any) -> None:
    """A state on the last rank."""
    if dist.get_rank() == 1:
        state_parts(saved)[0].clear()


def save_each() -> list[bytes]:
    """A step, and what each algorithm makes of it."""
    run = harness.start(Layout(), num_layers=2)
    run.losses(1)
    return [written(save(run, algo)[0]) for algo in ALGORITHMS]


def load_elsewhere(contents: list[list[bytes]]) -> list[Outcome]:
    """What was saved without tensor parallelism, with it."""
    run = harness.start(Layout(tp=2), num_layers=2)
    atomic, shared = contents[dist.get_rank()]
    return [failure(lambda: load(run, atomic, "atomic")), failure(lambda: load(run, shared, "fully_parallel"))]


def load_damaged(contents: list[list[bytes]]) -> list[Outcome]:
    """Damaged, incomplete, with flags that were not those of the save; the last are no errors."""
    atomic, shared = contents[dist.get_rank()]
    accept = {"muon_ckpt_changes": "accept"}
    run, whole, follower, adam = (
        harness.start(Layout(), num_layers=2, optimizer=options)
        for options in ({}, {"muon_qkv": "whole"}, {"muon_qkv": "whole", **accept}, {"name": "adam", **accept})
    )
    return [
        failure(lambda: load(run, atomic, "atomic", damage)),
        failure(lambda: load(run, atomic, "atomic", lose)),
        failure(lambda: load(run, shared, "atomic")),
        failure(lambda: load(whole, atomic, "atomic")),
        failure(lambda: load(adam, shared, "fully_parallel")),
        failure(lambda: load(follower, shared, "fully_parallel")),
        failure(lambda: load(run, shared, "fully_parallel")),
    ]


def test_what_cannot_be_read_is_refused_on_all_ranks(pool: RankPool) -> None:
    contents = pool.run(save_each, 2, timeout=TIMEOUT)
    *refused, follower, fine = zip(*pool.run(load_damaged, 2, contents, timeout=TIMEOUT), strict=True)
    assert follower == fine == (FINE, FINE)
    elsewhere = zip(*pool.run(load_elsewhere, 2, contents, timeout=TIMEOUT), strict=True)
    expected = [
        ("is damaged: what was read is not what was saved:", "momentum_buffer of"),
        ("cannot be read:", "not saved by this rank"),
        ("cannot be read:", "saved on another rank alone"),
        ("was trained with other rules:", "linear_qkv"),
        ("is of Muon, and --optimizer is not:", "a persistent checkpoint (--load)"),
        ("cannot be read:", "not saved by this rank"),
        ("cannot be read:", "not saved by this rank"),
    ]
    for outcomes, (title, word) in zip([*refused, *elsewhere], expected, strict=True):
        text = one_error(outcomes)
        assert text.startswith(f"the local checkpoint of iteration 1 {title}") and word in text, text


# --- files -----------------------------------------------------------------------------------------------------------


class Manager:
    """In place of the manager of files, of which one rank cannot read its own."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def load(self) -> tuple[Any, str]:
        if dist.get_rank() == 1:
            raise OSError("no space left to read")
        return torch.load(io.BytesIO(self.content), weights_only=False), "local"


def load_files() -> list[Outcome]:
    """As ``megatron.training`` does: what is no tensor, before it asks the optimizer; then all."""
    from megatron.training import checkpointing

    run = harness.start(Layout(), num_layers=1)
    args = SimpleNamespace(non_persistent_ckpt_type="local", non_persistent_local_ckpt_algo="atomic", optimizer="muon")
    context = {"local_checkpoint_manager": Manager(written(save(run, "atomic")[0]))}
    state = harness.model_state(run.chunks)
    state["optimizer"] = run.optimizer.sharded_state_dict(state, is_loading=True, metadata=CHECKPOINT_METADATA)
    return [
        failure(lambda: checkpointing._load_non_persistent_base_checkpoint(None, args, True, None, 7, context)),
        failure(lambda: checkpointing._load_non_persistent_base_checkpoint(None, args, False, state, 7, context)),
    ]


def test_a_file_that_one_rank_cannot_read_ends_all(pool: RankPool) -> None:
    for outcomes in zip(*pool.run(load_files, 2, timeout=TIMEOUT), strict=True):
        text = one_error(outcomes)
        assert "iteration 7 cannot be read (OSError: no space left to read)" in text and "--load" in text
