"""What is captured in a CUDA graph of the step, on fake CUDA: nothing of the host's, and nobody waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_muon import Muon
from megatron_muon.optimizers.graph import StepGraph, capture
from megatron_muon.optimizers.stages import Variant
from tests.fake_cuda.world import FIRST_STEP, Allowed, World
from tests.slow import with_slow
from tests.unit.test_captured_step import CASES

WARMUP = 2

AGREEMENT = Allowed("megatron_muon/agree.py:_numbered", "ranks agree on the step that they capture, before it")

MODES = with_slow(("distributed", "duplicated", "gram", "blockwise"), "duplicated", "gram", "blockwise")
NAMES = ("cautious", "rows under Adam", "damped", "namo", "adamuon", "hyperball", "sphere", "balls", "stiefel")
"""Of each way to compute something one: numbers are compared elsewhere."""


def tensors(values: Any) -> list[torch.Tensor]:
    return [each for each in torch.utils._pytree.tree_leaves(values) if isinstance(each, torch.Tensor)]


def from_the_host(func: Any, args: Any, result: Any) -> None:
    """Refuses copies from the host, pinned memory included: a replay finds there what has been put there since."""
    if any(each.is_cuda for each in tensors(result)):
        assert all(each.is_cuda for each in tensors(args)), f"{func} of a tensor of the host in a captured step"


def captured_in(world: World, lengths: list[int]) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def how(work: Callable[[], None]) -> Callable[[], None]:
        before = len(world.calls)
        world.watch.seen = from_the_host
        with world.refusing():
            work()
        world.watch.seen = None
        lengths.append(len(world.calls) - before)
        return lambda: None

    return how


def optimizer_in(world: World, name: str, mode: str = "auto", **more: Any) -> Muon:
    layouts, options = CASES[name]
    group = world.own_group([(0, 1)])
    params = []
    for number, layout in enumerate(layouts):
        given = {} if layout is None else {"layout": layout}
        params.append(world.parameter(26, 12, dim=1 if number or layout is None else 0, grad=True, **given))
    groups = [{"params": some} for some in (params[:1], params[1:]) if some]
    return Muon(groups, tp_group=group, tp_mode=mode, **{**options, **more})


def steps(world: World, optimizer: Muon, lengths: list[int]) -> StepGraph:
    """Steps before the capture, and that one, with numbers that change."""
    with mock.patch.object(StepGraph, "_pattern", lambda self, rates: (len(rates),)):
        graph = capture(optimizer, WARMUP, how=captured_in(world, lengths))
        for number in range(WARMUP + 1):
            for group in optimizer.param_groups:
                group["lr"], group["weight_decay"] = 0.1 / (1 + number), 0.01 * (1 + number)
            with world.refusing((*FIRST_STEP, AGREEMENT)):
                optimizer.step()
        assert graph.is_captured
    return graph


@pytest.mark.parametrize("name", NAMES)
def test_a_captured_step_has_nothing_of_the_host(name: str) -> None:
    with World(rank=1, ranks=2) as world:
        lengths: list[int] = []
        optimizer = optimizer_in(world, name)
        optimizer.engines.compared_elsewhere = True
        steps(world, optimizer, lengths)
        assert len(lengths) == 1 and lengths[0] > 0


@pytest.mark.parametrize("mode", MODES)
def test_messages_are_captured_with_their_waits(mode: str) -> None:
    with World(rank=0, ranks=2) as world:
        lengths: list[int] = []
        optimizer = optimizer_in(world, "rows under Adam", mode, ns_dtype="fp32")
        optimizer.engines.compared_elsewhere = True
        steps(world, optimizer, lengths)
        assert len(lengths) == 1 and (lengths[0] > 0) is (mode != "blockwise")


class FromTheHost(Variant):
    """Takes a number along from the host, for which nobody waits."""

    def adapt(self, matrices: Any) -> list[torch.Tensor]:
        for update in matrices.updates:
            size = torch.ones(1, device="cpu")
            update.direction.mul_(size.to(update.direction.device, non_blocking=True))
        return super().adapt(matrices)


def test_numbers_from_the_host_would_be_seen() -> None:
    with World(rank=0, ranks=2) as world, pytest.raises(AssertionError, match="of a tensor of the host in a captured"):
        optimizer = optimizer_in(world, "plain", variant=FromTheHost())
        optimizer.engines.compared_elsewhere = True
        steps(world, optimizer, [])
