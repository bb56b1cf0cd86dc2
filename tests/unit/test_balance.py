"""Owners of whole weights, balanced by cost: worked examples, bounds, and what must not change."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_muon.config import MuonConfig
from megatron_muon.engine.balance import Job, assign_owners, cost_of_weight
from megatron_muon.engine.shards import Shard
from megatron_muon.optimizers.stiefel_solvers import SOLVERS
from megatron_muon.routing.layout import LAYOUT_ATTRIBUTE, SCALAR, STIEFEL, WHOLE, MatrixLayout, Section

PLENTY = 10**9


def jobs_of(costs: Sequence[int], size: int = 1) -> list[Job]:
    """Jobs of one bucket that rank 0 has so far."""
    return [Job(cost, size, 0, 0) for cost in costs]


def loads(jobs: Sequence[Job], owners: Sequence[int], ranks: int) -> list[int]:
    total = [0] * ranks
    for job, owner in zip(jobs, owners, strict=True):
        total[owner] += job.cost
    return total


def taken(jobs: Sequence[Job], owners: Sequence[int], ranks: int, buckets: int) -> list[list[int]]:
    """For each bucket and rank the size of the jobs there."""
    total = [[0] * ranks for _ in range(buckets)]
    for job, owner in zip(jobs, owners, strict=True):
        total[job.bucket][owner] += job.size
    return total


def test_costliest_first() -> None:
    """5 and 4 open the two ranks, 3 joins 4, and 3 joins 5."""
    assert assign_owners(jobs_of([3, 5, 3, 4]), 2, [PLENTY]) == [1, 0, 0, 1]


def test_an_exchange_where_costliest_first_is_not_the_best() -> None:
    """Graham's rule gives 3 + 2 + 2 = 7 and 3 + 2 = 5, whatever the order; 3 + 3 = 6 and 2 + 2 + 2 = 6 is found."""
    jobs = jobs_of([3, 3, 2, 2, 2])
    assert sorted(loads(jobs, assign_owners(jobs, 2, [PLENTY]), 2)) == [6, 6]


def test_the_load_of_other_buckets_counts() -> None:
    """Two buckets with one large job each, as two chunks of a pipeline stage: different ranks get them."""
    jobs = [Job(9, 1, 0, 0), Job(1, 1, 0, 1), Job(9, 1, 1, 0), Job(1, 1, 1, 1)]
    assert assign_owners(jobs, 2, [1, 1]) == [0, 1, 1, 0]


def test_small_jobs_make_way_for_large_ones_of_later_buckets() -> None:
    """Bucket after bucket, the small jobs of the first would take all ranks; together, two ranks stay free."""
    jobs = [*(Job(1, 1, 0, rank) for rank in range(4)), Job(9, 4, 1, 0), Job(9, 4, 1, 1)]
    owners = assign_owners(jobs, 4, [4, 4])
    assert sorted(loads(jobs, owners, 4)) == [2, 2, 9, 9]


def test_room_is_kept_where_balance_would_need_more() -> None:
    """9 | 3 + 3 + 3 needs 6 in one shard. There is room for 4."""
    jobs = [Job(9, 1, 0, 0), Job(3, 2, 0, 0), Job(3, 2, 0, 1), Job(3, 2, 0, 1)]
    assert sorted(loads(jobs, assign_owners(jobs, 2, [6]), 2)) == [9, 9]
    owners = assign_owners(jobs, 2, [4])
    assert sorted(taken(jobs, owners, 2, 1)[0]) == [3, 4]
    assert sorted(loads(jobs, owners, 2)) == [6, 12]


STUCK = [Job(1, 3, 0, 0), Job(1, 3, 0, 0), *(Job(5, 2, 0, 1) for _ in range(3))]
"""Sizes 3 3 | 2 2 2 fill both ranks; by cost 2 and 2 come first, on different ranks, and a 3 finds no room."""


def test_a_bucket_without_room_keeps_its_owners() -> None:
    assert assign_owners(STUCK, 2, [6]) == [0, 0, 1, 1, 1]


