"""Steps without a gradient, momentum that fades away, weights of zeros, NaN: for every variant and scale mode.

Matrices are 48 x 32: floors of norms that are too low overflow only where a norm of more than 4 is divided by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_muon import Muon
from megatron_muon.choices import SCALE_MODES, SECOND_MOMENTS
from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.sphere import SpectralSphere
from megatron_muon.routing.layout import BALLS, STIEFEL, MatrixLayout, Section

QKV = MatrixLayout("qkv", (Section("q", 8), Section("k", 4), Section("v", 4)))
LINEAR = MatrixLayout("linear")
MEASURED = ("update_norm", "spectral_norm")

Make = Callable[..., Muon]

VARIANTS: dict[str, tuple[Make, MatrixLayout]] = {
    **{mode: (functools.partial(Muon, scale_mode=mode, hidden_size=32), QKV) for mode in SCALE_MODES},
    **{method: (functools.partial(Muon, variant=method), QKV) for method in SECOND_MOMENTS},
    **{
        f"{method}, {mode}": (functools.partial(Muon, variant=method, scale_mode=mode), QKV)
        for method in ("adamuon", "adamuon_eo", "normuon")
        for mode in MEASURED
    },
    "polargrad": (functools.partial(Muon, variant="polargrad", scale_mode="none"), QKV),
    "hyperball": (functools.partial(Muon, variant="hyperball", scale_mode="none"), QKV),
    "sphere": (functools.partial(Muon, variant=SpectralSphere(radius=0.0)), QKV),
    "MuonSphere": (functools.partial(Muon, variant=SpectralSphere(radius=0.0, tolerance=1.0)), QKV),
    "stiefel": (functools.partial(Muon, variant="stiefel"), MatrixLayout("linear", direction=STIEFEL)),
    **{name: (Muon, MatrixLayout("linear", direction=name)) for name in BALLS},
}
KEEPS_NORMS = ("hyperball", "sphere", "MuonSphere")


def random(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(48, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)


def made(name: str, start: torch.Tensor, **options: Any) -> tuple[torch.nn.Parameter, Muon]:
    make, layout = VARIANTS[name]
    param = torch.nn.Parameter(start)
    param.matrix_layout = layout
    return param, make([param], **{"lr": 0.01, "weight_decay": 0.0, "fp32_matmul_prec": "highest", **options})


def on_manifold(name: str, start: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(start)[0] if name == "stiefel" else start


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_first_step_without_a_gradient_moves_nothing(name: str, nesterov: bool) -> None:
    """As of an expert without tokens, or of weights in front of a projection of zeros; then there is one."""
    start = on_manifold(name, random(1))
    param, optimizer = made(name, start.clone(), nesterov=nesterov)
    for step in range(3):
        param.grad = torch.zeros_like(param)
        optimizer.step()
        torch.testing.assert_close(param.detach(), start, rtol=0, atol=2e-6, msg=f"step {step}")
    param.grad = random(2)
    optimizer.step()
    moved = (param.detach() - start).norm().item()
    assert param.isfinite().all() and moved > 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_momentum_that_fades_away_blows_nothing_up(name: str) -> None:
    """After one gradient, steps without any, until the last bits of momentum are gone: 0.1^60."""
    start = on_manifold(name, random(1))
    param, optimizer = made(name, start.clone(), momentum=0.1, lr=1e-3)
    largest, usual = 0.0, 0.0
    for step in range(60):
        before = param.detach().clone()
        param.grad = random(2) if step == 0 else torch.zeros_like(param)
        optimizer.step()
        moved = (param.detach() - before).norm().item()
        usual = max(usual, moved) if step < 10 else usual
        largest = max(largest, moved)
    assert param.isfinite().all()
    # Of second moments, which fade too, updates may grow for some steps: by 1 / sqrt(1 - 0.95) at most.
    assert largest <= usual * (4.5 if "ada" in name or "normuon" in name else 1.2), (usual, largest)
    # Back on the sphere or the manifold, a weight may still be rounded in another way.
    brought_back = name in KEEPS_NORMS or name == "stiefel"
    assert moved <= (1e-6 * start.norm().item() if brought_back else 0.0)


@pytest.mark.parametrize("name", VARIANTS)
def test_nan_shows_where_it_is(name: str) -> None:
    """A weight that would stay as it is, with momentum that is NaN for ever, is worse than one that shows it.

    Others of its shape, which are computed with it, and the other matrices of a fused weight keep their bits.
    """
    found = []
    for value in (1.0, float("nan")):
        param, optimizer = made(name, on_manifold(name, random(1)).clone())
        beside, _ = made(name, on_manifold(name, random(3)).clone())
        optimizer.add_param_group({"params": [beside]})
        for _ in range(2):
            param.grad, beside.grad = random(2), random(4)
            param.grad[3, 5] = value
            optimizer.step()
        assert param.isnan().any() == (value != 1.0)
        others = param.detach().view(3, 16, 32)[:, 8:] if param.matrix_layout.sections else beside.detach()
        found.append((beside.detach(), others))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("prec", ["medium", pytest.param("high", marks=pytest.mark.slow), "highest"])
def test_bfloat16_weights(name: str, prec: str) -> None:
    """Of training loops without float32 copies: norms and second moments are taken in float32 all the same.

    "high" asks for TF32, which CPUs do without: there it is "highest".
    """
    exact, first = made(name, on_manifold(name, random(1)).bfloat16().float(), lr=0.1, momentum=0.0)
    param, optimizer = made(name, on_manifold(name, random(1)).bfloat16(), lr=0.1, momentum=0.0, fp32_matmul_prec=prec)
    start = param.detach().float().clone()
    for each, made_by in ((exact, first), (param, optimizer)):
        each.grad = random(2).bfloat16().to(each.dtype)
        made_by.step()
    assert param.dtype == torch.bfloat16 and param.isfinite().all()
    if name != "stiefel":  # bfloat16 weights are not on the manifold
        # The weight is rounded to eight bits, and Newton-Schulz in bfloat16 errs by a few hundredths.
        bound = 2**-8 * exact.detach().norm() + 0.05 * (exact.detach() - start).norm()
        assert (param.detach().float() - exact.detach()).norm() < bound


@pytest.mark.parametrize("name", KEEPS_NORMS)
def test_weights_of_zeros_cannot_keep_their_norm(name: str) -> None:
    """They would never move. One block of a fused weight is enough."""
    start = random(1)
    start.view(3, 16, 32)[:, 8:12] = 0.0
    param, optimizer = made(name, start)
    param.grad = random(2)
    with pytest.raises(ConfigError, match="a qkv weight whose 12 x 32 matrix is all zeros"):
        optimizer.step()


@pytest.mark.parametrize("radius", [1.0, 2.0])
def test_a_sphere_with_a_radius_takes_weights_of_zeros(radius: float) -> None:
    param = torch.nn.Parameter(torch.zeros(48, 32))
    optimizer = Muon([param], variant=SpectralSphere(radius=radius), lr=0.01, fp32_matmul_prec="highest")
    for step in range(3):
        param.grad = random(step)
        optimizer.step()
    assert torch.linalg.matrix_norm(param.detach(), 2).item() == pytest.approx(radius * 1.5**0.5, rel=0.05)


def test_the_multiplier_of_the_sphere_stays_where_there_is_nothing_to_solve() -> None:
    param, optimizer = made("sphere", random(1), lr=0.001)
    param.matrix_layout = LINEAR
    multipliers = []
    for step in range(12):
        param.grad = random(2) + 0.1 * random(3) if step < 4 or step > 8 else torch.zeros_like(param)
        if step in (4, 8):
            optimizer.state[param]["momentum_buffer"].zero_()
        optimizer.step()
        multipliers.append(optimizer.state[param]["sphere_multiplier"][0, 0].item())
    assert multipliers[4:9] == [multipliers[4]] * 5 and multipliers[4] == multipliers[3]
    assert abs(multipliers[-1]) < 2


def test_the_flag_is_the_radius_at_resume() -> None:
    param, _ = made("sphere", random(1))
    param.matrix_layout = LINEAR
    first = Muon([param], variant=SpectralSphere(radius=2.0))
    param.grad = random(2)
    first.step()
    other = Muon([param], variant=SpectralSphere(radius=5.0))
    other.load_state_dict(first.state_dict())
    other.param_groups[0]["lr"] = 1e-12
    other.step()
    assert torch.linalg.matrix_norm(param.detach(), 2).item() == pytest.approx(5.0 * 1.5**0.5, rel=1e-2)


def test_groups_with_and_without_damping() -> None:
    """Each as it would be in an optimizer of its own, but for eps: added to the norm, or a lower bound of it."""
    params = [torch.nn.Parameter(torch.zeros(48, 32)) for _ in range(2)]
    groups = [{"params": [params[0]], "damping_depth": 2.0}, {"params": [params[1]], "damping_depth": 0.0}]
    optimizer = Muon(groups, lr=1.0, damping_depth=2.0, weight_decay=0.0, eps=1e-12, fp32_matmul_prec="highest")
    for param in params:
        param.grad = random(1)
    optimizer.step()
    torch.testing.assert_close(params[0].detach(), params[1].detach(), rtol=0, atol=1e-3)
    assert params[1].detach().norm() > 1


def test_static_decay_without_a_schedule_is_that_of_each_groups_own_rate() -> None:
    params = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(3)]
    groups = [{"params": [param], "lr": lr} for param, lr in zip(params, (1e-2, 1e-4, 1e-3), strict=True)]
    optimizer = Muon(groups, lr=1e-3, weight_decay=0.1, weight_decay_method="independent_scheduled")
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.param_groups[2]["lr"] /= 2
    optimizer.step()
    assert [param.detach().mean().item() for param in params] == pytest.approx([0.9, 0.9, 0.95])


def test_weights_that_take_turns_do_not_need_new_plans() -> None:
    params = [torch.nn.Parameter(random(seed)) for seed in range(2)]
    optimizer = Muon(params)
    for step in range(20):
        params[step % 2].grad, params[1 - step % 2].grad = random(step), None
        optimizer.step()
    assert len(list(optimizer.engines)) == 2
    for step in range(40):
        more = [torch.nn.Parameter(random(step))]
        optimizer.add_param_group({"params": more})
        more[0].grad = random(1)
        optimizer.step()
        more[0].grad = None
    assert len(list(optimizer.engines)) <= 8


def test_namo_tells_that_updates_may_grow() -> None:
    param = torch.nn.Parameter(random(1))
    with pytest.warns(UserWarning, match=r"NAMO with momentum 0\.99 and beta2 0\.95"):
        Muon([param], variant="namo", momentum=0.99)
