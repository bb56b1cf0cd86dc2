"""Owners and chunks of plans: equal shares, and bounds that are kept."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from megatron_muon import Muon
from megatron_muon.engine.choose import choose_plan
from megatron_muon.engine.modes import DISTRIBUTED, DUPLICATED, GRAM, LOCAL, OWNER
from megatron_muon.engine.plan import Batch, Chunk, Weight
from megatron_muon.engine.planner import Policy
from megatron_muon.engine.step import MEBIBYTE
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer
from megatron_muon.routing.layout import WHOLE
from tests.random_weights import (
    CPU,
    EXACT,
    FLOAT32,
    PLENTY,
    RANKS,
    SEEDS,
    SIZES,
    batches_of,
    plan_of,
    random_plans,
    random_weights,
)

# Owners.


def loads_of(chunk: Chunk, iteration: Orthogonalizer) -> list[int]:
    """Operations of each owner of a chunk."""
    ranks = len(chunk.batches[0].key.parts)
    each = [(batch, iteration.of(batch.key.budget).flops(batch.key.m, batch.key.n)) for batch in chunk.batches]
    return [sum(batch.counts[rank] * flops for batch, flops in each) for rank in range(ranks)]


def costliest(chunk: Chunk, iteration: Orthogonalizer) -> int:
    return max(iteration.of(batch.key.budget).flops(batch.key.m, batch.key.n) for batch in chunk.batches)


@pytest.mark.parametrize("ranks", RANKS[1:])
@pytest.mark.parametrize("seed", SEEDS)
def test_owners_have_equal_shares(seed: int, ranks: int) -> None:
    """Each matrix has an owner, and in no chunk has one owner more to do than another by more than one matrix."""
    for plan, _ in random_plans(seed, ranks):
        for chunk, batch in batches_of(plan):
            if chunk.mode not in (OWNER, GRAM):
                assert batch.counts == ()
                continue
            assert len(batch.counts) == len(batch.key.parts)
            assert sum(batch.counts) == batch.count
            assert max(batch.counts) - min(batch.counts) <= 1 or chunk.mode == OWNER
        for chunk in plan.chunks:
            if chunk.mode in (OWNER, GRAM):
                loads = loads_of(chunk, FLOAT32)
                assert max(loads) - min(loads) <= costliest(chunk, FLOAT32)


def test_odd_matrices_of_several_chunks_go_to_different_owners() -> None:
    """Eleven matrices in chunks of one each: 3, 3, 3 and 2."""
    plan = plan_of([Weight((8, 6), WHOLE, -1, "tp", 4)] * 11, OWNER, 1)
    total = [sum(batch.counts[rank] for _, batch in batches_of(plan)) for rank in range(4)]
    assert sorted(total) == [2, 3, 3, 3]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("mode", [OWNER, GRAM])
def test_fewer_matrices_than_ranks(mode: str, count: int) -> None:
    plan = plan_of([Weight((8, 6), WHOLE, -1, "tp", 4)] * count, mode)
    (batch,) = (batch for _, batch in batches_of(plan))
    assert sorted(batch.counts) == [0] * (4 - count) + [1] * count


@pytest.mark.parametrize(("count", "expected"), [(5, [1, 1, 1, 2]), (8, [2] * 4), (11, [2, 3, 3, 3])])
def test_uneven_numbers(count: int, expected: list[int]) -> None:
    plan = plan_of([Weight((8, 6), WHOLE, -1, "tp", 4)] * count, OWNER)
    (batch,) = (batch for _, batch in batches_of(plan))
    assert sorted(batch.counts) == expected


# Chunks.


def size_of(batch: Batch) -> int:
    """Bytes of one whole float32 matrix."""
    return 4 * batch.key.p * batch.key.q


def rounding(batch: Batch) -> int:
    """By how many bytes a batch may exceed what was asked for: matrices that lie in one unit are not parted."""
    return size_of(batch) * (max(item.count // (item.stop - item.start) for item in batch.items) - 1)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("seed", SEEDS)
def test_chunks_keep_their_bound(seed: int, ranks: int) -> None:
    """The bound, or one matrix if it is larger; for chunks that owners share, times their number.

    An owner's own part is that, and less than one matrix more of each batch: odd matrices are dealt out by operations.
    """
    for plan, bound in random_plans(seed, ranks):
        for chunk in plan.chunks:
            sharers = len(chunk.batches[0].key.parts) if chunk.mode in (OWNER, GRAM, DISTRIBUTED) else 1
            room = max(bound, size_of(chunk.batches[0]))
            total = sum(size_of(batch) * batch.count for batch in chunk.batches)
            # Only the last batch can have been rounded up: nothing is put into a chunk that is over its bound.
            slack = rounding(chunk.batches[-1])
            assert total <= room * sharers + slack
            if chunk.mode in (OWNER, GRAM):
                for rank in range(sharers):
                    owned = sum(size_of(batch) * batch.counts[rank] for batch in chunk.batches)
                    assert owned < room + slack / sharers + sum(size_of(batch) for batch in chunk.batches)


@pytest.mark.parametrize("mode", EXACT)
def test_one_kind_keeps_the_bound_or_one_matrix(mode: str) -> None:
    """24 matrices of 8 x 24, 768 bytes each: an owner has as many as fit, and one more if the bound is between."""
    weights = [Weight((8, 6), WHOLE, -1, "tp", 4)] * 24
    sharers = 1 if mode == DUPLICATED else 4
    for bound in (1, 768, 1535, 1536, 3 * 768):
        most = max(bound, 768) / 768
        for chunk in plan_of(weights, mode, bound).chunks:
            assert sum(batch.count for batch in chunk.batches) <= most * sharers
            if mode in (OWNER, GRAM):
                owned = [sum(batch.counts[rank] for batch in chunk.batches) for rank in range(4)]
                assert max(owned) <= -(-most // 1)


def test_no_bound_makes_one_chunk_of_each_mode_and_group() -> None:
    for seed in SEEDS:
        plan = plan_of(random_weights(seed, 4))
        assert len(plan.chunks) == len({(chunk.mode, chunk.group) for chunk in plan.chunks})


def test_a_chunk_without_exchange_comes_first() -> None:
    """It is computed while the first exchange is under way."""
    weights = [*[Weight((8, 6), WHOLE, -1, "tp", 4)] * 4, *[Weight((8, 6), WHOLE)] * 4]
    modes = [chunk.mode for chunk in plan_of(weights, OWNER, 8 * 6 * 4).chunks]
    assert modes == [LOCAL, OWNER, LOCAL, LOCAL, LOCAL]


# Buckets.


def staged(weights: list[Weight], mode: str = "auto") -> tuple[list[list[int]], Counter[tuple[int, int, int]]]:
    """Buckets of each chunk, and how often each block of each weight is orthogonalized, by its shape."""
    plan = choose_plan(weights, Policy(mode, SIZES, PLENTY, CPU), FLOAT32)
    buckets = [
        sorted({weights[item.weight].bucket for batch in chunk.batches for item in batch.items})
        for chunk in plan.chunks
    ]
    found: Counter[tuple[int, int, int]] = Counter()
    for _, batch in batches_of(plan):
        for item in batch.items:
            found[item.weight, item.rows, item.columns] += item.count
    return buckets, found


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (1, [[0], [1], [2], [3], [4], [5], [6], [7]]),
        (4, [[0, 1], [2], [3, 4], [5], [6, 7]]),  # each exchange takes its time
    ],
)
def test_buckets_are_done_one_after_another(ranks: int, expected: list[list[int]]) -> None:
    """Eight of them, with four shapes each; the last weights come first, as DDP lays them out."""
    shapes = [(768, 256), (256, 256), (1024, 256), (256, 512)] * ranks
    cut = (-1, "tp", ranks) if ranks > 1 else (0, "", 1)
    weights = [Weight((m, n // ranks), WHOLE, *cut, bucket) for bucket in reversed(range(8)) for m, n in shapes]
    buckets, found = staged(weights)
    assert buckets == expected
    assert set(found.values()) == {1}
    assert len(found) == len(weights)


def test_buckets_stay_together_where_apart_they_would_be_slower() -> None:
    """Batches of tiny matrices; and a matrix a bucket for four owners, of whom three would have nothing to do."""
    buckets, _ = staged([Weight((8, 8), WHOLE, bucket=number) for number in range(8)])
    assert buckets == [list(range(8))]
    buckets, _ = staged([Weight((1024, 256), WHOLE, -1, "tp", 4, number) for number in range(8)], OWNER)
    assert buckets == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("width", "chunk_mb", "most"),
    [(64, 0.0, 0.75), (128, 0.0, 0.75), (256, 0.0, 3.0), (512, 0.0, 4.0), (128, 2.0, 2.0)],
)
def test_small_matrices_have_small_chunks_on_cpus(width: int, chunk_mb: float, most: float) -> None:
    """What optimizers of one matrix after another allocate, four times the largest, is not far exceeded."""
    weights = [torch.nn.Parameter(torch.zeros(rows, width)) for rows in [width, 4 * width] * 8]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer = Muon(weights, 0.02, chunk_mb=chunk_mb, ns_dtype="fp32")
    engine = optimizer.prepare()
    assert engine is not None
    sizes = [sum(4 * b.count * b.key.m * b.key.n for b in chunk.batches) / MEBIBYTE for chunk in engine.plan.chunks]
    assert most / 2 < max(sizes) <= most and sum(sizes) == 8 * 5 * width**2 * 4 / MEBIBYTE
