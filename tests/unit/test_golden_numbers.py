"""Numbers that specifications and papers give for Muon and its variants, through the package's own functions.

More of them stand where their subject is tested: values of the iterations at 1 and the RMS of orthogonal matrices in
``test_newton_schulz.py``, starving blocks in ``test_muon.py``, Moonlight's RMS, PolarGrad's rate, Hyperball's angle and
the sphere's closed forms in ``tests/distributed``, QK-clip in ``test_qk_clip.py``, LoRA in ``test_lora.py``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muon import Muon, MuonConfig
from megatron_muon.engine.modes import Machine, Sizes
from megatron_muon.engine.plan import Weight
from megatron_muon.engine.planner import Policy, make_plan
from megatron_muon.optimizers.adaptive import NAMO, AdaMuonEO, NorMuon
from megatron_muon.optimizers.sphere import MULTIPLIER, SpectralSphere
from megatron_muon.orthogonalize import iteration
from megatron_muon.orthogonalize.newton_schulz import standard_iteration
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer
from megatron_muon.orthogonalize.scale import scale_factor
from megatron_muon.routing import report
from megatron_muon.routing.layout import WHOLE
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.pool import RankPool
from tests.reference import with_singular_values

# Converges fast enough to make every singular value 1 in float64.
POLAR = {"coefficient_type": "polar_express", "num_ns_steps": 16, "fp32_matmul_prec": "highest", "eps": 1e-30}


def weight(m: int, n: int, seed: int) -> torch.Tensor:
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def update(gradient: torch.Tensor, make: Any = Muon, **options: Any) -> torch.Tensor:
    """The first update, at learning rate 1, without momentum."""
    param = torch.nn.Parameter(torch.zeros_like(gradient))
    optimizer = make([param], lr=1.0, momentum=0.0, weight_decay=0.0, **{**POLAR, **options})
    param.grad = gradient
    optimizer.step()
    return -param.detach()


# --- the iteration on singular values ---

RANGES = [
    # set, steps, slope at 0, smallest and largest result from there to 1
    ("simple", 5, 484.9, 0.007, 0.682, 1.134),
    ("quintic", 5, 492.7, 0.007, 0.978, 1.032),
    ("polar_express", 5, 976.0, 0.007, 0.870, 1.124),
    ("polar_express", 8, 6363.0, 0.001, 1.0, 1.0),
    ("cans", 5, 1049.0, 0.007, 0.884, 1.120),
    ("deepseekv4", 10, 79263.0, 0.001, 1.0, 1.0005),
]


def mapped(s: torch.Tensor, name: str, steps: int) -> torch.Tensor:
    """Where the iteration takes singular values: matrices of one element are their own."""
    return standard_iteration(s.double().view(-1, 1, 1), iteration(name, steps)).flatten()


@pytest.mark.parametrize(("name", "steps", "slope", "start", "least", "most"), RANGES)
def test_range_of_each_set(name: str, steps: int, slope: float, start: float, least: float, most: float) -> None:
    tiny = 1e-12
    assert mapped(torch.tensor([tiny]), name, steps).item() / tiny == pytest.approx(slope, rel=5e-4)
    found = mapped(torch.linspace(start, 1.0, 100_001, dtype=torch.float64), name, steps)
    assert found.min().item() == pytest.approx(least, abs=6e-4)
    assert found.max().item() == pytest.approx(most, abs=6e-4)


def test_worst_points_of_sets_that_do_not_converge() -> None:
    small = torch.linspace(1e-3, 5e-3, 10_001, dtype=torch.float64)
    assert mapped(small, "simple", 5).max().item() == pytest.approx(1.202, abs=6e-4)
    assert mapped(small, "quintic", 5).max().item() == pytest.approx(1.145, abs=6e-4)
    assert mapped(torch.tensor([1e-3]), "quintic", 5).item() == pytest.approx(0.475, abs=6e-4)


# --- what holds for orthogonalized updates ---


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (7, 7)])
def test_update_turns_with_its_gradient(shape: tuple[int, int]) -> None:
    """Orthogonal maps from both sides, and transposition; the order of shards within a whole matrix does not matter."""
    options = {"scale_mode": "none", "coefficient_type": "quintic", "num_ns_steps": 5}
    g = weight(*shape, seed=1)
    left, right = (torch.linalg.qr(weight(size, size, seed=2))[0] for size in shape)
    expected = update(g, **options)
    torch.testing.assert_close(update(left @ g @ right, **options), left @ expected @ right, rtol=0, atol=1e-12)
    torch.testing.assert_close(update(g.T.contiguous(), **options), expected.T, rtol=0, atol=1e-12)


def test_momentum_as_average_and_as_sum_give_the_same_updates() -> None:
    """A heavy ball M <- 0.95 M + G is the average times 20, with Nesterov's mix too."""
    found = []
    for factor in (1.0, 20.0):
        param = torch.nn.Parameter(weight(8, 6, seed=1))
        optimizer = Muon([param], lr=0.1, nesterov=True, fp32_matmul_prec="highest", eps=1e-30)
        for step in range(4):
            param.grad = factor * weight(8, 6, seed=10 + step)
            optimizer.step()
        found.append(param.detach())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale_mode", ["none", "unit_rms_norm", "moonlight"])