def test_the_other_buckets_make_up_for_it() -> None:
    """13 more for rank 0, which has 2 of the full bucket, against 15."""
    jobs = [*STUCK, *(Job(cost, 1, 1, 1) for cost in (1, 2, 4, 7, 6))]
    owners = assign_owners(jobs, 2, [6, 5])
    assert owners[:5] == [0, 0, 1, 1, 1]
    assert sorted(loads(jobs, owners, 2)) == [18, 19]


def test_fixed_jobs_stay_and_count() -> None:
    jobs = [Job(5, 1, 0, 1, movable=False), Job(4, 1, 0, 1), Job(2, 1, 0, 1), Job(1, 1, 0, 0, movable=False)]
    assert assign_owners(jobs, 2, [PLENTY]) == [1, 0, 1, 0]


def test_jobs_without_cost_go_where_there_is_room() -> None:
    jobs = [Job(5, 4, 0, 0), *(Job(0, 2, 0, 1) for _ in range(2))]
    assert assign_owners(jobs, 2, [4]) == [0, 1, 1]


def test_more_ranks_than_jobs() -> None:
    owners = assign_owners(jobs_of([7, 7, 7]), 5, [PLENTY])
    assert owners == [0, 1, 2]


def test_one_rank() -> None:
    assert assign_owners(jobs_of([3, 1, 2]), 1, [PLENTY]) == [0, 0, 0]


@pytest.mark.parametrize("ranks", [1, 4])
def test_nothing_to_do(ranks: int) -> None:
    assert assign_owners([], ranks, []) == []


@pytest.mark.parametrize("job", [Job(1, 1, 0, 2), Job(1, 1, 0, -1), Job(1, 9, 0, 0)])
def test_owners_that_cannot_be(job: Job) -> None:
    with pytest.raises(ValueError, match=f"no room at rank {job.owner} of 2 in bucket 0"):
        assign_owners([job], 2, [8])


def random_jobs(generator: random.Random, number: int, ranks: int, buckets: int) -> tuple[list[Job], list[int]]:
    """Jobs with owners by size, and the room that these need."""
    sizes = [generator.choice([1, 2, 3, 8]) for _ in range(number)]
    places = [generator.randrange(buckets) for _ in range(number)]
    filled = [[0] * ranks for _ in range(buckets)]
    jobs = []
    for size, bucket in zip(sizes, places, strict=True):
        owner = filled[bucket].index(min(filled[bucket]))
        filled[bucket][owner] += size
        jobs.append(Job(generator.choice([1, 5, 7, 20, 33]) * size, size, bucket, owner))
    return jobs, [max(its) for its in filled]


@pytest.mark.parametrize("seed", range(40))
def test_never_worse_than_the_given_owners_and_never_longer(seed: int) -> None:
    generator = random.Random(seed)
    ranks, buckets = generator.randrange(1, 9), generator.randrange(1, 5)
    jobs, room = random_jobs(generator, generator.randrange(1, 60), ranks, buckets)
    owners = assign_owners(jobs, ranks, room)
    assert all(max(its) <= most for its, most in zip(taken(jobs, owners, ranks, buckets), room, strict=True))
    given = [job.owner for job in jobs]
    assert max(loads(jobs, owners, ranks)) <= max(loads(jobs, given, ranks))


@pytest.mark.parametrize("seed", range(30))
def test_graham_bound(seed: int) -> None:
    """With room everywhere at most 4/3 - 1 / (3 ranks) of the best of all assignments, found by trying them all."""
    generator = random.Random(seed)
    ranks = generator.randrange(2, 4)
    jobs = jobs_of([generator.randrange(1, 40) for _ in range(7)])
    best = min(max(loads(jobs, owners, ranks)) for owners in itertools.product(range(ranks), repeat=7))
    found = max(loads(jobs, assign_owners(jobs, ranks, [PLENTY]), ranks))
    assert best <= found
    assert 3 * ranks * found <= (4 * ranks - 1) * best


