"""Muon on tensor-parallel shards, in float64, against Muon on whole weights."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_muon import Muon
from megatron_muon.engine.modes import EXACT
from megatron_muon.routing.layout import WHOLE, MatrixLayout, Section
from tests.pool import RankPool

# One query group is 4 + 2 + 2 rows; 32 rows are four groups.
QKV = MatrixLayout("qkv", (Section("q", 4), Section("k", 2), Section("v", 2)))
STEPS = 3
# float64: sums in another order, amplified by the slope of the iteration (about 500 a step at 0).
TOLERANCE = 1e-10


def _weight(m: int, n: int, seed: int) -> torch.Tensor:
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Cut:
    """This rank's part of a whole weight."""

    def __init__(self, shape: tuple[int, int], dim: int | None) -> None:
        self.whole_shape = shape
        self.dim = dim

    def __call__(self, whole: torch.Tensor) -> torch.Tensor:
        if self.dim is None:
            return whole
        return whole.chunk(dist.get_world_size(), dim=self.dim)[dist.get_rank()]


class Half(Cut):
    """One of two parts, whatever the rank."""

    def __init__(self, shape: tuple[int, int], half: int) -> None:
        super().__init__(shape, 0)
        self.half = half

    def __call__(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.chunk(2)[self.half]


def _train(param: torch.nn.Parameter, cut: Cut, mode: str, **groups: dist.ProcessGroup) -> torch.Tensor:
    """Three steps; ``cut`` takes this rank's part of the whole gradients."""
    optimizer = Muon([param], lr=0.1, momentum=0.8, nesterov=True, fp32_matmul_prec="highest", tp_mode=mode, **groups)
    for step in range(STEPS):
        param.grad = cut(_weight(*cut.whole_shape, seed=10 + step)).contiguous()
        optimizer.step()
    return param.detach()


def update_of_shards(shape: tuple[int, int], dim: int, mode: str, layout: MatrixLayout) -> torch.Tensor:
    """Train this rank's shard, then put the shards together."""
    cut = Cut(shape, dim)
    param = torch.nn.Parameter(cut(_weight(*shape, seed=1)).clone())
    param.tensor_model_parallel, param.partition_dim, param.matrix_layout = True, dim, layout
    shard = _train(param, cut, mode, tp_group=dist.group.WORLD)
    shards = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
    dist.all_gather(shards, shard.contiguous())
    return torch.cat(shards, dim=dim)


def whole_update(shape: tuple[int, int], layout: MatrixLayout) -> torch.Tensor:
    param = torch.nn.Parameter(_weight(*shape, seed=1))
    param.matrix_layout = layout
    return _train(param, Cut(shape, None), "duplicated")


Case = tuple[tuple[int, int], int, MatrixLayout]


def updates_of_shards(cases: list[Case]) -> list[tuple[str, torch.Tensor]]:
    """Of each case in each mode."""
    return [(f"case {number}, {mode}", update_of_shards(shape, dim, mode, layout))
            for number, (shape, dim, layout) in enumerate(cases) for mode in EXACT]  # fmt: skip


def check(pool: RankPool, world_size: int, cases: list[Case]) -> None:
    expected = [whole_update(shape, layout) for shape, _, layout in cases for _ in EXACT]
    for results in pool.run(updates_of_shards, world_size, cases):
        for (what, result), its in zip(results, expected, strict=True):
            torch.testing.assert_close(
                result, its, rtol=0, atol=TOLERANCE, msg=lambda text, what=what: f"{what}: {text}"
            )


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_shards_get_the_update_of_the_whole(pool: RankPool, world_size: int) -> None:
    shapes = [((32, 12), 0), ((12, 32), 0), ((32, 12), 1), ((12, 32), 1)]
    check(pool, world_size, [*((shape, dim, WHOLE) for shape, dim in shapes), ((32, 12), 0, QKV)])


def test_more_ranks_than_query_groups(pool: RankPool) -> None:
    """Two groups of 8 rows on four ranks: no rank holds a whole group."""
    check(pool, 4, [((16, 12), 0, QKV)])


def errors_of_broken_groups(layouts: list[MatrixLayout]) -> list[str]:
    found = []
    for layout in layouts:
        with pytest.raises(ValueError) as error:
            update_of_shards((16, 12), 0, "blockwise", layout)
        found.append(str(error.value))
    return found


HEADS = MatrixLayout("qkv", tuple(Section(section.name, section.rows, matrix_rows=2) for section in QKV.sections))


def test_modes_that_cannot_split_broken_groups_refuse(pool: RankPool) -> None:
    for messages in pool.run(errors_of_broken_groups, 4, [QKV, HEADS]):
        for message in messages:
            assert "tp_mode blockwise" in message and "Use tp_mode auto" in message and "--" not in message


def test_blockwise_is_another_update(pool: RankPool) -> None:
    """Each shard is a matrix of its own, with its own scale."""
    shape = (32, 12)
    result = pool.run(update_of_shards, 2, shape, 0, "blockwise", WHOLE)[0]
    assert (result - whole_update(shape, WHOLE)).abs().max() > 1e-2
    halves = []
    for half in (0, 1):
        param = torch.nn.Parameter(_weight(*shape, seed=1).chunk(2)[half].clone())
        halves.append(_train(param, Half(shape, half), "duplicated"))
    torch.testing.assert_close(result, torch.cat(halves), rtol=0, atol=TOLERANCE)


def update_of_replicas() -> torch.Tensor:
    """A weight that TransformerEngine marks with partition_dim although every rank holds it whole."""
    param = torch.nn.Parameter(_weight(12, 8, seed=1))
    param.tensor_model_parallel, param.partition_dim = False, 0
    return _train(param, Cut((12, 8), None), "duplicated", tp_group=dist.group.WORLD)


def test_partition_dim_counts_only_with_tensor_model_parallel(pool: RankPool) -> None:
    expected = whole_update((12, 8), WHOLE)
    for result in pool.run(update_of_replicas, 2):
        assert torch.equal(result, expected)


def update_with_two_groups() -> tuple[torch.Tensor, torch.Tensor]:
    """A dense weight cut over all four ranks and an expert weight cut over pairs."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = pairs[dist.get_rank() // 2]
    results = []
    for group, is_expert in ((dist.group.WORLD, False), (pair, True)):
        whole = _weight(16, 12, seed=1)
        param = torch.nn.Parameter(whole.chunk(group.size())[group.rank()].clone())
        param.tensor_model_parallel, param.partition_dim, param.expert_tp = True, 0, is_expert
        optimizer = Muon([param], lr=0.1, fp32_matmul_prec="highest", tp_group=dist.group.WORLD, expert_tp_group=pair)
        param.grad = _weight(16, 12, seed=2).chunk(group.size())[group.rank()]
        optimizer.step()
        shards = [torch.empty_like(param.data) for _ in range(group.size())]
        dist.all_gather(shards, param.data, group=group)
        results.append(torch.cat(shards))
    return results[0], results[1]


def test_experts_are_gathered_over_their_own_group(pool: RankPool) -> None:
    for dense, expert in pool.run(update_with_two_groups, 4):
        torch.testing.assert_close(dense, expert, rtol=0, atol=TOLERANCE)