def test_errors_of_a_quadratic_fall_by_the_same_length(scale_mode: str) -> None:
    """f = |W - T|^2 / 2 with an exact direction: every singular value of the error falls by lr times the scale."""
    target, lr = weight(6, 4, seed=1), 0.01
    length = lr * scale_factor(scale_mode, 6, 4)
    error = with_singular_values(torch.tensor([3.0, 2.0, 1.5, 1.0], dtype=torch.float64), 6, 4)
    param = torch.nn.Parameter(target + error)
    optimizer = Muon([param], lr=lr, momentum=0.0, weight_decay=0.0, scale_mode=scale_mode, **POLAR)
    for step in range(1, 21):
        param.grad = param.detach() - target
        optimizer.step()
        expected = [value - step * length for value in (3.0, 2.0, 1.5, 1.0)]
        assert torch.linalg.svdvals(param.detach() - target).tolist() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("scale_mode", ["none", "moonlight", "spectral"])
def test_weight_decay_knows_nothing_of_the_scale(scale_mode: str) -> None:
    param = torch.nn.Parameter(weight(12, 5, seed=1))
    optimizer = Muon([param], lr=0.1, weight_decay=0.5, scale_mode=scale_mode)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    torch.testing.assert_close(param.detach(), 0.95 * weight(12, 5, seed=1), rtol=1e-15, atol=0)


@pytest.mark.parametrize("shape", [(256, 256), (512, 128), (128, 512)])
def test_bfloat16_errs_by_two_hundredths_at_most(shape: tuple[int, int]) -> None:
    """Of the largest element of the update."""
    g = weight(*shape, seed=1).float()
    options = {"coefficient_type": "quintic", "num_ns_steps": 5, "scale_mode": "none", "eps": 1e-7}
    exact = update(g, **options)
    rounded = update(g, **options, ns_dtype="bf16")
    assert (rounded - exact).abs().max() < 2e-2 * exact.abs().max()


# --- the scale comes from the whole weight: 4096 x 1024 on eight ranks ---

SCALES = [
    # mode, of the whole, of a shard of rows, of a shard of columns
    ("shape_scaling", 2.0, 1.0, 5.66),
    ("spectral", 64.0, 32.0, 64.0),
    ("unit_rms_norm", 2.0, 0.707, 5.66),
]
SHARDS = {-2: (512, 1024), -1: (4096, 128)}


