"""Muon on the spectral sphere, in float64: closed forms, duality, and tensor-parallel shards."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muon import Muon
from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.power import noise_of
from megatron_muon.optimizers.sphere import SpectralSphere, evaluations
from tests.distributed.test_adaptive import CASES, HEADS, QKV, WHOLE, grad, rows_of, trained_shards, weight
from tests.pool import RankPool

# Ten steps that bring every singular value to 1 within 5e-4 (variants of lesser reach would blur h).
SHARP = {"coefficient_type": "deepseekv4", "num_ns_steps": 10, "fp32_matmul_prec": "highest", "eps": 1e-30}
TOLERANCE = 1e-3


def one_step(start: torch.Tensor, gradient: torch.Tensor, tolerance: float, lr: float = 1.0) -> torch.Tensor:
    """Phi of a step from a weight that is on its sphere."""
    param = torch.nn.Parameter(start.clone())
    optimizer = Muon([param], variant=SpectralSphere(radius=0.0, tolerance=tolerance), lr=lr, momentum=0.0, **SHARP)
    param.grad = gradient
    optimizer.step()
    return (start - param.detach()) / (lr * torch.linalg.matrix_norm(start, 2))


@pytest.mark.parametrize(
    ("entries", "objective"),
    [
        # bc < -d^2: a rotation, lambda -(a + d)
        ((0.3, 2.0, -1.0, 0.2), None),
        # bc > d^2: a reflection, lambda d - a
        ((0.3, 2.0, 1.0, 0.2), None),
        # neither: no lambda has h = 0; the combination of both sides
        ((0.5, 0.3, 0.2, 1.0), 1.0647065),
        ((1.0, 0.0, 0.0, 2.0), 2.0),
    ],
)
def test_two_by_two(entries: tuple[float, ...], objective: float | None) -> None:
    g = torch.tensor(entries, dtype=torch.float64).view(2, 2)
    start = torch.diag(torch.tensor([1.0, 0.1], dtype=torch.float64))
    phi = one_step(start, g, 1e-6)
    a, b, c, d = entries
    if objective is None:
        s, sign = b * c, (1 if b * c > 0 else -1)
        lam = d - a if s > 0 else -(a + d)
        shifted = g + lam * torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
        u, _, v = torch.linalg.svd(shifted)
        torch.testing.assert_close(phi, u @ v, rtol=0, atol=TOLERANCE)
        assert torch.det(phi).item() == pytest.approx(-sign, abs=TOLERANCE)
    else:
        assert (g * phi).sum().item() == pytest.approx(objective, abs=2 * TOLERANCE)
    assert phi[0, 0].abs() < TOLERANCE
    assert torch.linalg.matrix_norm(phi, 2) < 1 + TOLERANCE


@pytest.mark.parametrize(("m", "n"), [(6, 4), (4, 6), (5, 5), (3, 1)])
def test_duality_gap(m: int, n: int) -> None:
    """<G, Phi> equals the least of |G + lambda Theta|_*: no feasible direction is better."""
    start, g = weight(m, n, seed=3), weight(m, n, seed=4)
    phi = one_step(start, g, 1e-7)
    u, _, v = torch.linalg.svd(start)
    theta = u[:, :1] @ v[:1]
    assert (theta * phi).sum().abs() < TOLERANCE
    grid = torch.linspace(-4, 4, 4001, dtype=torch.float64)[:, None, None] * g.norm()
    bound = torch.linalg.matrix_norm(g + grid * theta, "nuc").min()
    assert (g * phi).sum().item() == pytest.approx(bound.item(), rel=2e-3)
    unconstrained = torch.linalg.matrix_norm(g, "nuc")
    assert (g * phi).sum() < unconstrained


@pytest.mark.parametrize("tolerance", [1e-2, 1e-5])
def test_spectral_norm_stays_to_first_order(tolerance: float) -> None:
    """Its change falls with the square of the learning rate; that of Muon with the learning rate."""
    start, g = weight(8, 6, seed=5), weight(8, 6, seed=6)
    norm = torch.linalg.matrix_norm(start, 2)
    drift = []
    for lr in (1e-1, 1e-2):
        after = start - lr * norm * one_step(start, g, tolerance, lr)
        drift.append((torch.linalg.matrix_norm(after, 2) / norm - 1).abs().item())
    assert drift[1] < drift[0] / 30 and drift[0] < 0.05


@pytest.mark.parametrize("layout", [WHOLE, QKV, HEADS], ids=["whole", "split", "heads"])
def test_each_matrix_has_its_sphere(layout: Any) -> None:
    shape, radius = (32, 12), 2.0
    param = torch.nn.Parameter(weight(*shape, seed=1))
    param.matrix_layout = layout
    optimizer = Muon([param], variant=SpectralSphere(radius=radius), lr=0.005, momentum=0.8, weight_decay=0.5, **SHARP)
    for step in range(6):
        param.grad = grad(shape, step)
        optimizer.step()
    for rows in rows_of(layout, shape):
        wanted = radius * (len(rows) / 12) ** 0.5
        assert torch.linalg.matrix_norm(param[rows].detach(), 2).item() == pytest.approx(wanted, rel=2e-2)


@pytest.mark.parametrize("options", [{"scale_mode": "spectral_norm"}, {"extra_scale_factor": 0.2}])
def test_nothing_but_the_radius_scales(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ConfigError, match=f"{name} {value} with variant spectral_sphere: the radius decides"):
        Muon([torch.nn.Parameter(weight(8, 6, seed=1))], variant="spectral_sphere", **options, **SHARP)


def grid(cases: list[tuple[str, str]]) -> dict[tuple[str, str], torch.Tensor]:
    found, options = {}, {"variant": "spectral_sphere", "lr": 0.05, "momentum": 0.8, **SHARP}
    for mode in dict.fromkeys(mode for _, mode in cases):
        some = {name: CASES[name] for name, its_mode in cases if its_mode == mode}
        make = functools.partial(Muon, tp_mode=mode, tp_group=dist.group.WORLD, **options)
        found |= {(name, mode): whole for name, whole in trained_shards(some, make, 2).items()}
    return found


OTHER_MODES = [("rows, split", "gram"), ("columns, wide", "owner"), ("rows, tall", "distributed")]


@pytest.mark.parametrize(
    ("ranks", "cases"), [(2, OTHER_MODES), (4, [(name, "auto") for name in CASES])], ids=["2", "4"]
)
def test_shards_get_the_update_of_the_whole(pool: RankPool, ranks: int, cases: list[tuple[str, str]]) -> None:
    """Two steps: singular vectors, multiplier and radius of the second are those that the first has left."""
    for (name, mode), result in pool.run(grid, ranks, cases)[0].items():
        shape, _, layout = CASES[name]
        param = torch.nn.Parameter(weight(*shape, seed=1))
        param.matrix_layout = layout
        optimizer = Muon([param], variant="spectral_sphere", lr=0.05, momentum=0.8, **SHARP)
        for step in range(2):
            param.grad = grad(shape, step)
            optimizer.step()
        torch.testing.assert_close(
            result, param.detach(), rtol=0, atol=1e-7, msg=lambda text, name=name, mode=mode: f"{name} {mode}: {text}"
        )


def test_zero_gradients_only_retract() -> None:
    param = torch.nn.Parameter(weight(6, 4, seed=1))
    optimizer = Muon([param], variant=SpectralSphere(radius=0.0), lr=0.1, **SHARP)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    torch.testing.assert_close(param.detach(), weight(6, 4, seed=1), rtol=1e-12, atol=0)


def test_few_evaluations_are_enough() -> None:
    """lambda goes on from the step before: seven evaluations a step and seventeen train alike."""

    def trained(tolerance: float) -> torch.Tensor:
        param = torch.nn.Parameter(weight(24, 16, seed=1))
        optimizer = Muon(
            [param], variant=SpectralSphere(radius=0.0, tolerance=tolerance), lr=0.02, momentum=0.9, **SHARP
        )
        for step in range(12):
            param.grad = 0.3 * weight(24, 16, seed=2) + weight(24, 16, seed=10 + step) + 0.5 * param.detach()
            optimizer.step()
        return param.detach()

    few, many, none = trained(0.1), trained(1e-4), trained(1.0)
    moved = (many - weight(24, 16, seed=1)).norm()
    assert (few - many).norm() < 2e-3 * moved
    assert (none - many).norm() > 0.1 * moved


# [[1, -1], [-1, 1]] and blocks of it: rows and columns sum to 0, so that nothing comes of a power iteration from ones.
ZERO_SUMS = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64).repeat(3, 2)


def zero_sums(scale: float) -> list[float]:
    """The spectral norm after a step without gradient, of shards put together, divided by rows and by columns."""
    return [zero_sums_of_shards(dim, scale) for dim in (0, 1)]


def zero_sums_of_shards(dim: int, scale: float) -> float:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    param = torch.nn.Parameter((scale * ZERO_SUMS).chunk(ranks, dim=dim)[rank].clone())
    param.tensor_model_parallel, param.partition_dim = True, dim
    optimizer = Muon([param], variant=SpectralSphere(radius=2.0), lr=0.1, tp_group=dist.group.WORLD, **SHARP)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    parts = [torch.empty_like(param) for _ in range(ranks)]
    dist.all_gather(parts, param.detach().contiguous())
    return torch.linalg.matrix_norm(torch.cat(parts, dim=dim), 2).item()


def test_rows_that_sum_to_zero_have_singular_vectors_too(pool: RankPool) -> None:
    wanted = 2.0 * (6 / 4) ** 0.5
    for found in pool.run(zero_sums, 2, 5.0):
        assert found == pytest.approx([wanted, wanted], rel=1e-12)


def test_power_iterations_start_alike_at_every_division() -> None:
    """From the same vector, cut by columns; noise, not a pattern, without a mean."""
    whole = noise_of(4096)
    assert torch.equal(whole[:64], noise_of(64))
    assert whole.abs().max() <= 1 and whole.mean().abs() < 0.03 and whole.var().item() == pytest.approx(1 / 3, rel=0.05)
    waves = torch.fft.rfft(whole).abs()[1:] / (4096 / 3) ** 0.5
    assert waves.max() < 3.5 and len(whole.unique()) == 4096


@pytest.mark.parametrize("radius", [0.0, 2.0])
def test_sphere_of_a_weight_that_another_optimizer_has_trained(radius: float) -> None:
    """At step 101 it has no singular vectors yet, nor a radius: both are found as in a first step."""
    start, other = weight(96, 64, seed=1), 2.0 * (96 / 64) ** 0.5
    param = torch.nn.Parameter(start.clone())
    muon = Muon([param])
    param.grad = weight(96, 64, seed=2)
    muon.step()
    state = muon.state_dict()
    state["param_groups"][0]["step"] = 100
    param.data = start.clone()
    optimizer = Muon([param], variant=SpectralSphere(radius=radius), **SHARP)
    optimizer.load_state_dict(state)
    param.grad = torch.zeros_like(param)
    optimizer.param_groups[0]["lr"] = 1e-12
    optimizer.step()
    norm = torch.linalg.matrix_norm(start, 2).item() if radius == 0 else other
    assert optimizer.state[param]["sphere_radius"].max().item() == pytest.approx(norm, rel=5e-3)
    assert torch.linalg.matrix_norm(param.detach(), 2).item() == pytest.approx(norm, rel=5e-3)


def test_number_of_evaluations() -> None:
    assert [evaluations(tolerance) for tolerance in (1.0, 0.5, 1e-2, 1e-4)] == [1, 4, 10, 17]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"radius": -1.0}, "SpectralSphere's radius -1.0"), ({"tolerance": 0.0}, "SpectralSphere's tolerance 0.0")],
)
def test_wrong_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Muon([torch.nn.Parameter(torch.zeros(2, 2))], variant=SpectralSphere(**options))


def test_weights_that_were_replaced_are_brought_to_the_sphere() -> None:
    """Three power iterations from the singular vectors of the old weights would not find the norm of the new ones."""
    generator = torch.Generator().manual_seed(5)
    bases = [torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, generator=generator)).Q for _ in range(2)]
    old, new = (base @ torch.diag(torch.linspace(1.0, 0.8, 16, dtype=torch.float64)) @ base.mT for base in bases)
    param = torch.nn.Parameter(old)
    optimizer = Muon([param], variant=SpectralSphere(radius=2.0), lr=1e-12)
    for values in (old, new):
        param.detach().copy_(values)
        optimizer.forget()
        param.grad = torch.ones_like(param)
        optimizer.step()
        # 64 iterations: (0.987)^128 of the next singular value is left in the estimate's square.
        assert torch.linalg.matrix_norm(param.detach(), 2).item() == pytest.approx(2.0, rel=2e-3)
