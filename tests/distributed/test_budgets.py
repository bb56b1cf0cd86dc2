"""Weights with budgets of their own on tensor-parallel ranks: in each mode each steps as it would alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_muon import Muon
from megatron_muon.engine.modes import MODES
from megatron_muon.routing.layout import WHOLE, Budget, layout_of
from tests.distributed.test_engine import PLAIN, QKV, Given, random
from tests.pool import RankPool

KINDS = (None, Budget(7), Budget(4, "turbo_muon"))
GIVEN = (*[Given((16, 24), 1)] * 6, *[Given((32, 12), 0, QKV)] * 3, Given((12, 20), None))


def params_on(group: dist.ProcessGroup) -> list[torch.nn.Parameter]:
    found = []
    for seed, given in enumerate(GIVEN):
        each = replace(given, layout=replace(given.layout, budget=KINDS[seed % 3]))
        param = each.parameter(group, torch.zeros(each.shape))
        param.grad = each.cut(random(each.shape, seed, torch.float32), group)
        found.append(param)
    return found


def same_as_alone() -> dict[str, list[bool]]:
    """For each mode and weight, whether its bits are those that an optimizer of it alone gives it."""
    group, found = dist.group.WORLD, {}
    for mode in MODES:
        options = {"tp_group": group, "tp_mode": mode, "ns_dtype": "fp32", "fp32_matmul_prec": "highest", **PLAIN}
        together = params_on(group)
        Muon(together, **options).step()
        found[mode] = []
        for number, param in enumerate(params_on(group)):
            budget = layout_of(param).budget or Budget(5, "quintic")
            param.matrix_layout = replace(layout_of(param), budget=None)  # type: ignore[attr-defined]
            own = {"num_ns_steps": budget.steps, "coefficient_type": budget.coefficients or "quintic"}
            Muon([param], **own, **options).step()
            found[mode].append(bool(param.any()) and torch.equal(param, together[number]))
    return found


@pytest.mark.parametrize("world_size", [2])
def test_each_weight_steps_as_if_alone(pool: RankPool, world_size: int) -> None:
    for rank in pool.run(same_as_alone, world_size):
        assert rank == {mode: [True] * len(GIVEN) for mode in MODES}


def error_of_other_budgets() -> tuple[str, bool]:
    """What a rank says whose second weight has another budget than on the other rank, and whether it has not moved."""
    group = dist.group.WORLD
    budgets = (Budget(7), Budget(7 + group.rank()))
    params = [
        replace(GIVEN[0], layout=replace(WHOLE, budget=each)).parameter(group, random((16, 24), 0)) for each in budgets
    ]
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.ones_like(param)
    groups = [{"params": params, "param_names": ["first", "second"]}]
    with pytest.raises(RuntimeError) as error:
        Muon(groups, tp_group=group).step()
    return str(error.value), all(map(torch.equal, params, before))


def test_ranks_with_different_budgets_stop_before_the_first_step(pool: RankPool) -> None:
    expected = "the budget of second is 7 steps on ranks [0] and 8 steps on ranks [1] of the tensor-parallel group"
    for message, unmoved in pool.run(error_of_other_budgets, 2):
        assert expected in message and unmoved
