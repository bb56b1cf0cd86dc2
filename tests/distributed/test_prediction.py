"""What a plan predicts of a step, against the counters of real steps on ranks, and against torch's own count."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from megatron_muon import Muon
from megatron_muon.engine.modes import EXACT, MODES, Cost, Machine, Sizes
from megatron_muon.engine.plan import Weight
from megatron_muon.engine.planner import Policy, make_plan
from megatron_muon.engine.prediction import matrices_by_mode, predict
from megatron_muon.engine.step import StepEngine
from megatron_muon.orthogonalize.coefficients import iteration
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer
from megatron_muon.routing.layout import SCALAR, WHOLE, Budget, MatrixLayout, Section
from tests.pool import RankPool

QKV = MatrixLayout("qkv", (Section("q", 8), Section("k", 4), Section("v", 4)))
HEADS = MatrixLayout("qkv", tuple(Section(section.name, section.rows, matrix_rows=4) for section in QKV.sections))
GATED = MatrixLayout("gdn", (Section("q", 6), Section("beta", 2, SCALAR)))
STACK = WHOLE.stack()
TINY_CHUNK = 0.001
"""MiB: about one 16 x 16 matrix."""


@dataclass(frozen=True)
class Given:
    """A weight of a model.

    Attributes:
        shape: of the whole weight.
        dim: what tensor parallelism divides of its matrices, 0 or 1; None for nothing.
        layout: its matrices.
        expert: whether the group of experts divides it.
    """

    shape: tuple[int, ...]
    dim: int | None = 0
    layout: MatrixLayout = WHOLE
    expert: bool = False

    def parameter(self, group: dist.ProcessGroup, double: bool) -> torch.nn.Parameter:
        """This rank's shard, with a gradient."""
        whole = torch.randn(self.shape, generator=torch.Generator().manual_seed(sum(self.shape)))
        whole = whole.double() if double else whole
        shard = whole if self.dim is None else whole.chunk(group.size(), dim=self.dim - 2)[group.rank()]
        param = torch.nn.Parameter(shard.clone())
        param.grad = shard.clone()
        param.matrix_layout, param.expert_tp = self.layout, self.expert
        if self.dim is not None:
            param.tensor_model_parallel, param.partition_dim = True, self.dim
        return param


DENSE = (
    *[Given((16, 24), 1)] * 5,  # no multiple of 2 or 4 ranks
    *[Given((16, 24), 1, replace(WHOLE, budget=Budget(7)))] * 3,
    Given((24, 16), 0, replace(WHOLE, budget=Budget(3, "polar_express"))),
    *[Given((24, 16), 0)] * 3,  # fewer than 4 ranks
    *[Given((24, 16), 1)] * 2,  # divided along the shorter side
    Given((16, 16), 0),
    *[Given((8, 40), 0)] * 2,
    Given((8, 96), 1),  # Gram pays on each shard, which distributed does without
    Given((32, 12), 0, QKV),  # two periods: shards of four ranks cut them
    Given((64, 8), 0, HEADS),  # four periods: every head is whole on a rank
    Given((32, 12), 0, GATED),
    Given((16, 12), 1, GATED),
    Given((12, 20), None),
)
BROKEN_HEADS = (Given((32, 20), 0, HEADS), *[Given((32, 20), 0, HEADS)] * 2, Given((16, 24), 1))
EXPERTS = (
    *DENSE[:6],
    *[Given((16, 24), 1, expert=True)] * 3,
    *[Given((24, 16), 0, expert=True)] * 2,
    Given((3, 16, 20), 1, STACK, expert=True),
    Given((3, 16, 20), 0, STACK, expert=True),
)


@dataclass(frozen=True)
class Measured:
    """One step of a real optimizer on one rank.

    Attributes:
        predicted: from the plan.
        counted: by the engine's counters.
        flops: operations by torch's count.
        chunks: of the plan.
    """

    predicted: Cost
    counted: Cost
    flops: int
    chunks: int


