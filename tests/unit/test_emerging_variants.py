"""Variants side by side with those of emerging-optimizers, on whole matrices: what it has, ours agrees with.

Where they differ on purpose (``adamuon``, NorMuon of wide matrices), the test says so and by how much.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emerging_optimizers import orthogonalized_optimizers as upstream

from megatron_muon import Muon
from megatron_muon.optimizers.adaptive import AdaMuon
from megatron_muon.optimizers.registry import VARIANTS

SHAPES = [(24, 24), (36, 16), (16, 36)]
STEPS = 6
LR, MOMENTUM, DECAY = 0.02, 0.8, 0.1
# float32: rounding of 6e-8, times the slope of five quintic steps at small singular values (493), in six steps.
TOLERANCE = 1e-4


def random(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def trained(make: Any, shape: tuple[int, int], **options: Any) -> torch.Tensor:
    """A weight after some steps."""
    param = torch.nn.Parameter(0.5 * random(shape, 1))
    optimizer = make([param], lr=LR, momentum=MOMENTUM, **options)
    for step in range(STEPS):
        # Gradients of unlike rows and sizes, so that second moments matter.
        param.grad = random(shape, 10 + step) * torch.linspace(0.3, 2, shape[0])[:, None] * (1 + step % 3)
        optimizer.step()
    return param.detach()


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative to how far the weight has come."""
    return ((ours - theirs).norm() / (theirs - 0.5 * random(tuple(theirs.shape), 1)).norm()).item()


def both(shape: tuple[int, int], name: str, make: Any, ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    exact = {"fp32_matmul_prec": "highest"}
    kind = getattr(upstream, name)
    return distance(trained(make, shape, **exact, **ours), trained(kind, shape, **exact, **theirs))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("method", ["adamuon", "normuon", "namo"])
def test_second_moments(method: str, nesterov: bool, shape: tuple[int, int]) -> None:
    options = {"nesterov": nesterov, "weight_decay": DECAY, "scale_mode": "spectral", "extra_scale_factor": 0.2}
    name = "adamuon_eo" if method == "adamuon" else method
    found = both(
        shape,
        "AdaptiveMuon",
        Muon,
        {**options, "variant": VARIANTS[name](beta2=0.6, eps=1e-8)},
        {**options, "moment2_method": method, "beta2": 0.6, "eps": 1e-8},
    )
    if method == "normuon" and shape[0] < shape[1]:
        assert found > 0.01  # theirs averages over the columns of a wide matrix, the paper and ours over its rows
    else:
        assert found < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_the_papers_adamuon_is_another(shape: tuple[int, int]) -> None:
    ours = {"weight_decay": 0.0, "variant": AdaMuon(beta2=0.6)}
    theirs = {"weight_decay": 0.0, "moment2_method": "adamuon", "beta2": 0.6}
    assert both(shape, "AdaptiveMuon", Muon, ours, theirs) > 0.05


@pytest.mark.parametrize("shape", SHAPES)
def test_polargrad(shape: tuple[int, int]) -> None:
    options = {"weight_decay": DECAY, "extra_scale_factor": 1e-3}
    found = both(shape, "PolarGrad", Muon, {**options, "variant": "polargrad", "scale_mode": "none"}, options)
    assert found < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_hyperball(shape: tuple[int, int]) -> None:
    """Theirs with the radius that the weight has; without a scale, of which nothing is left."""
    options = {"weight_decay": 0.0}
    found = both(shape, "MuonHyperball", Muon, {**options, "variant": "hyperball", "scale_mode": "none"}, options)
    assert found < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_scion(shape: tuple[int, int]) -> None:
    ours = {"weight_decay": 1.0, "scale_mode": "unit_rms_norm", "extra_scale_factor": 3.0}
    assert both(shape, "Scion", Muon, ours, {"spectral_radius": 3.0}) < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["decoupled", "independent", "l2"])
def test_weight_decay(method: str, shape: tuple[int, int]) -> None:
    options = {"weight_decay": DECAY, "weight_decay_method": method, "scale_mode": "unit_rms_norm"}
    assert both(shape, "Muon", Muon, options, options) < TOLERANCE
