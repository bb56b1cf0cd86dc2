"""Damped iterations and measured spectral norms on tensor-parallel shards, against whole weights on one process."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muon import Muon
from megatron_muon.engine.modes import EXACT
from tests.distributed.test_adaptive import CASES, EVERY_MODE, grad, trained_shards, weight
from tests.pool import RankPool

# Far more than the norm of the momentum: five steps of the iteration make up for much of what is damped.
OPTIONS: dict[str, Any] = {
    "lr": 0.1,
    "momentum": 0.8,
    "nesterov": True,
    "eps": 50_000.0,
    "damping_depth": 2.0,
    "fp32_matmul_prec": "highest",
}
STEPS = 2


def train(param: torch.nn.Parameter, cut: Any, **options: Any) -> None:
    optimizer = Muon([param], **OPTIONS, **options)
    for step in range(STEPS):
        param.grad = cut(step).contiguous()
        optimizer.step()


SCALE_MODES = ("unit_rms_norm", "spectral_norm")


# Power iterations have many collectives, the same ones in every mode: two modes are enough.
MODES = [*(("unit_rms_norm", mode) for mode in EXACT), ("spectral_norm", "auto"), ("spectral_norm", "owner")]


def grid() -> dict[tuple[str, str, str], torch.Tensor]:
    found = {}
    for scale_mode, mode in MODES:
        cases = {name: CASES[name] for name in (CASES if mode == "auto" else EVERY_MODE)}
        make = functools.partial(Muon, tp_group=dist.group.WORLD, scale_mode=scale_mode, tp_mode=mode, **OPTIONS)
        found |= {(name, scale_mode, mode): whole for name, whole in trained_shards(cases, make, STEPS).items()}
    return found


def whole(name: str, scale_mode: str, **changes: Any) -> torch.Tensor:
    shape, _, layout = CASES[name]
    param = torch.nn.Parameter(weight(*shape, seed=1))
    param.matrix_layout = layout
    train(param, lambda step: grad(shape, step), scale_mode=scale_mode, **changes)
    return param.detach()


def test_shards_get_the_update_of_the_whole(pool: RankPool) -> None:
    """On two ranks; power iterations on four are those of ``test_sphere.py``."""
    results = pool.run(grid, 2)
    expected = {(name, scale_mode): whole(name, scale_mode) for name in CASES for scale_mode in SCALE_MODES}
    for key, result in results[0].items():
        torch.testing.assert_close(
            result, expected[key[:2]], rtol=0, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}"
        )
        assert all(torch.equal(result, other[key]) for other in results)


@pytest.mark.parametrize("scale_mode", SCALE_MODES)
def test_the_damping_is_felt(monkeypatch: pytest.MonkeyPatch, scale_mode: str) -> None:
    damped = whole("rows, tall", scale_mode)
    monkeypatch.setitem(OPTIONS, "eps", 1e-7)
    assert (damped - whole("rows, tall", scale_mode)).norm() > 0.01 * damped.norm()