def measured(
    modes: list[str],
    given: tuple[Given, ...],
    pairs: bool = False,
    steps: int = 1,
    double: bool = False,
    **options: Any,
) -> dict[str, list[Measured]]:
    """Runs on a rank: steps in each mode, each counted by itself.

    Args:
        modes: of tensor parallelism.
        given: the weights.
        pairs: whether experts are divided over pairs of ranks.
        steps: number of steps.
        double: float64 weights.
        options: of the optimizer.
    """
    group = expert_group = dist.group.WORLD
    if pairs:
        expert_group = [dist.new_group([0, 1]), dist.new_group([2, 3])][dist.get_rank() // 2]
    ranks = {"tensor-parallel": group.rank(), "expert tensor-parallel": expert_group.rank()}
    found = {}
    for mode in modes:
        params = [each.parameter(expert_group if each.expert else group, double) for each in given]
        optimizer = Muon(params, tp_group=group, expert_tp_group=expert_group, tp_mode=mode, **options)
        engine = optimizer.prepare()
        predicted = prediction_of(engine, ranks)
        found[mode] = [Measured(predicted, *one_step(optimizer), len(engine.plan.chunks)) for _ in range(steps)]
    return found


def measured_with(
    settings: list[dict[str, Any]], given: tuple[Given, ...], **common: Any
) -> list[dict[str, list[Measured]]]:
    """:func:`measured` with each of several settings, which name the modes too."""
    return [measured(given=given, **setting, **common) for setting in settings]


def one_step(optimizer: Muon) -> tuple[Cost, int]:
    """What the engine counts in a step, and the operations that torch counts."""
    counters = optimizer.prepare().counters
    counters.reset()
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert optimizer.prepare().counters is counters, "another engine made the step"
    return Cost(counters.flops, counters.bytes, counters.collectives), counter.get_total_flops()


def prediction_of(engine: StepEngine, ranks: dict[str, int]) -> Cost:
    wire = engine.wire
    sizes = Sizes(wire.dtype.itemsize, wire.back.itemsize, wire.gram.itemsize)
    return predict(engine.plan, engine.orthogonalizer, sizes, ranks)


def check(results: list[dict[str, list[Measured]]]) -> None:
    for rank, by_mode in enumerate(results):
        check_rank(by_mode, f"rank {rank}")


def check_rank(by_mode: dict[str, list[Measured]], what: str) -> None:
    assert by_mode
    for mode, steps in by_mode.items():
        for step in steps:
            assert step.predicted == step.counted, f"{mode}, {what}"
            assert step.predicted.flops == step.flops, f"{mode}, {what}"


NUMBERS = {
    "fp32": {"ns_dtype": "fp32"},
    "fp32, sent as bf16": {"ns_dtype": "fp32", "tp_wire_dtype": "bf16", "coefficient_type": "cubic5"},
    "bf16": {"ns_dtype": "bf16", "coefficient_type": "turbo_muon"},
    "bf16, sent as fp32": {"ns_dtype": "bf16", "tp_wire_dtype": "fp32"},
    "fp16": {"ns_dtype": "fp16", "coefficient_type": "polar_express"},
    "fp16, sent as fp32": {"ns_dtype": "fp16", "tp_wire_dtype": "fp32", "coefficient_type": "turbo_muon"},
}


@pytest.mark.parametrize(
    ("world_size", "names"),
    [
        (1, ["bf16"]),
        pytest.param(2, ["fp32", "bf16, sent as fp32", "fp16"], marks=pytest.mark.slow),
        (4, list(NUMBERS)),
    ],
    ids=["1", "2", "4"],
)
def test_counters_are_as_predicted(pool: RankPool, world_size: int, names: list[str]) -> None:
    """All types of numbers on four ranks, some on two; on one, nothing is sent."""
    settings = [
        # In bfloat16 gram is refused.
        {"modes": [mode for mode in EXACT if mode != "gram" or not name.startswith("bf16")], **NUMBERS[name]}
        for name in names
    ]
    for rank, results in enumerate(pool.run(measured_with, world_size, settings, DENSE)):
        for name, result in zip(names, results, strict=True):
            check_rank(result, f"{name}, rank {rank}")


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_blockwise(pool: RankPool, world_size: int) -> None:
    """Without the weight whose sections four ranks cut."""
    given = tuple(each for each in DENSE if each.layout != QKV)
    results = pool.run(measured, world_size, ["blockwise"], given, ns_dtype="fp32")
    check(results)
    assert all(rank["blockwise"][0].counted.collectives == 0 for rank in results)


def test_every_step_is_like_the_first(pool: RankPool) -> None:
    """The comparison of plans before the first step is not counted."""
    check(pool.run(measured, 2, EXACT, DENSE, steps=2, ns_dtype="fp32"))


def bounds(modes: list[str]) -> list[dict[str, Any]]:
    """All matrices in one chunk of each mode and group, or one matrix in each."""
    return [{"modes": modes, "ns_dtype": "fp32", "chunk_mb": chunk_mb} for chunk_mb in (256.0, TINY_CHUNK)]


def test_groups_of_experts(pool: RankPool) -> None:
    """Four tensor-parallel ranks, experts divided over pairs of them."""
    for one, several in pool.run(measured_with, 4, bounds(list(MODES)), EXPERTS, pairs=True):
        check([one, several])


def test_heads_that_shards_cut(pool: RankPool) -> None:
    """Two query groups of 16 rows on four ranks: some ranks hold nothing of a head."""
    for one, several in pool.run(measured_with, 4, bounds(EXACT), BROKEN_HEADS):
        check([one, several])


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_several_chunks(pool: RankPool, world_size: int) -> None:
    results = pool.run(measured_with, world_size, bounds(EXACT), DENSE)
    check([several for _, several in results])
    one, several = results[0]
    for mode in EXACT:
        assert several[mode][0].chunks > one[mode][0].chunks + 2


def test_float64_is_sent_and_summed_as_it_is(pool: RankPool) -> None:
    given = (*[Given((16, 24), 1)] * 3, Given((24, 16), 0), Given((32, 16), 0, QKV))
    check(pool.run(measured, 2, EXACT, given, double=True, fp32_matmul_prec="highest"))


def test_products_by_blocks(pool: RankPool) -> None:
    """From 512 rows on, CPUs compute symmetric products by blocks, with fewer operations."""
    modes, given = ["owner", "gram", "distributed"], (*[Given((512, 576), 1)] * 2,)
    settings = [{"modes": modes, "ns_dtype": "fp32", "ns_backend": backend} for backend in ("auto", "torch")]
    for blocks, full in pool.run(measured_with, 2, settings, given):
        check([blocks, full])
        assert all(blocks[mode][0].flops < full[mode][0].flops for mode in modes)


def test_ranks_differ() -> None:
    """Three matrices on four ranks: one rank owns none; each sends what it does not keep."""
    orthogonalizer = Orthogonalizer(iteration("quintic", 5), torch.bfloat16)
    plan = plan_of([Weight((8, 6), WHOLE, -1, "tp", 4)] * 3, "owner", orthogonalizer)
    costs = [predict(plan, orthogonalizer, Sizes(4, 2, 2), {"tp": rank}) for rank in range(4)]
    # Of each matrix 48 elements a rank, at 4 bytes there; an owner keeps its own part, and sends 3 x 48 x 2 back.
    owner, idle = Cost(orthogonalizer.flops(8, 24), 2 * 48 * 4 + 3 * 48 * 2, 2), Cost(0, 3 * 48 * 4, 2)
    assert sorted(costs, key=lambda cost: -cost.flops) == [owner, owner, owner, idle]


def test_a_group_without_a_number_is_refused() -> None:
    orthogonalizer = Orthogonalizer(iteration("quintic", 5), torch.bfloat16)
    plan = plan_of([Weight((8, 6), WHOLE, -1, "tp", 4)], "owner", orthogonalizer)
    with pytest.raises(KeyError, match="tp"):
        predict(plan, orthogonalizer, Sizes(4, 2, 2), {"expert tp": 0})


def plan_of(weights: list[Weight], mode: str, orthogonalizer: Orthogonalizer, chunk_bytes: int = 1 << 28) -> Any:
    return make_plan(weights, Policy(mode, Sizes(4, 2, 2), chunk_bytes, Machine.of("cuda")), orthogonalizer)


@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_weights_costs_nothing(mode: str) -> None:
    """Plans of equal sets of weights cost the same: planning relies on it."""
    orthogonalizer = Orthogonalizer(iteration("quintic", 5), torch.float32)
    weights = [
        *[Weight((64, 32), WHOLE, -1, "tp", 4)] * 5,
        *[Weight((32, 64), WHOLE, -2, "tp", 4)] * 6,
        *[Weight((3, 64, 32), STACK, -1, "tp", 4)] * 3,
        *[Weight((32, 64), HEADS, -2, "tp", 4)] * 3,
        *[Weight((64, 32), WHOLE, -1, "expert tp", 2)] * 5,
        *[Weight((64, 32), WHOLE)] * 2,
    ]

    def costs() -> list[Cost]:
        plan = plan_of(weights, mode, orthogonalizer, 20_000)
        return [predict(plan, orthogonalizer, Sizes(4, 4, 4), {"tp": rank, "expert tp": rank % 2}) for rank in range(4)]

    expected, shuffle = costs(), random.Random(0)
    for _ in range(5):
        shuffle.shuffle(weights)
        assert costs() == expected


def test_matrices_count_once() -> None:
    """Six heads on each of two ranks, a divided matrix, one that both hold, and two stacks of three."""
    orthogonalizer = Orthogonalizer(iteration("quintic", 5), torch.bfloat16)
    heads = MatrixLayout("qkv", (Section("q", 4, matrix_rows=2), Section("k", 2, matrix_rows=2)))
    weights = [
        Weight((24, 8), heads, -2, "tp", 2),
        Weight((8, 6), WHOLE, -1, "tp", 2),
        Weight((8, 6), WHOLE),
        *[Weight((3, 8, 6), STACK, -2, "tp", 2)] * 2,
    ]
    assert matrices_by_mode(plan_of(weights, "owner", orthogonalizer)) == {
        ("local", 2, 8): 2 * 12,
        ("owner", 8, 12): 1,
        ("local", 8, 6): 1,
        ("owner", 16, 6): 6,
    }
    assert matrices_by_mode(plan_of(weights, "blockwise", orthogonalizer)) == {
        ("local", 2, 8): 2 * 12,
        ("local", 8, 6): 2 + 1 + 2 * 6,
    }
