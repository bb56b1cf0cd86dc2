"""Muon on the Stiefel manifold in float64: tensor-parallel shards, the manifold itself, and its neighbours."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muon import Muon
from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.stiefel import StiefelMuon
from megatron_muon.optimizers.stiefel_solvers import SOLVERS, msign, tangent
from megatron_muon.routing.layout import STIEFEL, WHOLE, MatrixLayout
from tests.distributed import test_adaptive
from tests.distributed.test_adaptive import HEADS, QKV, grad, rows_of, weight
from tests.pool import RankPool

STEPS, LR, MOMENTUM, RADIUS = 2, 0.05, 0.8, 1.5
# float64: sums in another order, amplified by ten iterations of the solver.
TOLERANCE = 1e-11
CASES = {**test_adaptive.CASES, "heads, more ranks than groups": ((16, 12), 0, HEADS)}


def on_manifold(layout: MatrixLayout) -> MatrixLayout:
    return dataclasses.replace(layout, direction=STIEFEL)


def stiefel(shape: tuple[int, ...], layout: MatrixLayout = WHOLE, seed: int = 1) -> torch.nn.Parameter:
    param = torch.nn.Parameter(weight(*shape, seed=seed))
    param.matrix_layout = on_manifold(layout)
    return param


def written_out(shape: tuple[int, int], layout: MatrixLayout, nesterov: bool = False) -> torch.Tensor:
    """Matrix by matrix: the momentum, the solver, the way back."""
    found = weight(*shape, seed=1)
    for rows in rows_of(layout, shape):
        w = found[rows][None]
        wide = w.size(1) < w.size(2)
        w = msign(w.mT if wide else w, 20)
        momentum = torch.zeros_like(w)
        for step in range(STEPS):
            g = grad(shape, step)[rows][None]
            g = g.mT if wide else g
            momentum = MOMENTUM * momentum + (1 - MOMENTUM) * g
            u = MOMENTUM * momentum + (1 - MOMENTUM) * g if nesterov else momentum
            w = msign(w - LR * tangent(w, u))
        found[rows] = RADIUS * (w.mT if wide else w)[0]
    return found


def train(param: torch.nn.Parameter, cut: Any, **options: Any) -> Muon:
    optimizer = Muon([param], variant=StiefelMuon(radius=RADIUS), lr=LR, momentum=MOMENTUM, weight_decay=0.3, **options)
    for step in range(STEPS):
        param.grad = cut(step).contiguous()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("nesterov", [False, True])
def test_one_process(name: str, nesterov: bool) -> None:
    """Neither weight decay nor precision and scale of other matrices' iteration has a part in it."""
    shape, _, layout = CASES[name]
    param = stiefel(shape, layout)
    optimizer = train(param, lambda step: grad(shape, step), nesterov=nesterov)
    torch.testing.assert_close(param.detach(), written_out(shape, layout, nesterov), rtol=0, atol=1e-12)
    assert set(optimizer.state[param]) == {"momentum_buffer", "momentum_peak", "step"}
    assert optimizer.variant.tangency is not None and 0 < optimizer.variant.tangency.item() < 0.05


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_gradient_of_nan_gives_a_weight_of_nan(solver: str) -> None:
    param = stiefel((12, 8))
    optimizer = Muon([param], variant=StiefelMuon(solver=solver, iterations=3), lr=LR)
    param.grad = torch.full_like(param, float("nan"))
    optimizer.step()
    assert param.isnan().all()


