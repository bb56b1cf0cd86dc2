"""Fused weights, divided over ranks, against their logical matrices, updated one by one in float64.

The shards are put together from the logical matrices by the row order of Megatron-Core's modules
(:mod:`tests.row_orders`), and the reference never sees a layout: singular values for the rows that are orthogonalized,
AdamW or Lion written out for the rows that follow the scalar optimizer's rule.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muon import Muon
from megatron_muon.engine.exchange import Counters
from megatron_muon.engine.modes import EXACT
from megatron_muon.engine.plan import Weight
from megatron_muon.engine.planner import check_weight
from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.scalar_rows import check_scalar_rows
from megatron_muon.orthogonalize import iteration
from megatron_muon.orthogonalize.scale import scale_factor
from megatron_muon.routing.layout import SCALAR, MatrixLayout, Section
from tests import row_orders
from tests.pool import RankPool
from tests.reference import orthogonalized
from tests.row_orders import Label

STEPS = 2
LR, MOMENTUM, DECAY, EXTRA = 0.1, 0.8, 0.3, 0.2
BETAS, EPS, LR_MULT, WD_MULT = (0.9, 0.99), 1e-8, 0.5, 0.25
# float64: sums in another order, amplified by the slope of the iteration (about 500 a step at 0).
TOLERANCE = 1e-10

Parts = dict[Label, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Fused:
    """A fused weight.

    Attributes:
        layout: that its rule would put on it.
        order: ranks -> label of each row of the whole weight.
        columns: of the weight.
        experts: of a 3-D stack.
        dim: the divided dimension of its matrices: 0 rows, 1 columns.
    """

    layout: Callable[[int], MatrixLayout]
    order: Callable[[int], list[Label]]
    columns: int = 10
    experts: int | None = None
    dim: int = 0


def _layout(kind: str, sizes: dict[str, int], *, heads: int = 0, scalar: tuple[str, ...] = ()) -> MatrixLayout:
    sections = (
        Section(name, rows, SCALAR, 0) if name in scalar else Section(name, rows, matrix_rows=heads)
        for name, rows in sizes.items()
    )
    return MatrixLayout(kind, tuple(sections))


def _shares(sizes: dict[str, int], ranks: int) -> dict[str, int]:
    return {name: rows // ranks for name, rows in sizes.items()}


GROUP = {"q": 8, "gate": 8, "k": 4, "v": 4}  # two heads of 4 a query group
IN_PROJ = {"q": 16, "k": 16, "v": 24, "z": 24, "beta": 8, "alpha": 8}
MAMBA = {"z": 16, "x": 16, "B": 8, "C": 8, "dt": 8}
LATENT, ROPE, Q_LATENT = 20, 4, 16
GATES = ("beta", "alpha", "dt")


def _qkv(groups: int, *, per_head: bool = False, **changes: Any) -> Fused:
    layout = _layout("qkv", GROUP, heads=4 if per_head else 0)
    order = row_orders.query_groups(2 * groups, groups, 4, gated=True, per_head=per_head)
    return Fused(lambda ranks: layout, lambda ranks: order, **changes)


def _glu(ffn: int, **changes: Any) -> Fused:
    sizes = {"gate": ffn, "up": ffn}
    return Fused(
        lambda ranks: _layout("glu", _shares(sizes, ranks)),
        lambda ranks: row_orders.sections_of_ranks(ranks, sizes),
        **changes,
    )


def _mixed(sizes: dict[str, int]) -> Fused:
    return Fused(
        lambda ranks: _layout("in_proj", _shares(sizes, ranks), scalar=GATES),
        lambda ranks: row_orders.sections_of_ranks(ranks, sizes),
    )


def _fused_latents(ranks: int) -> MatrixLayout:
    """One section for each run of equal labels; names appear again after each rank's part."""
    runs: list[Section] = []
    for name, _ in row_orders.fused_latents(ranks, Q_LATENT, LATENT, ROPE):
        if runs and runs[-1].name == name:
            runs[-1] = Section(name, runs[-1].rows + 1)
        else:
            runs.append(Section(name, 1))
    return MatrixLayout("mla_qkv_down", tuple(runs))


def _stack(fused: Fused) -> Fused:
    return dataclasses.replace(fused, layout=lambda ranks: fused.layout(ranks).stack(), experts=3)


