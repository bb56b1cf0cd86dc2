"""NaN and infinity from the backward pass of one micro-batch on one rank: as if the step had never been."""

from __future__ import annotations

import contextlib
import random
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.megatron import harness
from tests.megatron.harness import Layout, Run
from tests.megatron.test_nonfinite import WEIGHTS, State, state_of
from tests.pool import RankPool
from tests.recorded import recorded

STEPS = 6
CAPTURED = {"optimizer_cuda_graph": True}
_GRAPH = "megatron_muon.plugin.step_graph"


class Poison:
    """Puts a value into one element of the gradient of a weight, in one micro-batch of a step, where it is asked to."""

    def __init__(self, run: Run, seed: int) -> None:
        self.chance = random.Random(seed)
        self.steps = sorted(self.chance.sample(range(1, STEPS), 2))
        self._passes = self._at = 0
        self._value = 0.0
        named = {name: param for chunk in run.chunks for name, param in chunk.named_parameters()}
        mine = [name for name in named for kind in ("muon", "adam") if name.endswith(WEIGHTS[kind])]
        for name in mine:
            named[name].register_hook(lambda grad, name=name: self._changed(grad, name))
        self._places: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(self._places, mine)

    def arm(self) -> str:
        """For the next step; the weight. All ranks draw the same."""
        rank, self._at = self.chance.randrange(len(self._places)), self.chance.randrange(2)
        name, self._element = self.chance.choice(self._places[rank]), self.chance.randrange(1 << 20)
        value = self.chance.choice([float("nan"), float("inf"), -float("inf")])
        self._name, self._value, self._passes = name, value, 0 if rank == dist.get_rank() else 9
        return name.removeprefix("module.").removeprefix("module.")

    def disarm(self) -> None:
        self._passes = 9

    def _changed(self, grad: torch.Tensor, name: str) -> torch.Tensor:
        if name == getattr(self, "_name", ""):
            self._passes += 1
            if self._passes == self._at + 1:
                grad = grad.clone()
                grad.view(-1)[self._element % grad.numel()] = self._value
        return grad


def trained(layout: Layout, model: dict[str, Any], options: dict[str, Any], seed: int, poisoned: bool) -> Any:
    """Losses of the steps that count, the state afterwards, and what was told of the others.

    If not ``poisoned``, steps that would be are left out: their batches are passed by.
    """
    with contextlib.ExitStack() as stack:
        if "optimizer_cuda_graph" in options:
            capture = recorded([])
            stack.enter_context(mock.patch(f"{_GRAPH}.check_device"))
            stack.enter_context(mock.patch(f"{_GRAPH}._on_shared_stream", lambda shares_pool, work: capture(work)))
            stack.enter_context(mock.patch(f"{_GRAPH}.WARMUP_STEPS", 1))
        run = harness.start(layout, optimizer=options, early=True, num_layers=2, **model)
    poison = Poison(run, seed)
    original, told, losses = run.optimizer.step, [], []

    def step() -> Any:
        success, norm, zeros = original()
        told.append(bool(success))
        return True, norm, zeros

    run.optimizer.step = step
    for number in range(STEPS):
        if number not in poison.steps:
            losses += run.losses(1)
        elif not poisoned:
            run.step += 1
        else:
            before, name = state_of(run), poison.arm()
            try:
                run.losses(1)
            except RuntimeError as error:
                told.append(name in str(error))
                run.step += 1
            poison.disarm()
            assert not changed(before, state_of(run))
    return losses, state_of(run), told


def changed(before: State, after: State) -> list[str]:
    assert before.keys() == after.keys()
    return [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]


def both(layout: Layout, model: dict[str, Any], options: dict[str, Any], seed: int) -> tuple[Any, ...]:
    losses, state, told = trained(layout, model, options, seed, True)
    clean, expected, _ = trained(layout, model, options, seed, False)
    return losses == clean, changed(expected, state), told


TP, DP, LISTS = Layout(tp=2), Layout(), Layout(layer_wise=True)
BUFFERS = Layout(layer_wise=True, ddp_buffers=True)
STOP = {"muon_nonfinite": "stop"}
CASES = {
    "layer-wise": (BUFFERS, {"bf16": True}, {}, 2),
    "captured, TP 2": (TP, {"bf16": True}, CAPTURED, 2),
    "stop, TP 2": (TP, {}, STOP, 2),
    "int8, layer-wise": (LISTS, {"bf16": True}, {"muon_master": "remainder", "muon_momentum_dtype": "int8"}, 2),
    "stop, layer-wise": (BUFFERS, {"bf16": True}, STOP, 2),
    "captured, stop, layer-wise": (LISTS, {"bf16": True}, {**CAPTURED, **STOP}, 2),
    "normuon": (TP, {}, {"name": "adaptive_muon", "adaptive_muon_moment2_method": "normuon"}, 2),
    "two stages": (Layout(pp=2), {"bf16": True}, {}, 2),
}
QUICK = ("layer-wise", "captured, TP 2", "stop, TP 2")


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_as_if_the_step_had_never_been(pool: RankPool, case: str, seed: int) -> None:
    layout, model, options, ranks = CASES[case]
    for same, differing, told in pool.run(both, ranks, layout, model, options, seed):
        assert differing == []
        assert same
        assert told.count(False) == (0 if "stop" in case else 2), told
        assert len(told) == STEPS
