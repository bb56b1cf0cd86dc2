"""Plans, as functions of shapes: what must hold for any weights, checked on random ones, without any communication."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_muon.engine.modes import (
    DISTRIBUTED,
    DUPLICATED,
    GRAM,
    LOCAL,
    MODES,
    OWNER,
    Cost,
    Divided,
    Machine,
    Sizes,
    cost_of,
)
from megatron_muon.engine.plan import Batch, Chunk, Item, Plan, Policy, Weight, make_plan
from megatron_muon.errors import ConfigError
from megatron_muon.orthogonalize.coefficients import coefficients
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer
from megatron_muon.orthogonalize.products import BlockProducts
from megatron_muon.routing.layout import SCALAR, WHOLE, MatrixLayout, Section

FLOAT32 = Orthogonalizer(coefficients("quintic", 5), torch.float32, products=BlockProducts(8))
BFLOAT16 = Orthogonalizer(coefficients("quintic", 5), torch.bfloat16)
SIZES = Sizes(4, 4, 4)
CPU = Machine.of("cpu")
EXACT = (OWNER, GRAM, DUPLICATED, DISTRIBUTED)
PLENTY = 1 << 28
RANKS = (1, 2, 4, 8)
SEEDS = range(8)


def plan_of(
    weights: list[Weight],
    mode: str = "auto",
    chunk_bytes: int = PLENTY,
    iteration: Orthogonalizer = FLOAT32,
    machine: Machine = CPU,
) -> Plan:
    return make_plan(weights, Policy(mode, SIZES, chunk_bytes, machine), iteration)


# Random weights.


def random_layout(pick: random.Random) -> MatrixLayout:
    """No sections, or some, of names that may come twice, with heads or not, with rows of the scalar rule or not."""
    if pick.random() < 0.3:
        return WHOLE
    head = pick.choice([0, 2, 2, 3])
    treatment = {
        "a": ("orthogonalize", head),
        "b": ("orthogonalize", pick.choice([0, head])),
        "c": ("orthogonalize", head),
        "gate": (SCALAR, 0),
    }
    sections = []
    for _ in range(pick.randrange(1, 5)):
        name = pick.choice(list(treatment))
        rule, m = treatment[name]
        sections.append(Section(name, pick.randrange(1, 4) * (m or 1), rule, m))
    return MatrixLayout("random", tuple(sections))


def random_weight(pick: random.Random, ranks: int) -> Weight:
    """Whole, or cut by rows or columns, by whole periods or through them; some are stacks of experts."""
    layout, periods, columns = random_layout(pick), pick.randrange(1, 5), pick.randrange(1, 12)
    heads = any(section.matrix_rows for section in layout.sections)
    stack = pick.choice([(), (), (), (1,), (3,)])
    layout = layout.stack() if stack else layout
    rows, dim = layout.period * periods, pick.choice([0, -1, -2, -2]) if ranks > 1 else 0
    if dim == -2 and not (heads and stack) and pick.random() < 0.8:
        # Whole periods over all ranks, and in most cases not on each.
        fitting = [part for part in range(1, 3 * layout.period) if part * ranks % layout.period == 0]
        rows = pick.choice([part for part in fitting if part % layout.period] or fitting)
    group = pick.choice(["tp", "expert tp"]) if dim else ""
    return Weight((*stack, rows, columns), layout, dim, group, ranks if dim else 1)


def random_weights(seed: int, ranks: int) -> list[Weight]:
    """Some of them several times, as the layers of a model."""
    pick = random.Random(seed * 31 + ranks)
    different = [random_weight(pick, ranks) for _ in range(pick.randrange(1, 7))]
    return [weight for weight in different for _ in range(pick.choice([1, 1, 2, 5]))]


def modes_for(weights: list[Weight]) -> list[str]:
    """All; without ``blockwise``, which refuses them, for shards that cut periods."""
    return [mode for mode in MODES if mode != "blockwise" or not any(weight.is_broken for weight in weights)]


def random_plans(seed: int, ranks: int) -> Iterator[tuple[Plan, int]]:
    """In each mode with several bounds of chunks."""
    weights = random_weights(seed, ranks)
    for mode in modes_for(weights):
        for bound in (1, 900, PLENTY):
            yield plan_of(weights, mode, bound), bound


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


def batches_of(plan: Plan) -> Iterator[tuple[Chunk, Batch]]:
    for chunk in plan.chunks:
        for batch in chunk.batches:
            yield chunk, batch


def per_rank(weight: Weight, chunk: Chunk) -> bool:
    """Whether an item is about the matrices of one rank's shard, and not about those of the whole weight."""
    return chunk.mode == LOCAL and weight.dim != 0


