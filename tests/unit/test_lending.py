"""Plans in which data-parallel ranks orthogonalize for one another: each matrix once, alike on all ranks, and even."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import pytest
import torch

from megatron_muon.engine.choose import choose_plan
from megatron_muon.engine.lending import lend
from megatron_muon.engine.modes import AUTO, LENT, LOCAL, SPLIT, Machine, Sizes
from megatron_muon.engine.plan import Peers, Plan, Weight
from megatron_muon.engine.planner import Policy, items_of
from megatron_muon.engine.prediction import predict
from megatron_muon.orthogonalize.coefficients import iteration
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer
from megatron_muon.routing.layout import WHOLE, MatrixLayout, Section
from tests.random_weights import BUDGETED, random_weights

ITERATION = Orthogonalizer(iteration("quintic", 5), torch.bfloat16, budgeted=BUDGETED)
SIZES = Sizes(2, 2, 2)
POLICY = Policy(AUTO, SIZES, 1 << 28, Machine.of("cuda"))
FREE = dataclasses.replace(POLICY, machine=Machine(5e14, 1e20, 0.0), chunk_bytes=1 << 14)
"""Messages cost nothing, and chunks are small."""


def held(weights: list[Weight], ranks: int, seed: int, wide: str = "") -> list[Weight]:
    """The weights with holders."""
    choice = random.Random(seed)
    return [dataclasses.replace(w, peers=Peers("data", ranks, choice.randrange(ranks), wide)) for w in weights]


def plans_of(weights: list[Weight], ranks: int, policy: Policy) -> list[Plan]:
    """Of each data-parallel rank."""
    return [choose_plan(weights, policy, ITERATION, {"data": rank}) for rank in range(ranks)]


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("seed", range(8))
def test_each_matrix_is_with_one_rank_or_split(seed: int, ranks: int, tensor: int) -> None:
    weights = held(random_weights(seed, tensor), ranks, seed, "grid" if tensor > 1 else "")
    plans = plans_of(weights, ranks, FREE)
    for group in {name for plan in plans for name in plan.groups() if name in ("data", "grid")}:
        assert len({plan.digest(group) for plan in plans}) == 1
    found: Counter[tuple[int, int, int]] = Counter()
    for rank, plan in enumerate(plans):
        for chunk in plan.chunks:
            shared = chunk.mode in (LENT, SPLIT)
            for batch in chunk.batches:
                assert not shared or sum(batch.counts) == (batch.key.q if chunk.mode == SPLIT else batch.count)
                assert not shared or sum(batch.key.parts) in (batch.key.p, batch.key.q)
                for item in batch.items:
                    holder = weights[item.weight].peers
                    assert holder is not None and (shared or holder.holder == rank)
                    if not shared or holder.holder == rank:
                        found.update((item.weight, item.block, unit) for unit in range(item.start, item.stop))
    expected = Counter(
        (item.weight, item.block, unit) for _, item in items_of(weights, AUTO) for unit in range(item.start, item.stop)
    )
    assert found == expected


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("seed", range(8))
def test_ranks_do_what_was_foreseen(seed: int, ranks: int) -> None:
    """The account of each rank's plan is that by which matrices were lent; nobody has more than the busiest had."""
    weights = held(random_weights(seed, 1), ranks, seed)
    before, after = lend(tuple(weights), FREE, ITERATION).flops.get("data", ([0.0] * ranks, [0.0] * ranks))
    costs = [
        predict(plan, ITERATION, SIZES, {"data": rank}) for rank, plan in enumerate(plans_of(weights, ranks, FREE))
    ]
    assert [cost.flops for cost in costs] == pytest.approx(after, rel=0.1)  # columns and rows in whole numbers
    assert max(after) <= max(before)


def giant(rows: int = 8192, columns: int = 16384) -> Weight:
    return Weight((rows, columns), WHOLE, peers=Peers("data", 16, 3))


def test_a_giant_is_split() -> None:
    """One matrix, 16 ranks: without splitting one would do it all."""
    lending = lend((giant(),), POLICY, ITERATION)
    before, after = lending.flops["data"]
    assert sorted(before)[-2:] == [0.0, ITERATION.flops(8192, 16384)]
    assert max(after) < 0.1 * max(before) and min(after) > 0
    ((batch,),) = (chunk.batches for chunk in lending.chunks["data"])
    assert batch.key.mode == SPLIT and sum(batch.counts) == 16384 and batch.key.parts[3] == 16384


def test_items_of_a_fused_weight_and_experts_go_to_different_ranks() -> None:
    fused = MatrixLayout("glu", (Section("gate", 4096), Section("up", 4096)))
    peers = Peers("data", 4, 0)
    for weight, expected in (
        (Weight((8192, 4096), fused, peers=dataclasses.replace(peers, ranks=2)), [1, 1]),
        (Weight((4, 4096, 4096), WHOLE.stack(), peers=peers), [1, 1, 1, 1]),
    ):
        lending = lend((weight,), POLICY, ITERATION)
        one = ITERATION.flops(4096, 4096)
        assert lending.flops["data"][1] == [one * number for number in expected]


@pytest.mark.parametrize(
    "weights",
    [
        pytest.param([(1024, 4096, 0), (4096, 1024, 1)], id="even"),
        pytest.param([(8, 8, 0)] * 5, id="too small to send"),
        pytest.param([(4096, 4096, 0)] * 20 + [(4096, 4096, 1)] * 20 + [(1024, 4096, 0)], id="nearly even"),
    ],
)
def test_nothing_is_lent_without_gain(weights: list[tuple[int, int, int]]) -> None:
    given = tuple(Weight((m, n), WHOLE, peers=Peers("data", 2, holder)) for m, n, holder in weights)
    lending = lend(given, POLICY, ITERATION)
    assert lending.chunks == {"data": ()}
    for rank in (0, 1):
        mine = [weight for weight in given if weight.peers and weight.peers.holder == rank]
        plan = choose_plan(given, POLICY, ITERATION, {"data": rank})
        assert {chunk.mode for chunk in plan.chunks} <= {LOCAL}
        assert sum(batch.count for chunk in plan.chunks for batch in chunk.batches) == len(mine)


def test_what_is_sent_counts() -> None:
    """A slow network: what gains on a fast one is not lent."""
    given = tuple(Weight((1024, 4096), WHOLE, peers=Peers("data", 2, 0)) for _ in range(2))
    slow = dataclasses.replace(POLICY, machine=dataclasses.replace(POLICY.machine, bytes=1e9))
    assert lend(given, POLICY, ITERATION).chunks["data"] and not lend(given, slow, ITERATION).chunks["data"]


@pytest.mark.parametrize(("span", "is_split"), [(8, True), (9, False)])
def test_a_matrix_is_split_within_a_node_alone(span: int, is_split: bool) -> None:
    """Members of a split send Gram matrices in every step: between nodes that takes longer than it saves."""
    given = (Weight((7168, 16384), WHOLE, peers=Peers("data", 8, 0, span=span)),)
    assert {chunk.mode for chunk in lend(given, POLICY, ITERATION).chunks["data"]} == ({SPLIT} if is_split else set())
