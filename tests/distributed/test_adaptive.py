"""Muon with second moments on tensor-parallel shards, in float64, against the papers' rules on single matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muon import Muon
from megatron_muon.choices import SECOND_MOMENTS
from megatron_muon.engine.modes import EXACT
from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.adaptive import AdaMuon, NorMuon
from megatron_muon.optimizers.registry import VARIANTS
from megatron_muon.orthogonalize import iteration
from megatron_muon.orthogonalize.scale import scale_factor
from megatron_muon.routing.layout import WHOLE, MatrixLayout, Section
from tests.pairwise import covering, pairwise
from tests.pool import RankPool
from tests.reference import orthogonalized

# One query group is 4 + 2 + 2 rows; 32 rows are four groups.
QKV = MatrixLayout("qkv", (Section("q", 4), Section("k", 2), Section("v", 2)))
HEADS = MatrixLayout("qkv", tuple(Section(section.name, section.rows, matrix_rows=2) for section in QKV.sections))
STEPS, LR, MOMENTUM, BETA2, EPS = 3, 0.1, 0.8, 0.6, 1e-9
# float64: sums in another order, amplified by the slope of the iteration and by divisions by small second moments.
TOLERANCE = 1e-8


def weight(m: int, n: int, seed: int) -> torch.Tensor:
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def grad(shape: tuple[int, int], step: int) -> torch.Tensor:
    """Rows and columns of unlike sizes, so that second moments matter."""
    rows = torch.linspace(0.5, 2.0, shape[0], dtype=torch.float64)[:, None]
    return weight(*shape, seed=10 + step) * rows * (1 + step)


def written_out(method: str, scale_mode: str, nesterov: bool, start: torch.Tensor, grads: list) -> torch.Tensor:
    """One matrix, by the rules of variants' papers (AdaMuon 2507.11005, NorMuon 2510.05491, NAMO 2602.17080)."""
    w, (m, n) = start.clone(), start.shape
    momentum, second = torch.zeros_like(w), 0.0
    steps = iteration("quintic", 5).coefficients
    for g in grads:
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * g
        u = MOMENTUM * momentum + (1 - MOMENTUM) * g if nesterov else momentum
        o = orthogonalized(u.sign() if method == "adamuon" else u, steps)
        if method in ("adamuon", "adamuon_eo"):
            second = BETA2 * second + (1 - BETA2) * o**2
            a = o / (second**0.5 + EPS)
            if method == "adamuon":
                a = a * (min(m, n) ** 0.5 / a.norm())
        elif method == "normuon":
            second = BETA2 * second + (1 - BETA2) * (o**2).mean(dim=1, keepdim=True)
            a = o / second.clamp_min(EPS) ** 0.5
            a = a * (o.norm() / a.norm())
        else:
            second = BETA2 * second + (1 - BETA2) * g.norm() ** 2
            a = o * (u.norm() / (second**0.5 + EPS))
        a = a * ((m * n) ** 0.5 / a.norm()) if scale_mode == "update_norm" else a * scale_factor(scale_mode, m, n)
        w = w * (1 - LR * 0.3) - LR * 0.2 * a
    return w


def made(params: list[torch.nn.Parameter], method: str, **options: Any) -> Muon:
    return Muon(
        params,
        variant=VARIANTS[method](beta2=BETA2, eps=EPS),
        lr=LR,
        momentum=MOMENTUM,
        weight_decay=0.3,
        extra_scale_factor=0.2,
        fp32_matmul_prec="highest",
        **options,
    )


def train(param: torch.nn.Parameter, method: str, cut: Any, **options: Any) -> Muon:
    optimizer = made([param], method, **options)
    for step in range(STEPS):
        param.grad = cut(step).contiguous()
        optimizer.step()
    return optimizer


