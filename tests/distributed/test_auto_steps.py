"""Steps that are measured on tensor-parallel ranks, from whole matrices: the choice of one process, on all ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muon import Muon
from megatron_muon.choices import Budget
from megatron_muon.optimizers.auto_steps import MEASURED_IN
from megatron_muon.routing.layout import WHOLE, MatrixLayout, Section
from tests.pool import RankPool

QKV = MatrixLayout("qkv", (Section("q", 8), Section("k", 4), Section("v", 4)))
CASES: dict[str, tuple[tuple[int, ...], int, MatrixLayout, float]] = {
    "rows": ((48, 32), -2, WHOLE, 0.2),
    "columns": ((32, 48), -1, WHOLE, 1.7),
    "fused": ((64, 32), -2, QKV, 1.5),
    "broken": ((48, 32), -2, MatrixLayout("qkv", (Section("q", 32), Section("k", 8), Section("v", 8))), 1.0),
    "experts": ((3, 32, 16), -2, WHOLE.stack(), 1.9),
}
"""Whole shape, divided dimension, layout, and by which power singular values fall: nothing in common."""


def grad(name: str) -> torch.Tensor:
    """Of matrices whose rows are ever smaller."""
    shape, _, _, power = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    found = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (found * torch.arange(1, shape[-1] + 1, dtype=torch.float64) ** -power).float()


def measured(mode: str = "auto", parts: bool = True) -> tuple[Any, dict[str, torch.Tensor]]:
    """The numbers of steps, and the whole weights after two more steps."""
    group = dist.group.WORLD if parts else None
    params = {}
    for name, (_, dim, layout, _) in CASES.items():
        whole = grad(name)
        cut = whole.chunk(group.size(), dim)[group.rank()] if group else whole
        param = params[name] = torch.nn.Parameter(torch.zeros_like(cut))
        param.matrix_layout = replace(layout, budget=Budget("auto", measured=name))
        param.grad = cut.contiguous()
        if group:
            param.tensor_model_parallel, param.partition_dim = True, dim + 2
    optimizer = Muon(params.values(), tp_group=group, tp_mode=mode, coefficient_type="simple", ns_dtype="fp32")
    for step in range(MEASURED_IN - 1, MEASURED_IN + 1):
        optimizer.param_groups[0]["step"] = step - 1
        optimizer.step()
    found = {}
    for name, param in params.items():
        shards = [torch.empty_like(param.data) for _ in range(group.size())] if group else [param.data]
        if group:
            dist.all_gather(shards, param.data)
        found[name] = torch.cat(shards, CASES[name][1])
    return optimizer.param_groups[0]["auto_steps"], found


def by_mode(modes: tuple[str, ...]) -> list[tuple[Any, dict[str, torch.Tensor]]]:
    return [measured(mode) for mode in modes]


@pytest.mark.parametrize("modes", [("gram",), pytest.param(("auto", "duplicated"), marks=pytest.mark.slow)])
def test_ranks_choose_what_one_process_does(pool: RankPool, modes: tuple[str, ...]) -> None:
    steps, weights = measured(parts=False)
    assert len({number for _, number in steps}) > 2, steps
    for mine in pool.run(by_mode, 2, modes):
        for mode, (its, params) in zip(modes, mine, strict=True):
            assert its == steps, mode
            for name, param in params.items():
                torch.testing.assert_close(param, weights[name], rtol=0, atol=1e-4 * float(weights[name].abs().max()))
