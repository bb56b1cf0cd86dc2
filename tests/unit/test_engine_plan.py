"""Plans, as functions of shapes: each matrix once, where it lies, and the same on every rank."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from megatron_muon.engine.modes import DISTRIBUTED, DUPLICATED, GRAM, LOCAL, OWNER
from megatron_muon.engine.plan import MatrixSlice, Weight
from megatron_muon.errors import ConfigError
from megatron_muon.routing.layout import SCALAR, WHOLE, MatrixLayout, Section
from tests.random_weights import (
    EXACT,
    PLENTY,
    RANKS,
    SEEDS,
    batches_of,
    modes_for,
    per_rank,
    plan_of,
    random_plans,
    random_weights,
)
from tools.splitting import pairs, split


def test_random_weights_are_of_all_kinds() -> None:
    """What the tests below rest on."""
    weights = [weight for ranks in RANKS[1:] for seed in SEEDS for weight in random_weights(seed, ranks)]
    heads = [any(section.matrix_rows for section in weight.layout.sections) for weight in weights]
    scalar = [weight.layout.has_scalar_rows for weight in weights]
    traits = Counter(
        (weight.dim, weight.layout.stacked, weight.is_broken, has_heads, has_scalar)
        for weight, has_heads, has_scalar in zip(weights, heads, scalar, strict=True)
    )
    for trait in [
        (0, False, False, True, True),
        (-1, False, False, True, False),
        (-2, False, True, True, False),
        (-2, False, True, False, False),
        (-2, True, True, False, False),
        (-2, True, False, True, False),
        (-2, False, True, False, True),
    ]:
        assert traits[trait] > 0, trait
    assert any(
        any(number > 1 for number in Counter(section.name for section in weight.layout.sections).values())
        for weight in weights
    )


# Each matrix once, and where it lies.


def first_matrix(item: MatrixSlice, weight: Weight, local: bool) -> int:
    """Number of an item's first matrix among those of its block."""
    units = item.stop - item.start
    assert units > 0 and item.count % units == 0
    assert item.start == 0 or not local or weight.layout.sections or weight.layout.stacked
    return item.start * (item.count // units)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("seed", SEEDS)
def test_each_matrix_is_in_one_item_of_one_chunk(seed: int, ranks: int) -> None:
    for plan, _ in random_plans(seed, ranks):
        found: Counter[tuple[int, int, int]] = Counter()
        expected: set[tuple[int, int, int]] = set()
        local = {item.weight: per_rank(plan.weights[item.weight], chunk)
                 for chunk, batch in batches_of(plan) for item in batch.items}  # fmt: skip
        per_block: dict[tuple[int, int], bool] = {}
        for chunk, batch in batches_of(plan):
            for item in batch.items:
                weight = plan.weights[item.weight]
                mine = per_block.setdefault((item.weight, item.block), per_rank(weight, chunk))
                assert mine == per_rank(weight, chunk), "some matrices of a block are local, others are not"
                first = first_matrix(item, weight, mine)
                found.update((item.weight, item.block, first + number) for number in range(item.count))
        for index, weight in enumerate(plan.weights):
            whole, shard = (weight.layout.blocks(shape) if not weight.is_broken or shape != weight.shape else []
                            for shape in (weight.whole_shape, weight.shape))  # fmt: skip
            for number, block in enumerate(whole):
                if block.rule != SCALAR:
                    mine = per_block[index, number]
                    count = (shard[number] if mine else block).count
                    expected |= {(index, number, matrix) for matrix in range(count)}
        assert set(found) == expected
        assert all(number == 1 for number in found.values())
        assert set(local) == {index for index, _, _ in expected}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("seed", SEEDS)
def test_shapes_and_parts_are_those_of_the_layout(seed: int, ranks: int) -> None:
    for plan, _ in random_plans(seed, ranks):
        for chunk, batch in batches_of(plan):
            key = batch.key
            assert (key.mode, key.group) == (chunk.mode, chunk.group)
            assert key.p <= key.q or key.mode == DISTRIBUTED
            assert key.mode not in (GRAM, DISTRIBUTED) or key.summed_dim == key.dim
            assert (key.group == "") == (chunk.mode == LOCAL)
            if key.dim:
                assert sum(key.parts) == (key.m if key.dim == -2 else key.n)
            for item in batch.items:
                weight = plan.weights[item.weight]
                shape = weight.shape if per_rank(weight, chunk) else weight.whole_shape
                block = weight.layout.blocks(shape)[item.block]
                assert (item.rows, item.columns) == (block.rows, block.columns)
                assert (key.m, key.n) == (item.rows, item.columns)
                assert key.dim in (0, weight.dim)


def numbered(weight: Weight, index: int) -> torch.Tensor:
    """The whole weight, each entry another number."""
    return torch.arange(torch.Size(weight.whole_shape).numel(), dtype=torch.float64).view(weight.whole_shape) + index


def shards_of(weight: Weight, whole: torch.Tensor) -> list[torch.Tensor]:
    return list(whole.chunk(weight.ranks, dim=weight.dim)) if weight.dim else [whole]


def matrices_of(weight: Weight, block: int, tensor: torch.Tensor) -> torch.Tensor:
    """(matrices, rows, columns) by the layout's own split."""
    part = split(weight.layout, tensor)[block]
    return part.reshape(-1, *part.shape[-2:])


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("seed", SEEDS)
def test_pieces_of_all_ranks_are_the_logical_matrices_and_go_back(seed: int, ranks: int) -> None:
    """Out of the shards into batches, the batches against ``MatrixLayout.split`` of the whole weight, and back."""
    for plan, bound in random_plans(seed, ranks):
        if bound not in (900, PLENTY):
            continue  # pieces of one matrix each take long
        wholes = [numbered(weight, index) for index, weight in enumerate(plan.weights)]
        shards = [shards_of(weight, whole) for weight, whole in zip(plan.weights, wholes, strict=True)]
        returned = [[torch.full_like(shard, -1) for shard in each] for each in shards]
        for chunk, batch in batches_of(plan):
            for item in batch.items:
                weight = plan.weights[item.weight]
                slots = []
                for rank in range(weight.ranks):
                    slot = torch.full((item.count, *batch.key.part(rank)), -2.0, dtype=torch.float64)
                    slots.append(slot)
                    piece = item.block_range(weight, rank)
                    for source, target in pairs(piece, shards[item.weight][rank], slot):
                        target.copy_(source)
                    for target, source in pairs(piece, returned[item.weight][rank], slot):
                        target.copy_(source)
                first = first_matrix(item, weight, per_rank(weight, chunk))
                if per_rank(weight, chunk):
                    expected = [matrices_of(weight, item.block, shard) for shard in shards[item.weight]]
                    found = slots
                elif weight.dim:
                    expected = [matrices_of(weight, item.block, wholes[item.weight])]
                    found = [torch.cat(slots, dim=batch.key.dim)]
                else:
                    expected, found = [matrices_of(weight, item.block, wholes[item.weight])], slots
                for its, matrices in zip(found, expected, strict=True):
                    assert torch.equal(its, matrices[first : first + item.count])
        for weight, whole, parts in zip(plan.weights, wholes, returned, strict=True):
            back = torch.cat(parts, dim=weight.dim) if weight.dim else parts[0]
            for view in weight.layout.rows_by_rule(back, SCALAR):
                assert (view == -1).all(), "rows of the scalar optimizer were written"
                view.copy_(torch.full_like(view, -3))
            expected_back = whole.clone()
            for view in weight.layout.rows_by_rule(expected_back, SCALAR):
                view.fill_(-3)
            assert torch.equal(back, expected_back)


# The same everywhere.


def digests(seeds: range = range(6), ranks: int = 4) -> str:
    plans = [plan_of(random_weights(seed, ranks), bound_mode, 2000) for seed in seeds for bound_mode in ("auto", OWNER)]
    return " ".join(plan.digest(group).hex() for plan in plans for group in plan.groups())


def test_plans_are_the_same_each_time() -> None:
    for seed in SEEDS:
        weights = random_weights(seed, 4)
        for mode in modes_for(weights):
            one, other = plan_of(weights, mode, 2000), plan_of([dataclasses.replace(w) for w in weights], mode, 2000)
            assert one == other
            assert [one.digest(name) for name in one.groups()] == [other.digest(name) for name in other.groups()]


def test_digests_are_the_same_in_another_process() -> None:
    """With other hashes of strings: no order of a set or of hashes may show."""
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    command = "from tests.unit.test_engine_plan import digests; print(digests())"
    root = str(Path(__file__).parents[2])
    found = subprocess.run(
        [sys.executable, "-c", command], cwd=root, env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": root},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == digests()


def test_a_digest_is_about_one_group() -> None:
    dense, expert = Weight((8, 6), WHOLE, -1, "tp", 4), Weight((4, 6), WHOLE, -2, "expert tp", 2)
    one = plan_of([dense, expert, Weight((5, 5), WHOLE)])
    other = plan_of([dense, dataclasses.replace(expert, shape=(4, 8)), Weight((7, 5), WHOLE)])
    assert one.groups() == other.groups() and set(one.groups()) == {"tp", "expert tp"}
    assert one.digest("tp") == other.digest("tp")
    assert one.digest("expert tp") != other.digest("expert tp")


@pytest.mark.parametrize(
    "other",
    [
        {"weights": [Weight((8, 6), WHOLE, -1, "tp", 4)] * 4},
        {"weights": [Weight((8, 7), WHOLE, -1, "tp", 4)] * 5},
        {"weights": [Weight((8, 6), WHOLE, -1, "tp", 4)] * 4 + [Weight((2, 24), WHOLE, -2, "tp", 4)]},
        {"mode": DUPLICATED},
        {"chunk_bytes": 1},
    ],
)
def test_digests_tell_plans_apart(other: dict[str, object]) -> None:
    given = {"weights": [Weight((8, 6), WHOLE, -1, "tp", 4)] * 5, "mode": OWNER}
    one, two = plan_of(**given), plan_of(**{**given, **other})  # type: ignore[arg-type]
    assert one.digest("tp") != two.digest("tp")
    assert one.digest("tp", "fp32") != one.digest("tp", "bf16")
    assert len(one.digest("tp")) == 32


def test_digests_tell_owners_apart() -> None:
    plan = plan_of([Weight((8, 6), WHOLE, -1, "tp", 4)] * 5, OWNER)
    ((chunk, batch),) = batches_of(plan)
    others = dataclasses.replace(batch, counts=batch.counts[::-1])
    other = dataclasses.replace(plan, chunks=(dataclasses.replace(chunk, batches=(others,)),))
    assert others.counts != batch.counts and other.digest("tp") != plan.digest("tp")


# What is planned otherwise.


@pytest.mark.parametrize("mode", EXACT)
def test_whole_heads_are_local_in_every_mode(mode: str) -> None:
    heads = MatrixLayout("qkv", (Section("q", 8, matrix_rows=4), Section("k", 4, matrix_rows=4)))
    plan = plan_of([Weight((24, 8), heads, -2, "tp", 4)], mode)
    assert {chunk.mode for chunk in plan.chunks} == {LOCAL}
    assert sum(batch.count for _, batch in batches_of(plan)) == 6


def test_blockwise_takes_each_shard_as_a_matrix() -> None:
    plan = plan_of([Weight((8, 8), WHOLE, -1, "tp", 4)] * 3, "blockwise")
    ((chunk, batch),) = batches_of(plan)
    assert (chunk.mode, batch.key.m, batch.key.n, batch.count) == (LOCAL, 8, 8, 3)


@pytest.mark.parametrize(
    ("mode", "layout", "shape"),
    [
        ("blockwise", MatrixLayout("qkv", (Section("q", 4), Section("k", 4))), (6, 8)),
        ("auto", MatrixLayout("qkv", (Section("q", 4, matrix_rows=2), Section("k", 4)), stacked=True), (2, 6, 8)),
    ],
)
def test_shards_that_cannot_be_treated_are_refused(mode: str, layout: MatrixLayout, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=rf"--muon-tp-mode {mode}: .* 6 rows on each of 4 .*--muon-param-rule"):
        plan_of([Weight(shape, layout, -2, "tp", 4)], mode)


@pytest.mark.parametrize("number", [1, 3, 100])
@pytest.mark.parametrize("seed", SEEDS)
def test_sub_plans_are_all_chunks_group_by_group(seed: int, number: int) -> None:
    """A rank with more chunks of its own has the same sub_plans of a group that it shares."""
    weights = random_weights(seed, 2)
    plan = plan_of(weights, chunk_bytes=1 << 12)
    sub_plans = list(plan.sub_plans(number))
    assert all(1 <= len(sub_plan.chunks) <= number for sub_plan in sub_plans)
    assert all(len({chunk.group for chunk in sub_plan.chunks}) == 1 for sub_plan in sub_plans)
    groups = [sub_plan.chunks[0].group for sub_plan in sub_plans]
    assert groups == sorted(groups)
    for group in {*plan.groups(), ""}:
        found = [chunk for sub_plan in sub_plans for chunk in sub_plan.chunks if chunk.group == group]
        assert found == [chunk for chunk in plan.chunks if chunk.group == group]
    more = plan_of([*weights, *(Weight((8, 8), WHOLE) for _ in range(40))], chunk_bytes=1 << 12)
    for group in plan.groups():
        mine, theirs = (
            [
                [batch.key for chunk in sub_plan.chunks for batch in chunk.batches]
                for sub_plan in each.sub_plans(number)
                if sub_plan.chunks[0].group == group
            ]
            for each in (plan, more)
        )
        assert mine == theirs


def test_nothing_to_plan() -> None:
    scalar = MatrixLayout("gates", (Section("gate", 4, SCALAR),))
    assert plan_of([]).chunks == ()
    plan = plan_of([Weight((8, 6), scalar)])
    assert plan.chunks == () and plan.groups() == []