def trained_shards(
    cases: dict[str, tuple[tuple[int, int], int, MatrixLayout]],
    make: Callable[[list[torch.nn.Parameter]], Muon],
    steps: int,
) -> dict[str, torch.Tensor]:
    """Train this rank's shards of all cases in one optimizer, which sends their messages together; then whole weights.

    Args:
        cases: shape of the whole weight, divided dimension, and layout; by name.
        make: the optimizer of the shards, in the order of the cases.
        steps: how many.
    """
    rank, ranks, params = dist.get_rank(), dist.get_world_size(), []
    for shape, dim, layout in cases.values():
        param = torch.nn.Parameter(weight(*shape, seed=1).chunk(ranks, dim=dim)[rank].clone())
        param.tensor_model_parallel, param.partition_dim, param.matrix_layout = True, dim, layout
        params.append(param)
    optimizer = make(params)
    for step in range(steps):
        for param, (shape, dim, _) in zip(params, cases.values(), strict=True):
            param.grad = grad(shape, step).chunk(ranks, dim=dim)[rank].contiguous()
        optimizer.step()
    found = {}
    for (name, (_, dim, _)), param in zip(cases.items(), params, strict=True):
        parts = [torch.empty_like(param) for _ in range(ranks)]
        dist.all_gather(parts, param.detach().contiguous())
        found[name] = torch.cat(parts, dim=dim)
    return found