def first_matrix(item: Item, weight: Weight, local: bool) -> int:
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
            kind = batch.kind
            assert (kind.mode, kind.group) == (chunk.mode, chunk.group)
            assert kind.p <= kind.q or kind.mode == DISTRIBUTED
            assert (kind.group == "") == (chunk.mode == LOCAL)
            if kind.dim:
                assert sum(kind.parts) == (kind.p if kind.dim == -2 else kind.q)
            for item in batch.items:
                weight = plan.weights[item.weight]
                shape = weight.shape if per_rank(weight, chunk) else weight.whole_shape
                block = weight.layout.blocks(shape)[item.block]
                assert (item.rows, item.columns) == (block.rows, block.columns)
                assert (kind.p, kind.q) == ((item.columns, item.rows) if item.transposed else (item.rows, item.columns))


def numbered(weight: Weight, index: int) -> torch.Tensor:
    """The whole weight, each entry another number."""
    return torch.arange(torch.Size(weight.whole_shape).numel(), dtype=torch.float64).view(weight.whole_shape) + index


def shards_of(weight: Weight, whole: torch.Tensor) -> list[torch.Tensor]:
    return list(whole.chunk(weight.ranks, dim=weight.dim)) if weight.dim else [whole]


def matrices_of(weight: Weight, block: int, tensor: torch.Tensor) -> torch.Tensor:
    """(matrices, rows, columns) by the layout's own split."""
    part = weight.layout.split(tensor)[block]
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
                    slot = torch.full((item.count, *batch.kind.part(rank)), -2.0, dtype=torch.float64)
                    slots.append(slot)
                    view = slot.mT if item.transposed else slot
                    piece = item.piece(weight, rank)
                    for source, target in piece.pairs(shards[item.weight][rank], view):
                        target.copy_(source)
                    for target, source in piece.pairs(returned[item.weight][rank], view):
                        target.copy_(source)
                first = first_matrix(item, weight, per_rank(weight, chunk))
                if per_rank(weight, chunk):
                    expected = [matrices_of(weight, item.block, shard) for shard in shards[item.weight]]
                    found = slots
                elif weight.dim:
                    expected = [matrices_of(weight, item.block, wholes[item.weight])]
                    found = [torch.cat(slots, dim=batch.kind.dim)]
                else:
                    expected, found = [matrices_of(weight, item.block, wholes[item.weight])], slots
                for its, matrices in zip(found, expected, strict=True):
                    its = its.mT if item.transposed else its
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


# Owners.


def loads_of(chunk: Chunk, iteration: Orthogonalizer) -> list[int]:
    """Operations of each owner of a chunk."""
    ranks = len(chunk.batches[0].kind.parts)
    each = [(batch, iteration.flops(*sorted((batch.kind.p, batch.kind.q)))) for batch in chunk.batches]
    return [sum(batch.counts[rank] * flops for batch, flops in each) for rank in range(ranks)]


def costliest(chunk: Chunk, iteration: Orthogonalizer) -> int:
    return max(iteration.flops(*sorted((batch.kind.p, batch.kind.q))) for batch in chunk.batches)


