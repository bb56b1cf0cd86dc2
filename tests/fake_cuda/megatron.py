"""Megatron-Core on one rank of a world of GPUs that are not there: :class:`tests.fake_cuda.world.World`, and its stubs.

A function on a rank of :class:`tests.pool.RankPool` enters :func:`gpus`, which puts the redirects to the CPU aside::

    with gpus(rank=1, ranks=4) as world:
        run = start(Layout(tp=2), bf16=True)
        forward(run)
        with world.refusing(FIRST_STEP):
            step(run)

Megatron-Core is the released wheel: its models, DDP buffers, chains of optimizers, process groups. Three things of it
cannot be had: the backward pass, in which torch's engine asks the driver for the device; numbers, so that what depends
on them gets an answer of the world's; and multi-tensor kernels, in whose place are torch's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

import megatron_muon
from megatron_muon import cpu
from megatron_muon._patching import PatchSet
from megatron_muon.agree import Ranks, _Outcome
from megatron_muon.plugin import factory, nonfinite
from tests.fake_cuda import world
from tests.fake_cuda.world import Allowed, World
from tests.megatron import harness
from tests.megatron.harness import Layout, Run

GPU = torch.device("cuda", 0)

_IN_PLACE = (cpu.attention, cpu.latent_attention, cpu.optimizers)
"""What TransformerEngine has where a GPU is, in plain torch: core attention for latent attention and context
parallelism, and an Adam that counts steps in its groups."""

_OPTIMIZER = "megatron/core/optimizer/optimizer.py"


def _verdict(tensor: torch.Tensor) -> float:
    """What the ranks find: nothing, unless this one has failed."""
    frame = sys._getframe()
    while frame.f_code.co_name != "prepare_grads" or "failure" not in frame.f_locals:
        assert frame.f_back is not None
        frame = frame.f_back
    return 0.0 if frame.f_locals["failure"] is None else nonfinite._FAILED


STEP = (
    Allowed("megatron_muon/plugin/nonfinite.py:prepare_grads", "whether to step, before the first write", _verdict),
    Allowed(f"{_OPTIMIZER}:get_grad_norm", "Megatron-Core adds up the norms of a chain's parts on the host", 1),
)
"""What waits in each step."""

FIRST_STEP = (
    *world.FIRST_STEP,
    *STEP,
    Allowed(f"{_OPTIMIZER}:has_grad_norm_group", "Megatron-Core looks once for groups of norms", 0),
)


@contextlib.contextmanager
def gpus(rank: int, ranks: int, told: list[Any] | None = None) -> Iterator[World]:
    """This process, a rank of the pool, is ``rank`` of ``ranks`` on GPUs, with Megatron-Core as it is on these.

    What only the first rank finds, others take from ``told``, which it has left there, in the order of its tellings.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_cpu())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        entered = stack.enter_context(World(rank, ranks))
        values = [] if told is None else told
        for target, name, value in (*_stubs(), (Ranks, "from_first", _from_first(iter(values), values))):
            stack.enter_context(patch.object(target, name, value))
        stack.callback(_forget_groups)
        yield entered


@contextlib.contextmanager
def _without_cpu() -> Iterator[None]:
    """The redirects to the CPU are put aside, but for those of what torch.compile would make."""
    if not cpu.is_installed():  # already
        yield
        return
    dist.destroy_process_group()
    cpu._REDIRECTS.revert()
    kept = PatchSet("fake", [each for subject in _IN_PLACE for each in subject.PATCHES])
    kept.apply()
    try:
        yield
    finally:
        megatron_muon.uninstall()  # in the reverse order
        kept.revert()
        cpu._REDIRECTS.apply()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def outcomes[T](cases: Mapping[str, T], run: Callable[[T], None]) -> dict[str, str]:
    """What each case has failed with, on a rank of the pool; empty if it has not."""
    found = dict.fromkeys(cases, "")
    with _without_cpu():
        for name, case in cases.items():
            try:
                run(case)
            except Exception:
                found[name] = traceback.format_exc()
    return found