def test_the_same_input_gives_the_same_owners() -> None:
    jobs, room = random_jobs(random.Random(0), 200, 8, 5)
    owners = assign_owners(jobs, 8, room)
    assert all(assign_owners(list(jobs), 8, list(room)) == owners for _ in range(3))


def test_equal_jobs_may_stand_in_any_order() -> None:
    """Ranks that list equal weights in another order give every rank the same amount of work."""
    jobs, room = random_jobs(random.Random(1), 60, 4, 1)
    turned = jobs[::-1]
    one, other = assign_owners(jobs, 4, room), assign_owners(turned, 4, room)
    assert max(loads(jobs, one, 4)) == max(loads(turned, other, 4))


def weight(shape: tuple[int, ...], layout: MatrixLayout | None = None, **attributes: Any) -> torch.nn.Parameter:
    param = torch.nn.Parameter(torch.empty(shape, device="meta"))
    if layout is not None:
        attributes[LAYOUT_ATTRIBUTE] = layout
    for name, value in attributes.items():
        setattr(param, name, value)
    return param


def divided(dim: int, ranks: int) -> Shard:
    return Shard(dim, SimpleNamespace(size=lambda: ranks))  # type: ignore[arg-type]


def step_cost(p: int, q: int) -> int:
    return 4 * p * p * q + 2 * p**3


QKV = MatrixLayout("qkv", (Section("q", 8), Section("k", 2), Section("v", 2)))


@pytest.mark.parametrize(
    ("param", "shard", "expected"),
    [
        (weight((6, 4)), None, 4 * 16 * 6 + 2 * 64),
        (weight((4, 6)), None, 4 * 16 * 6 + 2 * 64),
        (weight((24, 16), QKV), None, step_cost(16, 16) + 2 * step_cost(4, 16)),
        (weight((12, 16), QKV), divided(-2, 2), (step_cost(16, 16) + 2 * step_cost(4, 16)) // 2),
        (weight((6, 16), QKV), divided(-2, 2), (step_cost(8, 16) + 2 * step_cost(2, 16)) // 2),
        (weight((4, 8)), divided(-1, 4), step_cost(4, 32) // 4),
        (weight((3, 8, 4), MatrixLayout("whole", stacked=True)), None, 3 * step_cost(4, 8)),
        (
            weight((12, 8), MatrixLayout("heads", (Section("h", 12, matrix_rows=4),))),
            None,
            3 * step_cost(4, 8),
        ),
        (
            weight((10, 8), MatrixLayout("in_proj", (Section("x", 6), Section("gate", 4, rule=SCALAR)))),
            None,
            step_cost(6, 8),
        ),
        (weight((6,)), None, 0),
        (weight((6, 4), skip_orthogonalization=True), None, 0),
        (weight((6, 4), is_embedding_or_output_parameter=True), None, 0),
    ],
    ids=[
        "tall",
        "wide",
        "qkv",
        "qkv/2",
        "half a group",
        "columns/4",
        "experts",
        "heads",
        "gates",
        "1-D",
        "tag",
        "table",
    ],
)
@pytest.mark.parametrize("steps", [1, 5])
def test_cost_is_that_of_the_logical_matrices(
    param: torch.nn.Parameter, shard: Shard | None, expected: int, steps: int
) -> None:
    assert cost_of_weight(param, shard, MuonConfig(num_ns_steps=steps).iteration) == steps * expected


def test_steps_without_a_square_cost_less() -> None:
    options = MuonConfig(coefficient_type="cubic5")
    assert cost_of_weight(weight((12, 8), WHOLE), None, options.iteration) == 5 * 4 * 8 * 8 * 12


def test_weights_on_the_stiefel_manifold_cost_what_their_solver_takes() -> None:
    param = weight((12, 8), dataclasses.replace(WHOLE, direction=STIEFEL))
    solver, cost = SOLVERS["admm"], cost_of_weight(param, None, MuonConfig().iteration, SOLVERS["admm"].flops)
    assert cost == solver.flops(8, 12) > 100 * step_cost(8, 12)