@pytest.mark.parametrize("tp_mode", ["auto", "owner", "gram", "duplicated", "distributed"])
@pytest.mark.parametrize("dim", SHARDS)
def test_matrices_of_the_plan_have_the_whole_shape(dim: int, tp_mode: str) -> None:
    orthogonalizer = Orthogonalizer(iteration("quintic", 5), torch.float32)
    policy = Policy(tp_mode, Sizes(4, 4, 4), 1 << 28, Machine.of("cpu"))
    plan = make_plan([Weight(SHARDS[dim], WHOLE, dim, "tensor-parallel", 8)], policy, orthogonalizer)
    shapes = {(item.rows, item.columns) for chunk in plan.chunks for batch in chunk.batches for item in batch.items}
    assert shapes == {(4096, 1024)}


@pytest.mark.parametrize(("scale_mode", "whole", "by_rows", "by_columns"), SCALES)
def test_report_shows_the_scale_of_the_whole(scale_mode: str, whole: float, by_rows: float, by_columns: float) -> None:
    wrong = {-2: by_rows, -1: by_columns}
    for dim, shape in SHARDS.items():
        assert scale_factor(scale_mode, *shape) == pytest.approx(wrong[dim], rel=1e-3), "what a shard would give"
        param = torch.nn.Parameter(torch.empty(shape, device="meta"))
        param.tensor_model_parallel, param.partition_dim, param.matrix_layout = True, dim + 2, WHOLE
        (route,) = report.collect([("weight", param)], MuonConfig(), tp_size=8)
        (block,) = route.blocks
        assert scale_factor(scale_mode, block.rows, block.columns) == whole


def assembled(dim: int, scale_mode: str) -> torch.Tensor:
    """The update of a 64 x 16 weight on ranks that have its rows or its columns."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    gradient = weight(64, 16, seed=3).chunk(ranks, dim=dim)[rank].contiguous()
    param = torch.nn.Parameter(torch.zeros_like(gradient))
    param.tensor_model_parallel, param.partition_dim, param.matrix_layout = True, dim, WHOLE
    options = {**POLAR, "scale_mode": scale_mode, "tp_group": dist.group.WORLD}
    optimizer = Muon([param], lr=1.0, momentum=0.0, weight_decay=0.0, **options)
    param.grad = gradient
    optimizer.step()
    parts = [torch.empty_like(param) for _ in range(ranks)]
    dist.all_gather(parts, param.detach().contiguous())
    return torch.cat(parts, dim=dim)


def assembled_updates() -> dict[tuple[int, str], torch.Tensor]:
    return {(dim, row[0]): assembled(dim, row[0]) for dim in (0, 1) for row in SCALES}


def test_updates_of_shards_have_the_scale_of_the_whole(pool: RankPool) -> None:
    """64 x 16, as tall as 4096 x 1024, on four ranks: the spectral norm of the whole update."""
    for (_, scale_mode), found in pool.run(assembled_updates, 4)[0].items():
        expected = 8.0 if scale_mode == "spectral" else 2.0
        assert torch.linalg.matrix_norm(found, 2).item() == pytest.approx(expected, rel=1e-10)


# --- the spectral sphere ---


def on_the_sphere(start: torch.Tensor, gradient: torch.Tensor, lr: float = 1.0) -> tuple[torch.Tensor, float]:
    """Phi, and lambda in units of the gradient, of a step from a weight that is on its sphere."""
    param = torch.nn.Parameter(start.clone())
    optimizer = Muon([param], variant=SpectralSphere(radius=0.0, tolerance=1e-12), lr=lr, momentum=0.0, **POLAR)
    param.grad = gradient
    optimizer.step()
    phi = (start - param.detach()) / (lr * torch.linalg.matrix_norm(start, 2))
    return phi, optimizer.state[param][MULTIPLIER][0, 0].item() * gradient.norm().item()


@pytest.mark.parametrize(
    ("entries", "multiplier", "objective"),
    [
        ((0.5, 0.3, 0.2, 1.0), -0.44, 1.0647065),
        ((1.0, 0.0, 0.0, 2.0), -1.0, 2.0),
        ((0.3, 2.0, -1.0, 0.2), -0.5, None),  # bc < -d^2: -(a + d)
        ((0.3, 2.0, 1.0, 0.2), -0.1, None),  # bc > d^2: d - a
    ],
)
def test_two_by_two(entries: tuple[float, ...], multiplier: float, objective: float | None) -> None:
    g = torch.tensor(entries, dtype=torch.float64).view(2, 2)
    phi, found = on_the_sphere(torch.diag(torch.tensor([1.0, 0.1], dtype=torch.float64)), g)
    assert found == pytest.approx(multiplier, abs=1e-6)
    assert phi[0, 0].item() == pytest.approx(0.0, abs=1e-8)
    if objective is not None:
        assert (g * phi).sum().item() == pytest.approx(objective, abs=1e-7)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_duality_gap_of_6_x_4(seed: int) -> None:
    """<G, Phi> = |G + lambda Theta|_*: no feasible direction descends faster. Plain Muon's would, and leaves."""
    start = with_singular_values(torch.tensor([1.0, 0.76, 0.5, 0.2], dtype=torch.float64), 6, 4)
    g = weight(6, 4, seed)
    phi, multiplier = on_the_sphere(start, g)
    u, _, v = torch.linalg.svd(start, full_matrices=False)
    theta = u[:, :1] @ v[:1]
    primal, dual = (g * phi).sum().item(), torch.linalg.matrix_norm(g + multiplier * theta, "nuc").item()
    assert abs((theta * phi).sum().item()) < 1e-9
    assert primal == pytest.approx(dual, abs=1e-9) and primal < torch.linalg.matrix_norm(g, "nuc").item()
    assert torch.linalg.matrix_norm(phi, 2).item() < 1 + 1e-9