def shards(name: str, options: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Train this rank's shard, then put the shards together; the largest residual of all ranks."""
    shape, dim, layout = CASES[name]

    def cut(whole: torch.Tensor) -> torch.Tensor:
        return whole.chunk(dist.get_world_size(), dim=dim)[dist.get_rank()]

    param = torch.nn.Parameter(cut(weight(*shape, seed=1)).clone())
    param.tensor_model_parallel, param.partition_dim, param.matrix_layout = True, dim, on_manifold(layout)
    optimizer = train(param, lambda step: cut(grad(shape, step)), tp_group=dist.group.WORLD, **options)
    parts = [torch.empty_like(param) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, param.detach().contiguous())
    worst = torch.zeros((), dtype=torch.float64) if optimizer.variant.tangency is None else optimizer.variant.tangency
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return torch.cat(parts, dim=dim), worst.item()


def grid(cases: list[str]) -> dict[str, tuple[torch.Tensor, float]]:
    found = {name: shards(name, {}) for name in cases}
    # How other weights are exchanged, and in which numbers, does not concern these.
    others = {"tp_mode": "gram", "tp_wire_dtype": "bf16", "ns_dtype": "fp32"}
    return {**found, "rows, split: others": shards("rows, split", others)}


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_shards_get_the_update_of_the_whole(pool: RankPool, ranks: int) -> None:
    cases = list(CASES) if ranks == 4 else ["rows, wide", "columns, tall", "rows, split", "rows, heads"]
    results = pool.run(grid, ranks, cases)
    for name, (result, residual) in results[0].items():
        shape, _, layout = CASES[name.removesuffix(": others")]
        torch.testing.assert_close(
            result,
            written_out(shape, layout),
            rtol=0,
            atol=TOLERANCE,
            msg=lambda text, name=name: f"{name}: {text}",
        )
        assert all(torch.equal(result, other[name][0]) for other in results)
        assert 0 < residual < 0.05


def several(chunk_mb: float) -> tuple[list[torch.Tensor], int, int]:
    """Seven weights of one shape and two of another; this rank's rows, the number of chunks, and the operations."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    shapes = [(12, 8)] * 7 + [(8, 20)] * 2
    params = []
    for seed, shape in enumerate(shapes):
        param = torch.nn.Parameter(weight(*shape, seed=seed).chunk(ranks)[rank].clone())
        param.tensor_model_parallel, param.partition_dim, param.matrix_layout = True, 0, on_manifold(WHOLE)
        param.grad = weight(*shape, seed=100 + seed).chunk(ranks)[rank].clone()
        params.append(param)
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.01}]
    optimizer = Muon(groups, variant="stiefel", lr=LR, tp_group=dist.group.WORLD, chunk_mb=chunk_mb)
    optimizer.step()
    engine = optimizer.engines.of([*params[::2], *params[1::2]], STIEFEL)
    return [param.detach() for param in params], len(engine.plan.chunks), engine.counters.flops


def test_matrices_are_dealt_out(pool: RankPool) -> None:
    """Each with its own learning rate, in one chunk or in several."""
    for chunk_mb in (0.0, 8e-4):
        first, second = pool.run(several, 2, chunk_mb)
        assert (first[1] > 1) == (chunk_mb > 0)
        admm = SOLVERS["admm"]
        assert first[2] + second[2] == sum(count * admm.flops(8, q, admm.iterations) for count, q in ((7, 12), (2, 20)))
        for seed, parts in enumerate(zip(first[0], second[0], strict=True)):
            alone = stiefel(tuple(torch.cat(parts).shape), seed=seed)
            alone.grad = weight(*alone.shape, seed=100 + seed)
            Muon([alone], variant="stiefel", lr=0.01 if seed % 2 else LR).step()
            torch.testing.assert_close(torch.cat(parts), alone.detach(), rtol=0, atol=TOLERANCE)


def blockwise() -> torch.Tensor:
    return shards("rows, tall", {"tp_mode": "blockwise"})[0]


def test_blockwise_shards_are_matrices(pool: RankPool) -> None:
    result = pool.run(blockwise, 2)[0]
    for half in result.chunk(2):
        torch.testing.assert_close(half.mT @ half, RADIUS**2 * torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-12)


def traffic() -> tuple[float, int]:
    param = torch.nn.Parameter(torch.randn(16, 8, 8).flatten(0, 1)[:64])
    param.tensor_model_parallel, param.partition_dim, param.matrix_layout = True, 1, on_manifold(WHOLE)
    optimizer = Muon([param], variant="stiefel", lr=LR, tp_group=dist.group.WORLD, tp_wire_dtype="bf16")
    param.grad = torch.ones_like(param)
    optimizer.step()
    counters = optimizer.engines.of([param], STIEFEL).counters
    total = torch.tensor([counters.bytes, counters.collectives], dtype=torch.float64)
    dist.all_reduce(total)
    return tuple(total.tolist())


def test_what_is_sent(pool: RankPool) -> None:
    """Two float32 tensors to the owner, one back: shards of one 64 x 16 matrix on two ranks, half of it away."""
    bytes_sent, collectives = pool.run(traffic, 2)[0]
    assert bytes_sent == (2 + 1) * 64 * 8 * 4
    assert collectives == 2 * 2


@pytest.mark.parametrize(
    ("solver", "shape"),
    [
        ("admm", (16, 24)),
        ("admm", (9, 1)),
        ("fixed_point", (24, 16)),
        *(pytest.param("admm", shape, marks=pytest.mark.slow) for shape in ((24, 16), (16, 16))),
    ],
)
def test_weights_stay_on_the_manifold(solver: str, shape: tuple[int, int]) -> None:
    """|W^T W - R^2 I| <= 1e-5 after 100 steps in float32."""
    param = torch.nn.Parameter(weight(*shape, seed=1).float())
    param.matrix_layout = on_manifold(WHOLE)
    optimizer = Muon([param], variant=StiefelMuon(solver=solver), lr=0.02)
    for step in range(100):
        param.grad = weight(*shape, seed=step).float()
        optimizer.step()
    w = param.detach() if shape[0] >= shape[1] else param.detach().mT
    torch.testing.assert_close(w.mT @ w, torch.eye(min(shape)), rtol=0, atol=1e-5)


def test_steepest_descent() -> None:
    """A linear function falls by lr times its steepest slope, to first order; and to its least value in the end."""
    shape, target = (12, 6), weight(12, 6, seed=2)
    best = -torch.linalg.matrix_norm(target, "nuc").item()
    losses = []
    param = stiefel(shape)
    optimizer = Muon([param], variant="stiefel", lr=1e-12, momentum=0.0)
    param.grad = target.clone()
    optimizer.step()
    start = param.detach().clone()
    slope = (tangent(start[None], target[None], iterations=200) * target).sum().item()
    for lr, tolerance in ((1e-2, 0.05), (1e-4, 0.01)):
        param.data.copy_(start)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        fall = ((start - param.detach()) * target).sum().item()
        assert fall == pytest.approx(lr * slope, rel=tolerance)
    for step in range(50):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 50)
        optimizer.step()
        losses.append((param.detach() * target).sum().item())
    assert losses[-1] == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("by_data", [False, True])
def test_other_weights_are_brought_to_the_manifold_too(by_data: bool) -> None:
    """Weights that come in the place of those of the steps before: as in the first step of an optimizer."""
    param, fresh = stiefel((12, 8)), stiefel((12, 8), seed=2)
    optimizer = train(param, lambda step: grad((12, 8), step))
    if by_data:
        param.data = fresh.detach().clone()
    else:
        param.detach().copy_(fresh)
    optimizer.state.clear()
    for each, its in (
        (param, optimizer),
        (fresh, Muon([fresh], variant=StiefelMuon(radius=RADIUS), lr=LR, momentum=MOMENTUM)),
    ):
        each.grad = grad((12, 8), 5)
        its.step()
    assert torch.equal(param, fresh)


def test_zero_gradients_only_retract() -> None:
    param = stiefel((8, 6), QKV)
    optimizer = Muon([param], variant="stiefel", lr=LR, weight_decay=0.5)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    placed = param.detach().clone()
    for rows in rows_of(QKV, (8, 6)):
        u, _, v = torch.linalg.svd(weight(8, 6, seed=1)[rows], full_matrices=False)
        torch.testing.assert_close(placed[rows], u @ v, rtol=0, atol=1e-12)
    optimizer.step()
    torch.testing.assert_close(param.detach(), placed, rtol=0, atol=1e-14)
    assert optimizer.variant.tangency is not None and optimizer.variant.tangency.item() == 0.0


def test_weights_of_zeros_wait_for_a_gradient() -> None:
    param = torch.nn.Parameter(torch.zeros(8, 6))
    param.matrix_layout = on_manifold(WHOLE)
    optimizer = Muon([param], variant="stiefel", lr=1e-3)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert (param == 0).all()
    param.grad = weight(8, 6, seed=2).float()
    for _ in range(3):
        optimizer.step()
    w = param.detach()
    torch.testing.assert_close(w.mT @ w, torch.eye(6), rtol=0, atol=1e-5)
    assert (w * param.grad).sum() < 0


def test_each_group_has_its_learning_rate() -> None:
    """In one batch."""
    params = [stiefel((8, 6), seed=seed) for seed in (1, 2)]
    optimizer = Muon(
        [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 0.01}], variant="stiefel", momentum=0.0
    )
    alone = [stiefel((8, 6), seed=seed) for seed in (1, 2)]
    for param, other, lr in zip(params, alone, (0.1, 0.01), strict=True):
        param.grad = other.grad = grad((8, 6), 3)
        Muon([other], variant="stiefel", lr=lr, momentum=0.0).step()
    optimizer.step()
    for param, other in zip(params, alone, strict=True):
        torch.testing.assert_close(param, other, rtol=0, atol=1e-12)


def neighbours() -> list[torch.nn.Parameter]:
    """A plain weight, one in a ball, one under both rules."""
    params = [torch.nn.Parameter(weight(32, 12, seed=seed)) for seed in (3, 4, 5)]
    params[1].matrix_layout = dataclasses.replace(WHOLE, direction="sign")
    params[2].matrix_layout = HEADS
    return params


@pytest.mark.parametrize("method", ["decoupled", "l2", "cautious"])
def test_other_weights_get_plain_muon(method: str) -> None:
    options = {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.3, "weight_decay_method": method}
    mixed, plain = neighbours(), neighbours()
    constrained = stiefel((32, 12))
    for optimizer, params in (
        (Muon([mixed[0], constrained, *mixed[1:]], variant="stiefel", **options), [*mixed, constrained]),
        (Muon(plain, **options), plain),
    ):
        for step in range(STEPS):
            for param in params:
                param.grad = grad((32, 12), step)
            optimizer.step()
    assert all(map(torch.equal, mixed, plain))


@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (24, 16)])
def test_resumed_runs_go_on_bit_by_bit(shape: tuple[int, int]) -> None:
    """A weight that is on the manifold is not brought there again; one of another run is."""
    first = stiefel(shape)
    optimizer = train(first, lambda step: grad(shape, step))
    second = torch.nn.Parameter(first.detach().clone())
    second.matrix_layout = on_manifold(WHOLE)
    again = Muon([second], variant=StiefelMuon(radius=RADIUS), lr=LR, momentum=MOMENTUM)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares the momentum otherwise
    for param, its in ((first, optimizer), (second, again)):
        param.grad = grad(shape, 7)
        its.step()
    assert torch.equal(first, second)
    second.data.mul_(3.0)
    again.load_state_dict(again.state_dict())
    again.param_groups[0]["lr"] = 1e-15
    again.step()
    torch.testing.assert_close(second, first, rtol=0, atol=1e-12)


def test_stacks_of_experts_are_single_matrices() -> None:
    stack = torch.nn.Parameter(torch.stack([weight(8, 6, seed=seed) for seed in range(3)]))
    stack.matrix_layout = on_manifold(WHOLE).stack()
    train(stack, lambda step: torch.stack([grad((8, 6), step + seed) for seed in range(3)]))
    for seed in range(3):
        single = stiefel((8, 6), seed=seed)
        train(single, lambda step, seed=seed: grad((8, 6), step + seed))
        torch.testing.assert_close(stack[seed], single, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "newton"}, "StiefelMuon's solver newton: choose one of admm, dual_ascent, fixed_point"),
        ({"iterations": -1}, "StiefelMuon's iterations -1: give a whole number of at least 0"),
        ({"radius": 0.0}, "StiefelMuon's radius 0.0: give a positive number"),
    ],
)
def test_wrong_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Muon([torch.nn.Parameter(torch.zeros(2, 2))], variant=StiefelMuon(**options))


def test_other_optimizers_refuse_such_weights() -> None:
    with pytest.raises(ConfigError, match="use variant stiefel"):
        Muon([stiefel((4, 4))])