@pytest.mark.parametrize("ranks", RANKS[1:])
@pytest.mark.parametrize("seed", SEEDS)
def test_owners_have_equal_shares(seed: int, ranks: int) -> None:
    """Each matrix has an owner, and in no chunk has one owner more to do than another by more than one matrix."""
    for plan, _ in random_plans(seed, ranks):
        for chunk, batch in batches_of(plan):
            if chunk.mode not in (OWNER, GRAM):
                assert batch.counts == ()
                continue
            assert len(batch.counts) == len(batch.kind.parts)
            assert sum(batch.counts) == batch.count
            assert max(batch.counts) - min(batch.counts) <= 1
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
    return 4 * batch.kind.p * batch.kind.q


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
            sharers = len(chunk.batches[0].kind.parts) if chunk.mode in (OWNER, GRAM, DISTRIBUTED) else 1
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


# Modes.


def divided(count: int, p: int, q: int, dim: int, ranks: int) -> list[Weight]:
    shape = (p, q // ranks) if dim == -1 else (p // ranks, q)
    return [Weight(shape, WHOLE, dim, "tp", ranks)] * count


def seconds_of(count: int, p: int, q: int, dim: int, ranks: int, iteration: Orthogonalizer, machine: Machine) -> dict:
    """Of each exact mode that can be. Taller ones take part as their transposes."""
    if p > q:
        p, q, dim = q, p, -3 - dim
    by_columns = dim == -1 or p == q
    modes = [mode for mode in EXACT if mode != GRAM or (by_columns and iteration.restarts is not None)]
    matrices = Divided(count, p, q, by_columns, ranks)
    return {mode: cost_of(mode, matrices, iteration, SIZES).seconds(machine) for mode in modes}


@pytest.mark.parametrize("iteration", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", RANKS[1:])
def test_auto_takes_what_costs_least(ranks: int, iteration: Orthogonalizer) -> None:
    """For numbers that can be shared evenly, and for fewer than there are ranks; all machines and shapes."""
    taken = set()
    machines = [CPU, Machine.of("cuda"), Machine(1e9, 1e12, 1e-9), Machine(1e15, 1e6, 0.0), Machine(1e15, 1e15, 1.0)]
    for machine in machines:
        for p, q in [(16, 16), (16, 64), (64, 16), (512, 512), (128, 2048), (2048, 128), (2048, 2048)]:
            for dim in (-1, -2):
                for count in (1, ranks - 1, ranks, 6 * ranks):
                    plan = plan_of(divided(count, p, q, dim, ranks), "auto", 1 << 40, iteration, machine)
                    expected = seconds_of(count, p, q, dim, ranks, iteration, machine)
                    (mode,) = {chunk.mode for chunk in plan.chunks}
                    assert expected[mode] == min(expected.values())
                    taken.add(mode)
    assert taken == (set(EXACT) if iteration is FLOAT32 else {OWNER, DUPLICATED, DISTRIBUTED})


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_what_is_left_over_after_even_shares_may_have_another_mode(ranks: int) -> None:
    """As many as can be shared evenly by their cheapest mode, the rest by theirs; all together if these agree."""
    numbers = set()
    for p, q in [(16, 64), (128, 512), (512, 512), (1024, 4096)]:
        for count in range(ranks + 1, 3 * ranks):
            plan = plan_of(divided(count, p, q, -1, ranks), "auto", 1 << 40)
            by_mode = Counter({chunk.mode: sum(batch.count for batch in chunk.batches) for chunk in plan.chunks})
            even = count - count % ranks
            cheapest = {}
            for number in (even, count - even, count):
                if number:
                    costs = seconds_of(number, p, q, -1, ranks, FLOAT32, CPU)
                    cheapest[number] = min(costs, key=lambda mode: costs[mode])
            if count == even or cheapest[even] == cheapest[count - even]:
                assert by_mode == {cheapest[count]: count}
            else:
                assert by_mode == {cheapest[even]: even, cheapest[count - even]: count - even}
            numbers.add(len(by_mode))
    assert numbers == {1, 2}


def test_costs_of_a_worked_example() -> None:
    """Eight 4 x 16 matrices, cut by columns over four ranks, 4 bytes an element."""
    iteration = Orthogonalizer(coefficients("quintic", 5), torch.float32)
    args = (Divided(8, 4, 16, True, 4), iteration, SIZES)
    # 128 elements of 8 shards there, 3/4 of them to others; 3/4 of two whole matrices back.
    assert cost_of(OWNER, *args) == Cost(2 * iteration.flops(4, 16), (128 * 3 / 4 + 2 * 64 * 3 / 4) * 4, 2)
    # By a ring each rank sends its shards three times.
    assert cost_of(DUPLICATED, *args) == Cost(8 * iteration.flops(4, 16), 128 * 3 * 4, 1)
    # Five Gram matrices and a norm of each matrix, all-reduced: 2 x 3/4 of the elements.
    assert cost_of(DISTRIBUTED, *args) == Cost(8 * iteration.standard_flops(4, 4), 1.5 * 8 * (5 * 16 + 1) * 4, 6)
    # Norms; three times triangles of 10: those of six matrices to their owners, those of two to three ranks.
    flops = 3 * 8 * iteration.rectangular_flops(4, 4) + 2 * iteration.polynomial_flops(4)
    assert cost_of(GRAM, *args) == Cost(flops, 1.5 * 8 * 4 + 3 * (6 + 6) * 10 * 4, 7)


@pytest.mark.parametrize(
    ("p", "q", "dim", "expected"),
    [
        (8, 32, -1, GRAM),
        (32, 8, -2, GRAM),
        (8, 8, -1, GRAM),
        (8, 8, -2, GRAM),
        (8, 32, -2, OWNER),
        (32, 8, -1, OWNER),
    ],
)
def test_gram_is_for_matrices_cut_along_their_longer_side(p: int, q: int, dim: int, expected: str) -> None:
    plan = plan_of(divided(4, p, q, dim, 4), GRAM)
    ((chunk, batch),) = batches_of(plan)
    assert chunk.mode == expected
    assert expected == OWNER or batch.kind.dim == -1


@pytest.mark.parametrize("mode", EXACT)
def test_whole_heads_are_local_in_every_mode(mode: str) -> None:
    heads = MatrixLayout("qkv", (Section("q", 8, matrix_rows=4), Section("k", 4, matrix_rows=4)))
    plan = plan_of([Weight((24, 8), heads, -2, "tp", 4)], mode)
    assert {chunk.mode for chunk in plan.chunks} == {LOCAL}
    assert sum(batch.count for _, batch in batches_of(plan)) == 6


def test_blockwise_takes_each_shard_as_a_matrix() -> None:
    plan = plan_of(divided(3, 8, 32, -1, 4), "blockwise")
    ((chunk, batch),) = batches_of(plan)
    assert (chunk.mode, batch.kind.p, batch.kind.q, batch.count) == (LOCAL, 8, 8, 3)


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
def test_portions_are_all_chunks_group_by_group(seed: int, number: int) -> None:
    """A rank with more chunks of its own has the same portions of a group that it shares."""
    weights = random_weights(seed, 2)
    plan = plan_of(weights, chunk_bytes=1 << 12)
    portions = list(plan.portions(number))
    assert all(1 <= len(portion.chunks) <= number for portion in portions)
    assert all(len({chunk.group for chunk in portion.chunks}) == 1 for portion in portions)
    groups = [portion.chunks[0].group for portion in portions]
    assert groups == sorted(groups)
    for group in {*plan.groups(), ""}:
        found = [chunk for portion in portions for chunk in portion.chunks if chunk.group == group]
        assert found == [chunk for chunk in plan.chunks if chunk.group == group]
    more = plan_of([*weights, *(Weight((8, 8), WHOLE) for _ in range(40))], chunk_bytes=1 << 12)
    for group in plan.groups():
        mine, theirs = (
            [
                [batch.kind for chunk in portion.chunks for batch in chunk.batches]
                for portion in each.portions(number)
                if portion.chunks[0].group == group
            ]
            for each in (plan, more)
        )
        assert mine == theirs


def test_nothing_to_plan() -> None:
    scalar = MatrixLayout("gates", (Section("gate", 4, SCALAR),))
    assert plan_of([]).chunks == ()
    plan = plan_of([Weight((8, 6), scalar)])
    assert plan.chunks == () and plan.groups() == []