def _stubs() -> Iterator[tuple[Any, str, Any]]:
    from megatron.core.dist_checkpointing import state_dict_utils, validation
    from megatron.core.optimizer import clip_grads
    from megatron.core.tensor_parallel import random

    yield torch.cuda, "get_rng_state", lambda *args: torch.zeros(16, dtype=torch.uint8)
    yield torch.cuda, "manual_seed", lambda seed: None
    yield random, "_set_cuda_rng_state", lambda *args, **kwargs: None
    yield random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.zeros(16, dtype=torch.uint8)
    yield torch.Tensor, "cuda", lambda self, *args, **kwargs: self.to(GPU)
    yield torch.nn.Module, "bfloat16", _bfloat16
    # A fake tensor's memory has no address: that of the storage, which lives as long.
    yield torch.UntypedStorage, "data_ptr", lambda self: self._cdata << 24
    yield torch.Tensor, "data_ptr", _address
    # As with TransformerEngine, which is where a GPU is: Megatron-Core's own stand-ins read each norm on the host.
    yield clip_grads, "multi_tensor_applier", lambda work, overflow, lists, *rest: work(lists, *rest)
    yield clip_grads, "l2_norm_impl", lambda lists, each: (_norm(lists[0]), None)
    yield clip_grads, "multi_tensor_scale_impl", lambda lists, by: torch._foreach_mul_(lists[0], by)
    yield clip_grads, "multi_tensor_scale_tensor_impl", lambda lists, by: torch._foreach_mul_(lists[0], by.view(()))
    for module in (state_dict_utils, validation):  # of what all ranks have
        yield module, "validate_sharding_integrity", lambda *args, **kwargs: None
    yield factory, "refuse_uneven", lambda *args: None  # counts have no numbers
    for module in (dist, dist.distributed_c10d):
        yield module, "all_gather_object", _all_gather_object


def _from_first(heard: Iterator[Any], told: list[Any]) -> Any:
    def from_first(self: Ranks, work: Callable[[], Any]) -> Any:
        if not self.is_first:
            return next(heard)
        told.append(self.together(work))
        return told[-1]

    return from_first


def _address(tensor: torch.Tensor) -> int:
    return (tensor.untyped_storage()._cdata << 24) + tensor.storage_offset() * tensor.element_size()


def _bfloat16(self: torch.nn.Module) -> torch.nn.Module:
    for param in self.parameters():
        param.data = param.data.bfloat16()
    return self


def _norm(grads: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([each.float().norm() for each in grads]).norm().view(1)


def _forget_groups() -> None:
    from megatron.core import parallel_state

    with patch.object(dist, "destroy_process_group"):  # the world does
        parallel_state.destroy_model_parallel()


def _all_gather_object(found: list[Any], mine: Any, group: Any = None) -> None:
    """Every rank has what this one has, and its own number: ranks are a grid."""
    group, me = group or dist.group.WORLD, dist.get_rank()

    def of(rank: int) -> Any:
        if isinstance(mine, list) and all(isinstance(each, _Outcome) for each in mine):
            return [dataclasses.replace(each, rank=each.rank + rank - me) for each in mine]
        return mine

    found[:] = map(of, dist.get_process_group_ranks(group))


def start(
    layout: Layout,
    *,
    optimizer: dict[str, Any] | None = None,
    cores: Callable[[Any], None] = lambda core: None,
    **changes: Any,
) -> Run:
    """A run ready to step, see :func:`tests.megatron.harness.start`, of two layers and one step of Newton-Schulz.

    Args:
        layout: as there.
        optimizer: as there.
        cores: is told of each core attention, before the optimizer is built.
        changes: as there.
    """
    build = harness.build_model

    def build_model(*args: Any, **kwargs: Any) -> Any:
        with GPU:
            chunks = build(*args, **{"perform_initialization": False, "num_layers": 2, **kwargs})
        for module in (module for chunk in chunks for module in chunk.modules()):
            if hasattr(module, "core_attention"):
                cores(module.core_attention)
        return chunks

    with patch.object(harness, "build_model", build_model):
        return harness.start(layout, optimizer={"muon_num_ns_steps": 1, **(optimizer or {})}, replicas=False, **changes)


def forward(run: Run, length: int = 16) -> None:
    """A forward pass of each chunk. With ``overlap_param_gather`` it waits for gathers that a step has begun."""
    tokens = torch.zeros(2, length, dtype=torch.int64, device=GPU)
    positions = torch.arange(length, device=GPU).expand(2, -1)
    hidden = torch.ones(1, 1, length, length * run.layout.cp, device=GPU).tril() < 0.5
    for chunk in run.chunks:
        chunk(tokens, positions, hidden)


def step(run: Run) -> Any:
    """One step, with gradients of no numbers, and the gathers that it begins."""
    found = run.optimizer.step()
    run.gather()
    return found