def test_drift_from_the_sphere_is_of_second_order() -> None:
    """A hundredth for a tenth of the learning rate (with singular values 0.24 apart); plain Muon's is a tenth."""
    start = with_singular_values(torch.tensor([1.0, 0.76, 0.5, 0.2], dtype=torch.float64), 6, 4)
    g = -start + 0.5 * weight(6, 4, seed=4)
    plain = update(g, scale_mode="none")

    def drift(direction: torch.Tensor, lr: float) -> float:
        return abs(torch.linalg.matrix_norm(start - lr * direction, 2).item() - 1)

    sphere = [drift(on_the_sphere(start, g, lr)[0], lr) for lr in (1e-2, 1e-3, 1e-4)]
    muon = [drift(plain, lr) for lr in (1e-2, 1e-3, 1e-4)]
    for smaller, larger in ((1, 0), (2, 1)):
        assert sphere[larger] / sphere[smaller] == pytest.approx(100, rel=5e-2)
        assert muon[larger] / muon[smaller] == pytest.approx(10, rel=5e-2)
    assert 0.1 < sphere[0] / 1e-4 < 5 and muon[0] / 1e-2 > 0.1


# --- other variants ---


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12)])
def test_normuon_gives_rows_equal_norms(shape: tuple[int, int]) -> None:
    """Where the second moment is that of this step; the norm of the whole stays that of O."""
    options = {"coefficient_type": "quintic", "num_ns_steps": 5, "scale_mode": "none"}
    g = weight(*shape, seed=1) * torch.linspace(0.1, 3, shape[0], dtype=torch.float64)[:, None]
    found = update(g, Muon, variant=NorMuon(beta2=0.0), **options)
    rows = found.norm(dim=1)
    torch.testing.assert_close(rows, rows.mean().expand_as(rows), rtol=1e-12, atol=0)
    assert found.norm().item() == pytest.approx(update(g, **options).norm().item(), rel=1e-12)


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12)])
def test_adamuon_has_an_rms_of_a_fifth(shape: tuple[int, int]) -> None:
    param = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = Muon(
        [param], variant="adamuon", lr=1.0, weight_decay=0.0, scale_mode="moonlight", fp32_matmul_prec="highest"
    )
    for step in range(3):
        before = param.detach().clone()
        param.grad = weight(*shape, seed=step)
        optimizer.step()
        assert rms(param.detach() - before) == pytest.approx(0.2, rel=1e-12)


