"""Weights in balls of entries, rows and columns (Scion), on tensor-parallel shards, against the rules written out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muon import Muon
from megatron_muon.errors import ConfigError
from megatron_muon.routing.layout import BALLS, COLUMN_NORM, ROW_NORM, SIGN, TABLE, WHOLE, MatrixLayout
from tests.distributed.test_adaptive import CASES, grad, rows_of, trained_shards, weight
from tests.pairwise import pairwise
from tests.pool import RankPool
from tools.bench.observe import LiveBytes

STEPS, LR, MOMENTUM, DECAY, RADIUS = 4, 0.05, 0.8, 0.3, 3.0


def in_ball(layout: MatrixLayout, direction: str) -> MatrixLayout:
    return dataclasses.replace(layout, direction=direction)


def written_out(direction: str, start: torch.Tensor, grads: list[torch.Tensor], table: bool = False) -> torch.Tensor:
    """One matrix."""
    w, momentum = start.clone(), torch.zeros_like(start)
    for g in grads:
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * g
        if direction == SIGN:
            update = momentum.sign()
        else:
            update = momentum / momentum.square().mean(dim=1 if direction == ROW_NORM else 0, keepdim=True).sqrt()
        size = RADIUS if table or direction == COLUMN_NORM else RADIUS / w.size(1)
        w = w * (1 - LR * DECAY) - LR * size * update
    return w


def expected(shape: tuple[int, int], layout: MatrixLayout) -> torch.Tensor:
    whole = weight(*shape, seed=1)
    for rows in rows_of(layout, shape):
        grads = [grad(shape, step)[rows] for step in range(STEPS)]
        whole[rows] = written_out(layout.direction, whole[rows], grads, layout.kind == TABLE)
    return whole


def made(params: list[torch.nn.Parameter], **options: Any) -> Muon:
    return Muon(params, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, ball_radius=RADIUS, **options)


def train(param: torch.nn.Parameter, cut: Any, **options: Any) -> None:
    optimizer = made([param], **options)
    for step in range(STEPS):
        param.grad = cut(step).contiguous()
        optimizer.step()


@pytest.mark.parametrize("direction", BALLS)
@pytest.mark.parametrize("kind", ["linear", TABLE])
def test_one_process(direction: str, kind: str) -> None:
    shape, layout = (32, 12), MatrixLayout(kind, direction=direction)
    param = torch.nn.Parameter(weight(*shape, seed=1))
    param.matrix_layout = layout
    train(param, lambda step: grad(shape, step))
    torch.testing.assert_close(param.detach(), expected(shape, layout), rtol=0, atol=1e-12)


def grid() -> dict[tuple[str, str], torch.Tensor]:
    names = [name for name in CASES if dist.get_world_size() == 4 or name != "more ranks than groups"]
    cases = {f"{name}/{way}": (*CASES[name][:2], in_ball(CASES[name][2], way)) for name in names for way in BALLS}
    found = trained_shards(cases, lambda params: made(params, tp_group=dist.group.WORLD), STEPS)
    return {(name, way): found[f"{name}/{way}"] for name in names for way in BALLS}


@pytest.mark.parametrize("ranks", [2, 4])
def test_shards_get_the_update_of_the_whole(pool: RankPool, ranks: int) -> None:
    for (name, direction), result in pool.run(grid, ranks)[0].items():
        shape, _, layout = CASES[name]
        torch.testing.assert_close(
            result,
            expected(shape, in_ball(layout, direction)),
            rtol=0,
            atol=1e-12,
            msg=lambda text, name=name, direction=direction: f"{name} {direction}: {text}",
        )


@pytest.mark.parametrize(
    ("direction", "nesterov", "dtype"), pairwise(BALLS, [False, True], [torch.float32, torch.bfloat16])
)
def test_a_step_takes_the_memory_of_one_table(direction: str, nesterov: bool, dtype: torch.dtype) -> None:
    """A table is one item of a chunk, however large it is: there are no further copies of it."""
    param = torch.nn.Parameter(torch.randn(8192, 256, generator=torch.Generator().manual_seed(1)).to(dtype))
    param.matrix_layout = MatrixLayout(TABLE, direction=direction)
    optimizer = Muon([param], lr=LR, nesterov=nesterov)
    param.grad = torch.ones_like(param)
    optimizer.step()
    with LiveBytes() as seen:
        optimizer.step()
    # The batch in float32; with Nesterov's momentum, a gradient of 16 bits in float32, too.
    copies = 2 if nesterov and dtype == torch.bfloat16 else 1
    assert seen.peak <= (copies + 0.05) * 4 * param.numel()


@pytest.mark.parametrize("direction", BALLS)
def test_nesterovs_mix(direction: str) -> None:
    """The mix of gradient and momentum, which both stay as they are."""
    param = torch.nn.Parameter(weight(6, 4, seed=1))
    param.matrix_layout = MatrixLayout(TABLE, direction=direction)
    start, g = param.detach().clone(), weight(6, 4, seed=2)
    optimizer = Muon([param], lr=LR, momentum=MOMENTUM, weight_decay=DECAY, ball_radius=RADIUS, nesterov=True)
    momentum = torch.zeros_like(g)
    for _ in range(2):
        param.grad = g.clone()
        optimizer.step()
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * g
        # written_out's first momentum is a multiple of what it is given: balls do not see the factor.
        start = written_out(direction, start, [MOMENTUM * momentum + (1 - MOMENTUM) * g], table=True)
    torch.testing.assert_close(param.detach(), start, rtol=0, atol=1e-12)
    torch.testing.assert_close(optimizer.state[param]["momentum_buffer"], momentum, rtol=0, atol=1e-12)
    assert torch.equal(param.grad, g)


@pytest.mark.parametrize("direction", BALLS)
def test_constrained_weights_stay_in_their_ball(direction: str) -> None:
    """Weight decay 1 makes a step a convex combination: a weight that starts inside never leaves."""
    param = torch.nn.Parameter(0.1 * weight(6, 4, seed=1))
    param.matrix_layout = MatrixLayout(TABLE, direction=direction)
    optimizer = Muon([param], lr=0.3, weight_decay=1.0, ball_radius=2.0)
    for step in range(30):
        param.grad = grad((6, 4), step)
        optimizer.step()
        squares = param.detach().square()
        size = {
            SIGN: squares.max().sqrt(),
            ROW_NORM: squares.mean(dim=1).max().sqrt(),
            COLUMN_NORM: squares.mean(dim=0).max().sqrt(),
        }[direction]
        assert size <= 2.0 + 1e-12
    assert size > 1.0  # it has come near the boundary


def test_spectral_ball() -> None:
    """Scion's hidden weights: unit_rms_norm, a radius as the extra factor, weight decay 1."""
    param = torch.nn.Parameter(0.01 * weight(6, 4, seed=1))
    options = {"coefficient_type": "deepseekv4", "num_ns_steps": 10, "fp32_matmul_prec": "highest"}
    optimizer = Muon([param], lr=0.3, weight_decay=1.0, scale_mode="unit_rms_norm", extra_scale_factor=5.0, **options)
    for step in range(30):
        param.grad = grad((6, 4), step)
        optimizer.step()
        assert torch.linalg.matrix_norm(param.detach(), 2) <= 5.0 * 1.5**0.5 * 1.001


def test_zeros_stay_zero() -> None:
    param = torch.nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    for direction in BALLS:
        param.matrix_layout = MatrixLayout(TABLE, direction=direction)
        optimizer = Muon([param], lr=1.0)
        param.grad = torch.zeros_like(param)
        optimizer.step()
        assert torch.equal(param.detach(), torch.zeros_like(param))


def test_other_weights_of_the_same_optimizer_are_orthogonalized() -> None:
    alone, beside, table = (torch.nn.Parameter(weight(8, 6, seed=1)) for _ in range(3))
    table.matrix_layout = MatrixLayout(TABLE, direction=SIGN)
    for params in ([alone], [table, beside]):
        optimizer = Muon(params, lr=LR)
        for param in params:
            param.grad = grad((8, 6), 0)
        optimizer.step()
    assert torch.equal(alone, beside)
    assert not torch.equal(alone, table)


def test_without_weight_decay_is_refused() -> None:
    param = torch.nn.Parameter(weight(4, 3, seed=1))
    param.matrix_layout = in_ball(WHOLE, SIGN)
    with pytest.raises(ConfigError, match=r"'NAME=sign',\) .* with hyperball, which has no weight decay"):
        Muon([param], scale_mode="none", variant="hyperball")
