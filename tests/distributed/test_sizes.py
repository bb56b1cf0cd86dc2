"""What ``--muon-variant`` names on tensor-parallel shards, in float64, against its rules on single matrices."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muon import ConfigError, Muon, choices
from megatron_muon.engine.modes import EXACT
from megatron_muon.orthogonalize import iteration
from megatron_muon.routing.layout import MatrixLayout
from tests.distributed.test_adaptive import CASES, HEADS, QKV, WHOLE, grad, rows_of, trained_shards, weight
from tests.pairwise import covering
from tests.pool import RankPool
from tests.reference import orthogonalized

STEPS, LR, MOMENTUM, DECAY = 4, 0.05, 0.8, 0.3
TOLERANCE = 1e-9


Steps = list[tuple[torch.Tensor, torch.Tensor]]
"""Of each step u and O, whole."""


def polargrad(w: torch.Tensor, steps: Steps) -> torch.Tensor:
    for u, o in steps:
        w = w * (1 - LR * DECAY) - LR * (o * u).sum() * o
    return w


def hyperball(w: torch.Tensor, steps: Steps) -> torch.Tensor:
    radius = w.norm()
    for _, o in steps:
        w = w - LR * radius * o / o.norm()
        w = w * radius / w.norm()
    return w


RULES: dict[str, Callable[[torch.Tensor, Steps], torch.Tensor]] = {"polargrad": polargrad, "hyperball": hyperball}
"""Each value of ``--muon-variant``, written out for one matrix."""

NAMES = tuple(choices.VARIANTS)  # before some test registers another


def test_every_variant_is_written_out() -> None:
    assert ("none", *RULES) == NAMES


def written_out(variant: str, start: torch.Tensor, grads: list[torch.Tensor]) -> torch.Tensor:
    momentum, steps = torch.zeros_like(start), []
    for g in grads:
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * g
        u = MOMENTUM * momentum + (1 - MOMENTUM) * g
        steps.append((u, orthogonalized(u, iteration("quintic", 5).coefficients)))
    return RULES[variant](start.clone(), steps)


def made(params: list[torch.nn.Parameter], variant: str, **options: Any) -> Muon:
    return Muon(
        params,
        lr=LR,
        momentum=MOMENTUM,
        nesterov=True,
        weight_decay=DECAY,
        scale_mode="none",
        fp32_matmul_prec="highest",
        variant=variant,
        **options,
    )


def train(param: torch.nn.Parameter, variant: str, cut: Any, **options: Any) -> Muon:
    optimizer = made([param], variant, **options)
    for step in range(STEPS):
        param.grad = cut(step).contiguous()
        optimizer.step()
    return optimizer


def combinations(names: list[str]) -> list[tuple[str, str, str]]:
    """Each case with each variant, and each of both with each mode."""
    factors = (names, tuple(RULES), EXACT)
    return [(names[i], factors[1][j], EXACT[k]) for i, j, k in covering([len(factor) for factor in factors])]


def grid(names: list[str]) -> dict[tuple[str, str, str], torch.Tensor]:
    found, chosen = {}, combinations(names)
    for variant, mode in dict.fromkeys(key[1:] for key in chosen):
        cases = {key[0]: CASES[key[0]] for key in chosen if key[1:] == (variant, mode)}
        make = functools.partial(made, variant=variant, tp_group=dist.group.WORLD, tp_mode=mode)
        found |= {(name, variant, mode): whole for name, whole in trained_shards(cases, make, STEPS).items()}
    return found


def expected(shape: tuple[int, int], layout: MatrixLayout, variant: str) -> torch.Tensor:
    start = weight(*shape, seed=1)
    for rows in rows_of(layout, shape):
        start[rows] = written_out(variant, start[rows], [grad(shape, step)[rows] for step in range(STEPS)])
    return start


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_shards_get_the_update_of_the_whole(pool: RankPool, ranks: int) -> None:
    names = [name for name in CASES if ranks == 4 or name != "more ranks than groups"]
    for (name, variant, mode), result in pool.run(grid, ranks, names)[0].items():
        shape, _, layout = CASES[name]
        torch.testing.assert_close(
            result,
            expected(shape, layout, variant),
            rtol=1e-9,
            atol=TOLERANCE,
            msg=lambda text, message=f"{name}, {variant}, {mode}": f"{message}: {text}",
        )


@pytest.mark.parametrize("layout", [WHOLE, QKV, HEADS], ids=["whole", "split", "heads"])
def test_norms_of_hyperball_stay(layout: MatrixLayout) -> None:
    """Of each logical matrix, each with a radius of its own."""
    param = torch.nn.Parameter(weight(32, 12, seed=1) * torch.linspace(0.5, 2, 32, dtype=torch.float64)[:, None])
    param.matrix_layout = layout
    before = [param[rows].norm().item() for rows in rows_of(layout, (32, 12))]
    train(param, "hyperball", lambda step: grad((32, 12), step))
    after = [param[rows].norm().item() for rows in rows_of(layout, (32, 12))]
    assert after == pytest.approx(before, rel=1e-12) and len({round(norm, 6) for norm in before}) == len(before)


def test_learning_rate_of_hyperball_is_an_angle() -> None:
    """For an update that is orthogonal to the weight: atan(lr)."""
    param = torch.nn.Parameter(torch.diag(torch.tensor([3.0, 3.0, 0.0, 0.0], dtype=torch.float64)))
    before = param.detach().clone()
    optimizer = Muon([param], lr=0.2, momentum=0.0, scale_mode="none", variant="hyperball", fp32_matmul_prec="highest")
    param.grad = torch.diag(torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64))
    optimizer.step()
    cosine = (param * before).sum() / (param.norm() * before.norm())
    assert math.acos(cosine.item()) == pytest.approx(math.atan(0.2), rel=1e-9)


def test_polargrad_converges_linearly_on_a_quadratic() -> None:
    """f = |W|^2 / 2 with an exact polar factor: |W|^2 shrinks by 1 - 2 lr + r lr^2 a step at most, r the rank."""
    param = torch.nn.Parameter(weight(6, 4, seed=2))
    options = {"coefficient_type": "deepseekv4", "num_ns_steps": 10, "fp32_matmul_prec": "highest"}
    lr, rank = 0.1, 4
    optimizer = Muon([param], lr=lr, momentum=0.0, weight_decay=0.0, scale_mode="none", variant="polargrad", **options)
    for _ in range(60):
        before = param.norm().item() ** 2
        param.grad = param.detach().clone()
        optimizer.step()
        assert param.norm().item() ** 2 <= before * (1 - 2 * lr + rank * lr**2) * (1 + 1e-2)
    assert param.norm() < 1e-2 * weight(6, 4, seed=2).norm()


def test_hyperball_refuses_scale_modes() -> None:
    with pytest.raises(ConfigError, match=r"^variant hyperball with scale_mode spectral"):
        Muon([torch.nn.Parameter(torch.zeros(2, 2))], variant="hyperball")


DECAYS = {
    "decoupled": lambda w, o, lr: w * (1 - lr * 0.3) - lr * o,
    "independent": lambda w, o, lr: w * (1 - 0.3) - lr * o,
    "independent_scheduled": lambda w, o, lr: w * (1 - 0.3 * lr / 0.1) - lr * o,
    "cautious": lambda w, o, lr: torch.where(w * o > 0, w * (1 - lr * 0.3), w) - lr * o,
    "l2": lambda w, o, lr: w - lr * o,
}


@pytest.mark.parametrize("method", DECAYS)
def test_weight_decay(method: str) -> None:
    """With a learning rate that falls; l2 goes through the momentum."""
    param = torch.nn.Parameter(weight(8, 6, seed=1))
    w, momentum = weight(8, 6, seed=1), torch.zeros(8, 6, dtype=torch.float64)
    options = {"scale_mode": "none", "fp32_matmul_prec": "highest", "weight_decay_method": method}
    optimizer = Muon([param], lr=0.1, momentum=0.8, weight_decay=0.3, **options)
    for step in range(4):
        lr = 0.1 / (1 + step)
        optimizer.param_groups[0]["lr"] = lr
        param.grad = grad((8, 6), step)
        optimizer.step()
        g = grad((8, 6), step) + (0.3 * w if method == "l2" else 0)
        momentum = 0.8 * momentum + 0.2 * g
        w = DECAYS[method](w, orthogonalized(momentum, iteration("quintic", 5).coefficients), lr)
        assert torch.equal(param.grad, grad((8, 6), step)), "the gradient is left as it is"
    torch.testing.assert_close(param.detach(), w, rtol=0, atol=1e-9)


def test_scheduled_decay_does_not_depend_on_the_learning_rate() -> None:
    """Bit for bit, where there is nothing but decay (arXiv 2512.05620)."""
    found = []
    for lr in (0.125, 1.25):
        param = torch.nn.Parameter(weight(8, 6, seed=1))
        optimizer = Muon([param], lr=lr, weight_decay=0.01, weight_decay_method="independent_scheduled")
        for step in range(5):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / 8)
            param.grad = torch.zeros_like(param)
            optimizer.step()
        found.append(param.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-15, atol=0)
    assert not torch.equal(found[0], weight(8, 6, seed=1))


def example_of_the_docs(dim: int) -> torch.Tensor:
    """``docs/variants.md``'s variant on a shard: the updates of all ranks, put together."""
    text = (Path(__file__).parents[2] / "docs" / "variants.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    param = torch.nn.Parameter(weight(32, 12, seed=1).chunk(ranks, dim=dim)[rank].contiguous())
    names: dict[str, Any] = {"params": [param]}
    exec(code, names)
    param.tensor_model_parallel, param.partition_dim = True, dim
    before = param.detach().clone()
    options = {"scale_mode": "none", "weight_decay": 0.0, "fp32_matmul_prec": "highest"}
    optimizer = Muon([param], lr=1.0, variant=names["EqualRows"](), tp_group=dist.group.WORLD, **options)
    param.grad = grad((32, 12), 0).chunk(ranks, dim=dim)[rank].contiguous()
    optimizer.step()
    parts = [torch.empty_like(param) for _ in range(ranks)]
    dist.all_gather(parts, (before - param.detach()).contiguous())
    return torch.cat(parts, dim=dim)


@pytest.mark.parametrize("dim", [0, 1])
def test_example_of_the_docs(pool: RankPool, dim: int) -> None:
    o = orthogonalized(0.05 * grad((32, 12), 0), iteration("quintic", 5).coefficients)
    expected = o / o.square().mean(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(pool.run(example_of_the_docs, 2, dim)[0], expected, rtol=0, atol=TOLERANCE)