def test_adamuon_of_emerging_optimizers_divides_by_its_own_size() -> None:
    g, eps = weight(12, 5, seed=1), 1e-3
    found = update(g, Muon, variant=AdaMuonEO(beta2=0.0, eps=eps), scale_mode="none")
    o = update(g, scale_mode="none")
    torch.testing.assert_close(found, o / (o.abs() + eps), rtol=1e-9, atol=0)


def test_namo_is_muon_where_the_gradient_stays() -> None:
    """alpha -> 1: after 300 steps of the same gradient."""
    g = weight(6, 4, seed=1)
    param = torch.nn.Parameter(torch.zeros_like(g))
    options = {**POLAR, "scale_mode": "none", "variant": NAMO(eps=1e-12)}
    optimizer = Muon([param], lr=1.0, weight_decay=0.0, **options)
    for _ in range(300):
        before = param.detach().clone()
        param.grad = g
        optimizer.step()
    torch.testing.assert_close(before - param.detach(), update(g, scale_mode="none"), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
@pytest.mark.parametrize("rho", [1.0, 3.0])
def test_scion_stays_in_its_ball(shape: tuple[int, int], rho: float) -> None:
    """W <- (1 - lr) W - lr rho sqrt(m / n) O: a mean of points of the ball, whatever the gradients."""
    radius = rho * math.sqrt(shape[0] / shape[1])
    start = weight(*shape, seed=1)
    param = torch.nn.Parameter(start * (0.5 * radius / torch.linalg.matrix_norm(start, 2)))
    options = {**POLAR, "scale_mode": "unit_rms_norm", "extra_scale_factor": rho}
    optimizer = Muon([param], lr=0.2, momentum=0.9, weight_decay=1.0, **options)
    norms = []
    for step in range(30):
        param.grad = weight(*shape, seed=10 + step // 10)
        optimizer.step()
        norms.append(torch.linalg.matrix_norm(param.detach(), 2).item())
    assert all(norm <= radius * (1 + 1e-12) for norm in norms) and max(norms) > 0.8 * radius


# --- a checkpoint of TP 2, resumed at TP 4 ---


def start_in_float64(layout: Layout) -> harness.Run:
    """The harness's model and optimizer, with float64 weights, gradients and state: no norms are clipped."""
    import megatron_muon

    megatron_muon.install()
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.training.training import wrap_model_chunks_with_ddp

    layout.initialize()
    model = {"params_dtype": torch.float64, "num_query_groups": 2, "num_layers": 1}
    chunks = [chunk.double() for chunk in harness.build_model(layout, **model)]
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=False, overlap_grad_reduce=False)
    wrapped = wrap_model_chunks_with_ddp(
        chunks,
        chunks[0].config,
        config,
        use_layer_wise_distributed_optimizer=False,
        use_layer_wise_param_layout=True,
    )
    changes = {"params_dtype": torch.float64, "clip_grad": 0.0, "muon_sphere_tolerance": 0.5}
    options = harness.optimizer_config(layout, name="spectral_sphere", **changes)
    return harness.Run(layout, wrapped, get_megatron_optimizer(options, wrapped))


def uninterrupted(folder: str) -> list[float]:
    run = start_in_float64(Layout(tp=2))
    run.losses(2)
    harness.save_run(run, folder)
    return run.losses(3)


def resumed(folder: str) -> list[float]:
    run = start_in_float64(Layout(tp=4))
    harness.load_run(run, folder)
    return run.losses(3)


def test_resuming_at_another_size_is_going_on(pool: RankPool, tmp_path: Path) -> None:
    """In float64 the losses differ by less than 1e-6, with momentum, singular vectors, radii and multipliers."""
    folder = str(tmp_path / "checkpoint")
    expected = pool.run(uninterrupted, 2, folder)[0]
    assert pool.run(resumed, 4, folder)[0] == pytest.approx(expected, abs=1e-6)