WEIGHTS: dict[str, Fused] = {
    "qkv": _qkv(4),
    "qkv_more_ranks_than_groups": _qkv(2),
    "qkv_one_group": _qkv(1, columns=28),
    "qkv_per_head": _qkv(4, per_head=True),
    "kv_per_head_of_k_alone": Fused(
        lambda ranks: MatrixLayout("kv", (Section("k", 4, matrix_rows=4), Section("v", 4))),
        lambda ranks: [label for head in range(4) for label in [("k", head)] * 4 + [("v", 0)] * 4],
    ),
    "mla_up": Fused(
        lambda ranks: _layout("mla_kv_up", {"k_nope": 5, "v": 3}),
        lambda ranks: row_orders.heads_of_parts(8, {"k_nope": 5, "v": 3}),
    ),
    "mla_down": Fused(
        lambda ranks: _layout("mla_kv_down", {"kv_latent": LATENT, "k_rope": ROPE}),
        lambda ranks: row_orders.consecutive({"kv_latent": LATENT, "k_rope": ROPE}),
    ),
    "mla_fused_down": Fused(_fused_latents, lambda ranks: row_orders.fused_latents(ranks, Q_LATENT, LATENT, ROPE)),
    "glu": _glu(16),
    "glu_wide": _glu(8, columns=24),
    "glu_in_turns": Fused(
        lambda ranks: _layout("glu", {"gate": 2, "up": 2}), lambda ranks: row_orders.in_turns(("gate", "up"), 2, 32)
    ),
    "gdn": _mixed(IN_PROJ),
    "mamba": _mixed(MAMBA),
    "experts": _stack(Fused(lambda ranks: MatrixLayout("whole"), lambda ranks: [("whole", 0)] * 16)),
    "experts_columns": dataclasses.replace(
        _stack(Fused(lambda ranks: MatrixLayout("whole"), lambda ranks: [("whole", 0)] * 12)), columns=16, dim=1
    ),
    "experts_glu": _stack(_glu(16)),
    "experts_gdn": _stack(_mixed(IN_PROJ)),
    "columns": dataclasses.replace(_qkv(2), columns=16, dim=1),
    "columns_gdn": Fused(
        lambda ranks: _layout("in_proj", IN_PROJ, scalar=GATES),
        lambda ranks: row_orders.sections_of_ranks(1, IN_PROJ),
        columns=16,
        dim=1,
    ),
}
CUT_HEADS = {"qkv_per_head_cut": _qkv(2, per_head=True)}
"""Only by gathering."""
EIGHT_RANKS = ("qkv_more_ranks_than_groups", "mla_fused_down", "gdn")


def parts_of(fused: Fused, ranks: int, seed: int) -> Parts:
    """Random logical matrices; blocks differ in size by factors, so that a mix-up of blocks shows."""
    generator = torch.Generator().manual_seed(seed)
    counts: dict[Label, int] = {}
    for label in fused.order(ranks):
        counts[label] = counts.get(label, 0) + 1
    lead = () if fused.experts is None else (fused.experts,)
    names = list(dict.fromkeys(name for name, _ in counts))
    return {
        label: torch.randn(*lead, rows, fused.columns, dtype=torch.float64, generator=generator)
        * 10.0 ** -names.index(label[0])
        for label, rows in counts.items()
    }


