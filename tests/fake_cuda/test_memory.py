"""What a step holds at once, on fake GPUs, is what the plan says."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import pytest
import torch

from megatron_muon import Muon
from megatron_muon.engine.plan import Weight
from megatron_muon.optimizers.sphere import SpectralSphere
from megatron_muon.planning.memory import memory_of_step
from megatron_muon.planning.rehearsal import Forms
from tests.fake_cuda.models import taken
from tests.fake_cuda.streams import streams
from tests.fake_cuda.world import FIRST_STEP, World
from tests.megatron.planner import Planner

SIDE, MATRICES = 512, 2
BOUND = 4 * MATRICES * SIDE * SIDE

MOST_BOUNDS = {
    ("fp32", "owner"): (7.0, 6.2),
    ("fp32", "gram"): (11.6, 3.7),
    ("fp32", "duplicated"): (4.5, 3.7),
    ("fp32", "distributed"): (8.1, 3.6),
    ("fp32", "blockwise"): (4.0, 2.5),
    ("bf16", "owner"): (3.5, 3.5),
    ("bf16", "duplicated"): (2.3, 1.9),
    ("bf16", "distributed"): (5.1, 2.6),
    ("bf16", "blockwise"): (1.6, 1.6),
    ("fp16", "gram"): (5.8, 2.6),
}
"""Multiples of the bound of a chunk as the documentation has them, for matrices of 1 : 1 and of 1 : 8."""
IN_BF16 = [mode for dtype, mode in MOST_BOUNDS if dtype == "bf16"]
"""Modes whose every chunk is tried in the fewer bits."""


def step(
    mode: str, dtype: str, rank: int, shapes: list[tuple[tuple[int, int], int]], **options: Any
) -> tuple[int, int]:
    """Bytes that a step after the first held at once, and what is said of one of plain Muon.

    Args:
        mode: of tensor parallelism, on two ranks.
        dtype: of the iteration.
        rank: which one.
        shapes: of its shards, and the dimensions that are divided.
        options: of Muon.
    """
    forms = Forms(options.get("master", "fp32"), options.get("momentum_dtype", "auto"), options.pop("gradient", None))
    with World(rank, 2) as world:
        own = torch.bfloat16 if forms.master == "remainder" else torch.float32
        params = [world.parameter(*shape, dim=dim, dtype=own, grad=not forms.gradient) for shape, dim in shapes]
        for param in params:
            if forms.gradient is not None:
                param.decoupled_grad = torch.empty_like(param, dtype=forms.gradient)
        group = world.own_group([(0, 1)])
        options = {"nesterov": True, "chunk_mb": BOUND / 2**20, **options}
        muon = Muon(params, tp_group=group, tp_mode=mode, ns_dtype=dtype, **options)
        muon.engines.compared_elsewhere = True
        with world.refusing(FIRST_STEP):
            muon.step()
        before = world.watch.peak = world.watch.live
        muon.step()
        assert world.watch.live == before
        engine = next(iter(muon.engines))
        peak = world.watch.peak - before
    return peak, memory_of_step(engine, dict.fromkeys(engine.plan.groups(), rank), nesterov=True, forms=forms).peak


@pytest.mark.parametrize(
    ("dtype", "mode"),
    [
        pytest.param(*each, marks=pytest.mark.slow if each[0] == "fp32" and each[1] in IN_BF16 else ())
        for each in MOST_BOUNDS
    ],
)
def test_a_step_is_bounded_by_its_chunks(dtype: str, mode: str) -> None:
    """And takes what is said, whatever the number of weights."""
    square, wide = ((SIDE, SIDE // 2), 1), ((SIDE // 4, SIDE), 1)
    peaks = []
    for shapes in ([square] * 12, [square] * 20, [wide] * 32):
        peak, said = step(mode, dtype, 0, shapes)
        assert peak == pytest.approx(said, rel=1e-3)
        peaks.append(peak / BOUND)
    assert peaks[1] <= 1.001 * peaks[0]
    assert (peaks[1] <= MOST_BOUNDS[dtype, mode][0], peaks[2] <= MOST_BOUNDS[dtype, mode][1]) == (True, True), peaks


@pytest.mark.parametrize(
    ("dtype", "mode", "rank"), [(*pair, rank) for pair in MOST_BOUNDS for rank in (0, 1) if pair[0] != "bf16"]
)
def test_several_shapes_and_uneven_shares(dtype: str, mode: str, rank: int) -> None:
    """Batches of a chunk follow one another, and ranks own different numbers of matrices."""
    peak, said = step(mode, dtype, rank, [((SIDE, SIDE // 4), 0)] * 3 + [((SIDE // 4, SIDE // 2), 1)] * 5)
    assert peak == pytest.approx(said, rel=1e-2)


@pytest.mark.parametrize(
    ("master", "momentum", "gradient"),
    [("fp32", "int8", torch.bfloat16), ("remainder", "bf16", torch.bfloat16), ("remainder", "int8", torch.float32)],
)
def test_numbers_that_are_kept_in_fewer_bits(master: str, momentum: str, gradient: torch.dtype) -> None:
    """What is decoded at once counts; the engine's parts are no larger for it."""
    options = {"master": master, "momentum_dtype": momentum, "gradient": gradient}
    peak, said = step("owner", "bf16", 0, [((SIDE, SIDE // 2), 1)] * 12, **options)
    assert peak == pytest.approx(said, rel=1e-3)
    assert said > step("owner", "bf16", 0, [((SIDE, SIDE // 2), 1)] * 12)[1]


def test_windows_of_state_on_the_host() -> None:
    """Both stay between steps, and are no part of what a step takes besides."""
    with World() as world, streams(world):
        params = [world.parameter(SIDE, SIDE, dtype=torch.bfloat16) for _ in range(5)]
        for param in params:
            param.decoupled_grad, param.grad = torch.empty_like(param, dtype=torch.float32), None
        kept = {"master": "remainder", "momentum_dtype": "int8", "offload": "all"}
        muon = Muon(params, nesterov=True, chunk_mb=BOUND / 2**20, **kept)
        muon.step()
        before = world.watch.peak = world.watch.live
        muon.step()
        assert muon.windows is not None
        forms = Forms("remainder", "int8", torch.float32, "all", BOUND / 2**20)
        said = memory_of_step(next(iter(muon.engines)), {}, nesterov=True, forms=forms)
        assert world.watch.peak - before == pytest.approx(said.peak, rel=1e-2)
        assert said.windows == 2 * muon.windows.counters.largest > 0


@pytest.mark.slow
def test_the_spectral_sphere_keeps_directions_of_four_chunks() -> None:
    """Of 32 matrices, 16 on each rank: not of all weights."""
    matrix, shard = 4 * 32 * 32, ((16, 32), 0)
    options: dict[str, Any] = {"variant": SpectralSphere(tolerance=0.5), "chunk_mb": 4 * matrix / 2**20}
    few, many = (step("owner", "fp32", 0, [shard] * count, **options)[0] for count in (40, 72))
    assert 16 * matrix < few
    assert many <= 1.05 * few


@pytest.mark.parametrize(
    ("model", "stage"), [("llama3_70b", 1), pytest.param("deepseek_v3", 0, marks=pytest.mark.slow)]
)
def test_ranks_of_models(planner: Planner, model: str, stage: int) -> None:
    """State to the byte and the peak of a step, for the ranks of a stage that have most, or least, of either."""
    ranks = planner.ranks(model, stage, [])
    kinds = [sorted(ranks, key=attrgetter(what, "rank")) for what in ("state_bytes", "step_bytes")]
    chosen = {rank.rank: rank for ordered in kinds for rank in (ordered[0], ordered[-1])}
    for rank in chosen.values():
        found = taken(rank)
        assert found.state_bytes == rank.state_bytes
        assert found.peak == pytest.approx(rank.step_bytes, rel=1e-3), rank.rank
        # The bound of a chunk, or its largest matrix.
        largest = max(4 * m * n for weight in rank.planned for m, n in matrices(weight))
        assert found.peak <= MOST_BOUNDS["bf16", "owner"][1] * max(largest, 1 << 28)


def matrices(weight: Weight) -> list[tuple[int, int]]:
    """Rows and columns of the logical matrices of a weight."""
    return [(block.rows, block.columns) for block in weight.layout.blocks(weight.whole_shape)]