def shards(names: list[str], method: str, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    made_of: list[Muon] = []

    def make(params: list[torch.nn.Parameter]) -> Muon:
        made_of.append(made(params, method, tp_group=dist.group.WORLD, **options))
        return made_of[0]

    found = trained_shards({name: CASES[name] for name in names}, make, STEPS)
    for param, state in made_of[0].state.items():
        moment = state[made_of[0].variant.state_name]
        assert moment.shape == (param.shape if method in ("adamuon", "adamuon_eo") else (param.size(0), 1))
    return found


def rows_of(layout: MatrixLayout, shape: tuple[int, int]) -> list[list[int]]:
    """Row numbers of each logical matrix, from the sections as they are written down above."""
    if not layout.sections:
        return [list(range(shape[0]))]
    found: dict[Any, list[int]] = {}
    row = 0
    for period in range(shape[0] // 8):
        for section in layout.sections:
            for index in range(section.rows):
                key = (section.name, period, index // 2) if section.matrix_rows else section.name
                found.setdefault(key, []).append(row)
                row += 1
    return list(found.values())


def expected(
    shape: tuple[int, int], layout: MatrixLayout, method: str, scale_mode: str, nesterov: bool
) -> torch.Tensor:
    start = weight(*shape, seed=1)
    for rows in rows_of(layout, shape):
        grads = [grad(shape, step)[rows] for step in range(STEPS)]
        start[rows] = written_out(method, scale_mode, nesterov, start[rows], grads)
    return start


CASES = {
    "rows, tall": ((32, 12), 0, WHOLE),
    "rows, wide": ((12, 32), 0, WHOLE),
    "columns, tall": ((32, 12), 1, WHOLE),
    "columns, wide": ((12, 32), 1, WHOLE),
    "rows, split": ((32, 12), 0, QKV),
    "columns, split": ((32, 12), 1, QKV),
    "rows, heads": ((32, 12), 0, HEADS),
    "more ranks than groups": ((16, 12), 0, QKV),
}


# NAMO is refused with a measured norm, which would divide out its number.
SCALES = {method: ("moonlight",) if method == "namo" else ("moonlight", "update_norm") for method in SECOND_MOMENTS}


@pytest.mark.parametrize(
    ("rule", "nesterov", "layout"),
    pairwise(
        [(method, mode) for method in SECOND_MOMENTS for mode in SCALES[method]], [False, True], [WHOLE, QKV, HEADS]
    ),
)
def test_one_process(rule: tuple[str, str], nesterov: bool, layout: MatrixLayout) -> None:
    shape, (method, scale_mode) = (32, 12), rule
    param = torch.nn.Parameter(weight(*shape, seed=1))
    param.matrix_layout = layout
    train(param, method, lambda step: grad(shape, step), scale_mode=scale_mode, nesterov=nesterov)
    reference = expected(shape, layout, method, scale_mode, nesterov)
    torch.testing.assert_close(param.detach(), reference, rtol=0, atol=TOLERANCE)


EVERY_MODE = ("columns, wide", "rows, split", "more ranks than groups")


def combinations(cases: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name of the case, method and mode: each case with each method; some in each mode, which meets each method."""
    methods, several = list(SECOND_MOMENTS), [name for name in EVERY_MODE if name in cases]
    chosen = [(several[i], methods[j], EXACT[k]) for i, j, k in covering((len(several), len(methods), len(EXACT)))]
    return [*((name, method, "auto") for name in cases if name not in several for method in methods), *chosen]


def grid(chosen: list[tuple[str, str, str]]) -> dict[tuple[str, str, str], torch.Tensor]:
    found = {}
    for method, mode in dict.fromkeys(key[1:] for key in chosen):
        names = [key[0] for key in chosen if key[1:] == (method, mode)]
        options = {"scale_mode": SCALES[method][-1], "nesterov": True, "tp_mode": mode}
        found |= {(name, method, mode): whole for name, whole in shards(names, method, options).items()}
    return found


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_shards_get_the_update_of_the_whole(pool: RankPool, ranks: int) -> None:
    """Every method with every division and layout; every way of exchange with every method."""
    cases = {name: case for name, case in CASES.items() if ranks == 4 or name != "more ranks than groups"}
    results = pool.run(grid, ranks, combinations(cases))
    for (name, method, mode), result in results[0].items():
        shape, _, layout = cases[name]
        reference = expected(shape, layout, method, SCALES[method][-1], True)
        message = f"{name}, {method}, {mode}"
        torch.testing.assert_close(
            result, reference, rtol=0, atol=TOLERANCE, msg=lambda text, message=message: f"{message}: {text}"
        )
        assert all(torch.equal(result, other[name, method, mode]) for other in results)


@pytest.mark.parametrize("method", SECOND_MOMENTS)
def test_zero_gradients_change_nothing(method: str) -> None:
    param = torch.nn.Parameter(weight(8, 6, seed=1))
    before = param.detach().clone()
    optimizer = Muon([param], variant=method, lr=LR, weight_decay=0.0, scale_mode=SCALES[method][-1])
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(param, before)


@pytest.mark.parametrize("method", SECOND_MOMENTS)
def test_stacks_of_experts_are_single_matrices(method: str) -> None:
    start = torch.stack([weight(8, 6, seed=seed) for seed in range(3)])
    stack = torch.nn.Parameter(start.clone())
    stack.matrix_layout = WHOLE.stack()
    train(stack, method, lambda step: torch.stack([grad((8, 6), step + seed) for seed in range(3)]))
    for seed in range(3):
        single = torch.nn.Parameter(start[seed].clone())
        train(single, method, lambda step, seed=seed: grad((8, 6), step + seed))
        torch.testing.assert_close(stack[seed], single, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("m", "n"), [(8, 8), (12, 5), (5, 12)])
@pytest.mark.parametrize("rank", [None, 3])
def test_rms_of_moonlights_updates(m: int, n: int, rank: int | None) -> None:
    """0.2 with the measured norm at any rank; with the factor by shape 0.2 sqrt(rank / min(m, n))."""
    from megatron_muon import Muon

    full = weight(m, n, seed=3)
    gradient = full if rank is None else weight(m, rank, seed=4) @ weight(rank, n, seed=5)
    for mode, extra in (("update_norm", 0.2), ("moonlight", 1.0)):
        param = torch.nn.Parameter(torch.zeros(m, n, dtype=torch.float64))
        options = {
            "scale_mode": mode,
            "extra_scale_factor": extra,
            "coefficient_type": "deepseekv4",
            "num_ns_steps": 10,
        }
        optimizer = Muon([param], lr=1.0, weight_decay=0.0, fp32_matmul_prec="highest", **options)
        param.grad = gradient
        optimizer.step()
        rms = param.detach().square().mean().sqrt().item()
        wanted = 0.2 if mode == "update_norm" else 0.2 * ((rank or min(m, n)) / min(m, n)) ** 0.5
        assert rms == pytest.approx(wanted, rel=1e-9 if mode == "update_norm" else 2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "adam"}, "variant 'adam': choose one of none, muon, polargrad, hyperball, adamuon, adamuon_eo"),
        ({"variant": NorMuon(beta2=1.0)}, "NorMuon's beta2 1.0: give a number from 0 to below 1"),
        ({"variant": AdaMuon(eps=0.0)}, "AdaMuon's eps 0.0: give a positive number"),
        *(
            (
                {"variant": "namo", "scale_mode": mode},
                f"variant namo with scale_mode {mode}: the mode divides out the number",
            )
            for mode in ("update_norm", "spectral_norm")
        ),
    ],
)
def test_wrong_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Muon([torch.nn.Parameter(torch.zeros(2, 2))], **options)
    assert message in str(error.value)
