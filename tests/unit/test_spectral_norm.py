"""Scale mode ``spectral_norm``: what it measures is each update's own, in this step, to 2 %."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_muon import Muon
from megatron_muon.orthogonalize.coefficients import coefficient_types

SPECTRA = {"random": None, "1 / k": -1.0, "1 / k^2": -2.0}


def gradient(m: int, n: int, power: float | None, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(m, n, generator=generator)
    if power is None:
        return found
    u, s, v = torch.linalg.svd(found, full_matrices=False)
    return (u * torch.arange(1.0, s.numel() + 1) ** power) @ v


def sizes(gradients: list[torch.Tensor], steps: int = 3, **options: Any) -> list[float]:
    """Spectral norms of the updates of some late steps, of new gradients each, over sqrt(m / n)."""
    params = [torch.nn.Parameter(torch.zeros_like(each)) for each in gradients]
    optimizer, found = Muon(params, lr=1.0, weight_decay=0.0, momentum=0.0, scale_mode="spectral_norm", **options), []
    optimizer.param_groups[0]["step"] = 100
    for step in range(steps):
        for param, each in zip(params, gradients, strict=True):
            param.data.zero_()
            param.grad = each.roll((step, 2 * step), (0, 1)) + 0.1 * step * gradient(*each.shape, None, seed=step)
        optimizer.step()
        norms = [torch.linalg.matrix_norm(param.detach().double(), 2).item() for param in params]
        found += [norm / (each.size(0) / each.size(1)) ** 0.5 for norm, each in zip(norms, gradients, strict=True)]
    return found


@pytest.mark.parametrize("coefficients", coefficient_types())
def test_updates_have_the_norm_that_they_are_given(coefficients: str) -> None:
    """A power iteration from where the last step ended left 1.001 to 1.141 of it."""
    shapes = [(96, 96), (48, 160), (160, 48), (1, 32), (32, 1), (5, 7)]
    gradients = [gradient(*shape, power) for shape in shapes for power in SPECTRA.values()]
    found = sizes(gradients, coefficient_type=coefficients, fp32_matmul_prec="highest")
    assert all(0.9999 < each < 1.02 for each in found), found


@pytest.mark.parametrize("variant", ["adamuon_eo", "normuon"])
def test_updates_with_second_moments_too(variant: str) -> None:
    found = sizes([gradient(48, 32, -1.0), gradient(32, 80, None)], variant=variant, fp32_matmul_prec="highest")
    assert all(0.9999 < each < 1.02 for each in found), found


def test_an_update_depends_on_nothing_but_its_own_matrix() -> None:
    """Not on a weight beside it that had no gradient before, nor on the number of the step: both decided about the
    number of iterations."""
    options: dict[str, Any] = {"lr": 1.0, "weight_decay": 0.0, "scale_mode": "spectral_norm", "momentum": 0.0}
    first, found = gradient(40, 24, -1.0, seed=1), list[torch.Tensor]()
    for count, beside in ((0, False), (1000, False), (1000, True)):
        param, other = (torch.nn.Parameter(torch.zeros(40, 24)) for _ in range(2))
        optimizer = Muon([param, other], **options)
        optimizer.param_groups[0]["step"] = count
        for given in (first, gradient(40, 24, None)):
            param.data.zero_()
            param.grad = given
            optimizer.step()
            other.grad = gradient(40, 24, -2.0, seed=2) if beside else None
        found.append(param.detach())
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=0, atol=1e-6)


def test_zeros_stay_zeros_and_a_state_of_older_versions_is_loaded() -> None:
    param = torch.nn.Parameter(torch.zeros(48, 32, dtype=torch.float64))
    optimizer = Muon([param], lr=1.0, scale_mode="spectral_norm", weight_decay=0.0, fp32_matmul_prec="highest")
    found = []
    for step in range(4):
        before = param.detach().clone()
        param.grad = gradient(48, 32, None).double() if step == 2 else torch.zeros_like(param)
        optimizer.step()
        found.append(torch.linalg.matrix_norm(param.detach() - before, 2).item() / 1.5**0.5)
        saved = optimizer.state_dict()
        saved["state"][0]["update_left_vector"] = torch.ones(48, 1)
        optimizer.load_state_dict(saved)
        assert "update_left_vector" not in optimizer.state[param]
    assert found[:2] == [0.0, 0.0] and found[2:] == pytest.approx([1.0, 1.0], abs=0.02)
