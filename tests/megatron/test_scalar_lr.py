"""``--muon-scalar-lr`` through the real factory and Megatron's own scheduler."""

from __future__ import annotations

from typing import Any

import pytest

from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.test_routing import GDN
from tests.pool import RankPool
from tests.slow import with_slow

LR, MIN_LR, SCALAR_LR = 0.01, 0.001, 0.004
WARM_UP, DECAY = 5, 20
OPTIMIZER = {"lr": LR, "min_lr": MIN_LR, "muon_scalar_lr": SCALAR_LR}
SPLIT = {**OPTIMIZER, "muon_gdn_in_proj": "split"}

Rates = list[dict[str, set[float]]]


def rates(layout: Layout, optimizer: dict[str, Any], model: dict[str, Any], style: str = "cosine") -> Rates:
    """For every step of warm-up and decay: the rates of Muon's groups, of their scalar rows, and of the others."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    run = harness.start(layout, optimizer=optimizer, **model)
    scheduler = OptimizerParamScheduler(
        run.optimizer,
        init_lr=0.0,
        max_lr=optimizer["lr"],
        min_lr=optimizer["min_lr"],
        lr_warmup_steps=WARM_UP,
        lr_decay_steps=DECAY,
        lr_decay_style=style,
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=DECAY,
        wd_incr_style="constant",
    )
    table = []
    for _ in range(DECAY + 2):
        found: dict[str, set[float]] = {"muon": set(), "rows": set(), "embedding": set(), "vector": set()}
        for group in run.optimizer.param_groups:
            if "scalar_lr_mult" in group:
                found["muon"].add(group["lr"])
                found["rows"].add(group["lr"] * group["scalar_lr_mult"])
            else:
                for param in group["params"]:
                    embedding = getattr(param, "is_embedding_or_output_parameter", False)
                    found["embedding" if embedding else "vector"].add(group["lr"])
        table.append(found)
        scheduler.step(1)
    return table


def column(table: Rates, name: str) -> list[float]:
    assert all(len(row[name]) == 1 for row in table), f"{name}: one rate at each step"
    return [next(iter(row[name])) for row in table]


def check(table: Rates) -> None:
    muon, rows, embedding, vector = (column(table, name) for name in ("muon", "rows", "embedding", "vector"))
    assert max(muon) == pytest.approx(LR) and muon[WARM_UP] == max(muon), "the peak ends the warm-up"
    assert muon[-1] == pytest.approx(MIN_LR) and muon[1] == pytest.approx(LR / WARM_UP)
    for rate in (rows, embedding, vector):
        assert rate == pytest.approx([value * SCALAR_LR / LR for value in muon], rel=1e-12)
    assert embedding[WARM_UP] == pytest.approx(SCALAR_LR) and embedding[-1] == pytest.approx(MIN_LR * SCALAR_LR / LR)


@pytest.mark.parametrize(
    "style", with_slow(["cosine", "linear", "constant", "inverse-square-root"], "linear", "constant")
)
def test_rates_follow_those_of_muon(pool: RankPool, style: str) -> None:
    (table,) = pool.run(rates, 1, Layout(), SPLIT, GDN, style)
    if style in ("cosine", "linear"):
        check(table)
        return
    rows, muon = column(table, "rows"), column(table, "muon")
    assert rows == pytest.approx([value * SCALAR_LR / LR for value in muon], rel=1e-12)
    assert column(table, "embedding") == pytest.approx(rows, rel=1e-12)


@pytest.mark.parametrize(
    "layout,ranks",
    [
        pytest.param(Layout(tp=2), 2, marks=pytest.mark.slow),
        (Layout(pp=2), 2),
        (Layout(ddp_buffers=True, layer_wise=True), 2),
    ],
)
def test_rates_at_other_layouts(pool: RankPool, layout: Layout, ranks: int) -> None:
    for table in pool.run(rates, ranks, layout, OPTIMIZER, {"bf16": layout.layer_wise}):
        muon = column(table, "muon")
        for name in ("embedding", "vector"):
            for rate, of_muon in zip(table, muon, strict=True):
                assert all(value == pytest.approx(of_muon * SCALAR_LR / LR) for value in rate[name])


def test_without_it_all_rates_are_one(pool: RankPool) -> None:
    (table,) = pool.run(rates, 1, Layout(), {**SPLIT, "muon_scalar_lr": 0.0}, GDN)
    muon = column(table, "muon")
    for name in ("rows", "embedding", "vector"):
        assert column(table, name) == muon


def test_decoupled_lr_wins_for_embeddings(pool: RankPool) -> None:
    optimizer = {**SPLIT, "decoupled_lr": 0.002, "decoupled_min_lr": 0.0005}
    (table,) = pool.run(rates, 1, Layout(), optimizer, GDN)
    embedding, vector, rows = (column(table, name) for name in ("embedding", "vector", "rows"))
    assert (embedding[WARM_UP], embedding[-1]) == (pytest.approx(0.002), pytest.approx(0.0005))
    assert vector == pytest.approx(rows, rel=1e-12)
    assert vector[WARM_UP] == pytest.approx(SCALAR_LR)


def losses(optimizer: dict[str, Any]) -> list[float]:
    return harness.start(Layout(), optimizer=optimizer, **GDN).losses(4)


def test_the_rate_changes_the_training(pool: RankPool) -> None:
    same = pool.run(losses, 1, {**SPLIT, "muon_scalar_lr": LR})[0]
    assert same == pool.run(losses, 1, {**SPLIT, "muon_scalar_lr": 0.0})[0]
    assert same != pool.run(losses, 1, SPLIT)[0]


def error(optimizer: dict[str, Any]) -> str:
    import megatron_muon

    try:
        harness.start(Layout(), optimizer=optimizer)
    except megatron_muon.ConfigError as refused:
        return str(refused)
    return "accepted"


@pytest.mark.parametrize(
    "optimizer,message",
    [
        ({"lr": None, "min_lr": None, "muon_scalar_lr": 0.1}, "--muon-scalar-lr 0.1 without --lr: give --lr"),
        ({"muon_scalar_lr": -1.0}, "--muon-scalar-lr -1.0: give a number of at least 0"),
        ({"muon_scalar_lr": float("inf")}, "--muon-scalar-lr inf: give a number of at least 0"),
    ],
)
def test_refusals(pool: RankPool, optimizer: dict[str, Any], message: str) -> None:
    assert pool.run(error, 1, optimizer)[0].startswith(message)