def updates_of_shards(
    names: list[str], modes: list[str], scalar_optimizer: str = "adam", pairs: bool = False
) -> dict[tuple[str, str], torch.Tensor]:
    """Train this rank's shards, each by itself; the shards of each together.

    Args:
        names: of the weights.
        modes: of tensor parallelism.
        scalar_optimizer: rule of the rows that are not orthogonalized.
        pairs: whether the weights are experts', divided over pairs of ranks.
    """
    group = dist.group.WORLD
    if pairs:
        group = [dist.new_group([0, 1]), dist.new_group([2, 3])][dist.get_rank() // 2]
    return {(name, mode): update_of_shards(name, mode, scalar_optimizer, group) for name in names for mode in modes}


def update_of_shards(name: str, mode: str, scalar_optimizer: str, group: dist.ProcessGroup) -> torch.Tensor:
    fused = {**WEIGHTS, **CUT_HEADS}[name]
    dim = fused.dim - 2

    def cut(parts: Parts) -> torch.Tensor:
        whole = row_orders.assemble(fused.order(group.size()), parts)
        return whole.chunk(group.size(), dim=dim)[group.rank()].contiguous()

    param = torch.nn.Parameter(cut(parts_of(fused, group.size(), seed=1)))
    param.tensor_model_parallel, param.partition_dim = True, fused.dim
    param.expert_tp = group is not dist.group.WORLD
    param.matrix_layout = fused.layout(group.size() if fused.dim == 0 else 1)
    optimizer = Muon(
        [param], lr=LR, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY, extra_scale_factor=EXTRA,
        fp32_matmul_prec="highest", tp_mode=mode, tp_group=dist.group.WORLD, expert_tp_group=group,
        scalar_optimizer=scalar_optimizer, scalar_betas=BETAS, scalar_eps=EPS, scalar_lr_mult=LR_MULT,
        scalar_wd_mult=WD_MULT,
    )  # fmt: skip
    for step in range(STEPS):
        param.grad = cut(parts_of(fused, group.size(), seed=10 + step))
        optimizer.step()
    shards = [torch.empty_like(param.data) for _ in range(group.size())]
    dist.all_gather(shards, param.data.contiguous(), group=group)
    return torch.cat(shards, dim=dim)


@functools.cache
def expected_update(name: str, ranks: int, scalar_optimizer: str = "adam") -> torch.Tensor:
    """The same steps on the logical matrices, one by one, on one rank."""
    fused = {**WEIGHTS, **CUT_HEADS}[name]
    ranks = ranks if fused.dim == 0 else 1
    weights = parts_of(fused, ranks, seed=1)
    gradients = [parts_of(fused, ranks, seed=10 + step) for step in range(STEPS)]
    result = {}
    for label, weight in weights.items():
        grads = [parts[label] for parts in gradients]
        if label[0] in GATES:
            result[label] = (adamw if scalar_optimizer == "adam" else lion)(weight, grads)
        elif fused.experts is None:
            result[label] = muon(weight, grads)
        else:
            each = [muon(weight[i], [grad[i] for grad in grads]) for i in range(fused.experts)]
            result[label] = torch.stack(each)
    return row_orders.assemble(fused.order(ranks), result)


def muon(weight: torch.Tensor, grads: list[torch.Tensor]) -> torch.Tensor:
    buffer = torch.zeros_like(weight)
    for grad in grads:
        buffer = MOMENTUM * buffer + (1 - MOMENTUM) * grad
        direction = orthogonalized(MOMENTUM * buffer + (1 - MOMENTUM) * grad, iteration("quintic", 5).coefficients)
        weight = (1 - LR * DECAY) * weight - LR * EXTRA * scale_factor("spectral", *weight.shape) * direction
    return weight


def adamw(weight: torch.Tensor, grads: list[torch.Tensor]) -> torch.Tensor:
    lr, decay = LR * LR_MULT, DECAY * WD_MULT
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, grad in enumerate(grads, 1):
        first = BETAS[0] * first + (1 - BETAS[0]) * grad
        second = BETAS[1] * second + (1 - BETAS[1]) * grad**2
        ratio = (first / (1 - BETAS[0] ** step)) / ((second / (1 - BETAS[1] ** step)).sqrt() + EPS)
        weight = (1 - lr * decay) * weight - lr * ratio
    return weight


def lion(weight: torch.Tensor, grads: list[torch.Tensor]) -> torch.Tensor:
    lr, decay = LR * LR_MULT, DECAY * WD_MULT
    momentum = torch.zeros_like(weight)
    for grad in grads:
        sign = (BETAS[0] * momentum + (1 - BETAS[0]) * grad).sign()
        weight = (1 - lr * decay) * weight - lr * sign
        momentum = BETAS[1] * momentum + (1 - BETAS[1]) * grad
    return weight


def check(results: list[dict[tuple[str, str], torch.Tensor]], ranks: int, scalar_optimizer: str = "adam") -> None:
    """What :func:`updates_of_shards` gives on each rank, for weights divided over ``ranks``."""
    for result in results:
        for (name, mode), found in result.items():
            torch.testing.assert_close(
                found,
                expected_update(name, ranks, scalar_optimizer),
                rtol=0,
                atol=TOLERANCE,
                msg=lambda text, message=f"{name}, {mode}": f"{message}: {text}",
            )


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_update_is_that_of_the_logical_matrices(pool: RankPool, world_size: int, mode: str) -> None:
    results = pool.run(updates_of_shards, world_size, list(WEIGHTS), [mode])
    assert all(len(result) == len(WEIGHTS) for result in results)
    check(results, world_size)


def test_update_on_eight_ranks(pool: RankPool) -> None:
    check(pool.run(updates_of_shards, 8, list(EIGHT_RANKS), ["owner", "gram", "distributed"]), 8)


def test_rows_under_the_rule_of_lion(pool: RankPool) -> None:
    names, modes = ["gdn", "mamba", "experts_gdn"], ["owner", "gram", "distributed"]
    check(pool.run(updates_of_shards, 2, names, modes, "lion"), 2, "lion")


def test_experts_over_their_own_group(pool: RankPool) -> None:
    """Four tensor-parallel ranks, experts divided over pairs of them."""
    check(pool.run(updates_of_shards, 4, ["glu", "experts_glu", "experts_columns"], EXACT, pairs=True), 2)


def test_heads_that_shards_cut_are_put_together(pool: RankPool) -> None:
    """Two groups on four ranks: no rank holds a whole group, and some heads are whole nowhere."""
    check(pool.run(updates_of_shards, 4, list(CUT_HEADS), EXACT), 4)


def counters_of_a_step(name: str, modes: list[str]) -> dict[str, Counters]:
    """In each mode."""
    fused, world, found = WEIGHTS[name], dist.get_world_size(), {}
    whole = row_orders.assemble(fused.order(world), parts_of(fused, world, seed=1))
    for mode in modes:
        param = torch.nn.Parameter(whole.chunk(world, dim=-2)[dist.get_rank()].contiguous())
        param.tensor_model_parallel, param.partition_dim, param.matrix_layout = True, 0, fused.layout(world)
        optimizer = Muon([param], tp_mode=mode, fp32_matmul_prec="highest", tp_group=dist.group.WORLD)
        param.grad = param.detach().clone()
        optimizer.step()
        found[mode] = optimizer.prepare().counters
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_heads_are_updated_without_communication(pool: RankPool, world_size: int) -> None:
    modes = ["owner", "gram", "duplicated", "distributed"]
    for by_mode in pool.run(counters_of_a_step, world_size, "qkv_per_head", modes):
        for mode, counters in by_mode.items():
            assert (counters.collectives, counters.bytes) == (0, 0) and counters.flops > 0, mode


def test_other_weights_are_exchanged_as_their_mode_says(pool: RankPool) -> None:
    """One message there and one back; one gather; or the norms, and five times the Gram matrices, of all."""
    collectives = {"owner": 2, "duplicated": 1, "distributed": 6}
    for by_mode in pool.run(counters_of_a_step, 2, "qkv", list(collectives)):
        assert {mode: counters.collectives for mode, counters in by_mode.items()} == collectives


def refusals() -> list[str]:
    """What ``check_weight`` says about shards of four ranks that cut query groups."""
    split, heads = _qkv(2).layout(4), _qkv(2, per_head=True).layout(4)
    answers = []
    for mode, layout, dim, shape in (
        ("owner", split, -2, (12, 10)),
        ("distributed", split, -2, (12, 10)),
        ("auto", heads, -2, (12, 10)),
        ("blockwise", split, -2, (12, 10)),
        ("blockwise", split, -1, (48, 3)),
        ("auto", heads.stack(), -2, (3, 12, 10)),
        ("duplicated", split, -2, (7, 10)),
        ("distributed", split, 0, (20, 10)),
    ):
        try:
            check_weight(Weight(shape, layout, dim, "tp" if dim else "", 4 if dim else 1), mode)
            answers.append("accepted")
        except ValueError as error:
            answers.append(str(error))
    return answers


def test_what_a_mode_cannot_do_exactly_is_refused() -> None:
    way_out = "Use --muon-tp-mode auto, or treat the weight as one matrix (--muon-param-rule 'NAME=whole')."
    answers = refusals()
    assert answers[:3] == ["accepted"] * 3 and answers[4] == "accepted"
    for mode, answer in (("blockwise", answers[3]), ("auto", answers[5])):
        assert answer.startswith(f"--muon-tp-mode {mode}: a qkv weight with 12 rows on each of 4 tensor-parallel ranks")
        assert answer.endswith(way_out)
    assert answers[6].startswith("28 rows are not a multiple of the 24 rows of the qkv layout")
    assert answers[7].startswith("20 rows are not a multiple of the 24 rows of the qkv layout")


def test_shards_that_cut_through_rows_of_the_scalar_optimizer_are_refused() -> None:
    gated = _layout("in_proj", {"q": 18, "beta": 6}, scalar=GATES)
    check_scalar_rows(Weight((24, 10), gated, -2, "tp", 4))
    check_scalar_rows(Weight((12, 10), _qkv(2).layout(4), -2, "tp", 4))
    message = r"in_proj weight with 12 rows on each of 4 .*periods of 24 rows.* 'NAME=adam'.* 'NAME=whole'"
    with pytest.raises(ConfigError, match=message):
        check_scalar_rows(Weight((12, 10), gated, -2, "tp", 4))


def test_what_a_stack_divides_is_counted_in_its_matrices(pool: RankPool) -> None:
    """``partition_dim`` 0 of a stack is its rows: the experts stay where they are."""
    for shape in pool.run(shape_of_a_shard, 2):
        assert shape == (3, 16, 10)


def shape_of_a_shard() -> tuple[int, ...]:
    from megatron_muon.engine import shard_of

    param = torch.nn.Parameter(torch.zeros(3, 8, 10))
    param.tensor_model_parallel, param.partition_dim = True, 0
    shard = shard_of(param, dist.group.WORLD, None)
    assert shard is not None
    return shard.whole_shape(param.shape)
