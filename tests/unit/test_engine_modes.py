"""The mode of each matrix: what costs least, and what each mode can do."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from megatron_muon.engine.costs import cost_of
from megatron_muon.engine.modes import DISTRIBUTED, DUPLICATED, GRAM, OWNER, Cost, Machine
from megatron_muon.engine.plan import BatchKey, Weight
from megatron_muon.orthogonalize.coefficients import iteration
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer
from megatron_muon.routing.layout import WHOLE
from tests.random_weights import BFLOAT16, CPU, FLOAT32, RANKS, SIZES, batches_of, plan_of

CHOICES = (OWNER, GRAM, DISTRIBUTED)


def divided(count: int, p: int, q: int, dim: int, ranks: int) -> list[Weight]:
    shape = (p, q // ranks) if dim == -1 else (p // ranks, q)
    return [Weight(shape, WHOLE, dim, "tp", ranks)] * count


def seconds_of(
    count: int, p: int, q: int, dim: int, ranks: int, orthogonalizer: Orthogonalizer, machine: Machine
) -> dict:
    """Of each mode that ``auto`` may take."""
    longer = p == q or dim == (-1 if p < q else -2)
    modes = [mode for mode in CHOICES if mode != GRAM or (longer and orthogonalizer.restarts is not None)]
    key = BatchKey("auto", "tp", p, q, dim, ((q if dim == -1 else p) // ranks,) * ranks)
    return {mode: cost_of(mode, key, count, orthogonalizer, SIZES).seconds(machine) for mode in modes}


@pytest.mark.parametrize("orthogonalizer", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", RANKS[1:])
def test_auto_takes_what_costs_least(ranks: int, orthogonalizer: Orthogonalizer) -> None:
    """For numbers that can be shared evenly, and for fewer than there are ranks; all machines and shapes."""
    taken = set()
    machines = [CPU, Machine.of("cuda"), Machine(1e9, 1e12, 1e-9), Machine(1e15, 1e6, 0.0), Machine(1e15, 1e15, 1.0)]
    for machine in machines:
        for p, q in [(16, 16), (16, 64), (64, 16), (512, 512), (128, 2048), (2048, 128), (2048, 2048)]:
            for dim in (-1, -2):
                for count in (1, ranks - 1, ranks, 6 * ranks):
                    plan = plan_of(divided(count, p, q, dim, ranks), "auto", 1 << 40, orthogonalizer, machine)
                    expected = seconds_of(count, p, q, dim, ranks, orthogonalizer, machine)
                    (mode,) = {chunk.mode for chunk in plan.chunks}
                    assert expected[mode] == min(expected.values())
                    taken.add(mode)
    assert taken == (set(CHOICES) if orthogonalizer is FLOAT32 else {OWNER, DISTRIBUTED})


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
    orthogonalizer = Orthogonalizer(iteration("quintic", 5), torch.float32)
    args = (BatchKey("auto", "tp", 4, 16, -1, (4,) * 4), 8, orthogonalizer, SIZES)
    # 128 elements of 8 shards there, 3/4 of them to others; 3/4 of two whole matrices back.
    assert cost_of(OWNER, *args) == Cost(2 * orthogonalizer.flops(4, 16), (128 * 3 / 4 + 2 * 64 * 3 / 4) * 4, 2)
    # By a ring each rank sends its shards three times.
    assert cost_of(DUPLICATED, *args) == Cost(8 * orthogonalizer.flops(4, 16), 128 * 3 * 4, 1)
    # Five triangles of Gram matrices and a norm of each matrix, all-reduced: 2 x 3/4 of the elements.
    assert cost_of(DISTRIBUTED, *args) == Cost(8 * orthogonalizer.standard_flops(4, 4), 1.5 * 8 * (5 * 10 * 4 + 8), 6)
    # Norms; twice triangles of 10: those of six matrices to their owners, those of two to three ranks.
    flops = 2 * 8 * orthogonalizer.rectangular_flops(4, 4) + 2 * orthogonalizer.polynomial_flops(4)
    assert cost_of(GRAM, *args) == Cost(flops, 1.5 * 8 * 8 + 2 * (6 + 6) * 10 * 4, 5)
    # Without restarts once.
    cubic = Orthogonalizer(iteration("cubic5", 5), torch.float32)
    flops = 8 * cubic.rectangular_flops(4, 4) + 2 * cubic.polynomial_flops(4)
    assert cost_of(GRAM, args[0], 8, cubic, SIZES) == Cost(flops, 1.5 * 8 * 8 + (6 + 6) * 10 * 4, 3)


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
    assert expected == OWNER or batch.key.summed_dim == dim
