"""No variant makes the host wait for the device within a step."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muon import Muon
from megatron_muon.optimizers.adaptive import METHODS, AdaptiveMuon
from megatron_muon.optimizers.sphere import SpectralSphere
from megatron_muon.optimizers.stiefel import StiefelMuon
from megatron_muon.optimizers.stiefel_solvers import SOLVERS
from megatron_muon.routing.layout import BALLS, MSIGN, STIEFEL
from tests.distributed.test_adaptive import CASES, grad, weight
from tests.distributed.test_engine import no_reading
from tests.pool import RankPool

VARIANTS: dict[str, tuple[type[Muon], str, dict[str, Any]]] = {
    **{method: (AdaptiveMuon, MSIGN, {"moment2_method": method}) for method in METHODS},
    "polargrad": (Muon, MSIGN, {"variant": "polargrad", "scale_mode": "none"}),
    "hyperball": (Muon, MSIGN, {"variant": "hyperball", "scale_mode": "none"}),
    "update_norm": (Muon, MSIGN, {"scale_mode": "update_norm"}),
    "spectral_norm": (Muon, MSIGN, {"scale_mode": "spectral_norm", "damping_depth": 2.0}),
    "cautious": (Muon, MSIGN, {"weight_decay_method": "cautious"}),
    "sphere": (SpectralSphere, MSIGN, {"tolerance": 0.1}),
    **{direction: (Muon, direction, {}) for direction in BALLS},
    **{solver: (StiefelMuon, STIEFEL, {"solver": solver, "iterations": 2}) for solver in SOLVERS},
}


def step_without_waiting(name: str) -> bool:
    """Whether a second step went through and moved every weight. The first compares the plans of the ranks."""
    cls, direction, options = VARIANTS[name]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    params = []
    for shape, dim, layout in (CASES["rows, split"], CASES["columns, wide"]):
        param = torch.nn.Parameter(weight(*shape, seed=1).float().chunk(ranks, dim=dim)[rank].clone())
        param.tensor_model_parallel, param.partition_dim = True, dim
        param.matrix_layout = dataclasses.replace(layout, direction=direction)
        param.grad = grad(shape, 0).float().chunk(ranks, dim=dim)[rank].contiguous()
        params.append(param)
    optimizer = cls(params, lr=0.1, tp_group=dist.group.WORLD, nesterov=True, **options)
    optimizer.step()
    before = [param.detach().clone() for param in params]
    with no_reading(pytest.MonkeyPatch()):
        optimizer.step()
    return not any(torch.equal(param, its) for param, its in zip(params, before, strict=True))


def every_variant() -> list[str]:
    return [name for name in VARIANTS if step_without_waiting(name)]


def test_no_step_waits_for_the_device(pool: RankPool) -> None:
    assert pool.run(every_variant, 2)[0] == list(VARIANTS)
