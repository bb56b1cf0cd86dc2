"""Fused weights, divided over ranks, against their logical matrices, updated one by one in float64.

The shards are put together from the logical matrices by the row order of Megatron-Core's modules
(:mod:`tests.row_orders`), and the reference never sees a layout: singular values for the rows that are orthogonalized,
AdamW or Lion written out for the rows that follow the scalar optimizer's rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muon import Muon
from megatron_muon.engine.exchange import Counters
from megatron_muon.engine.plan import Weight, check_weight
from megatron_muon.orthogonalize import coefficients
from megatron_muon.orthogonalize.scale import scale_factor
from megatron_muon.routing.layout import SCALAR, MatrixLayout, Section
from tests import row_orders
from tests.pool import RankPool
from tests.reference import orthogonalized
from tests.row_orders import Label

STEPS = 2
EXACT = ["auto", "owner", "gram", "duplicated", "distributed"]
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


def update_of_shards(name: str, mode: str, scalar_optimizer: str = "adam", pairs: bool = False) -> torch.Tensor:
    """Train this rank's shard; the shards together.

    Args:
        name: of the weight.
        mode: of tensor parallelism.
        scalar_optimizer: rule of the rows that are not orthogonalized.
        pairs: whether the weight is an expert's, divided over pairs of ranks.
    """
    fused, group = {**WEIGHTS, **CUT_HEADS}[name], dist.group.WORLD
    if pairs:
        group = [dist.new_group([0, 1]), dist.new_group([2, 3])][dist.get_rank() // 2]
    dim = fused.dim - 2

    def cut(parts: Parts) -> torch.Tensor:
        whole = row_orders.assemble(fused.order(group.size()), parts)
        return whole.chunk(group.size(), dim=dim)[group.rank()].contiguous()

    param = torch.nn.Parameter(cut(parts_of(fused, group.size(), seed=1)))
    param.tensor_model_parallel, param.partition_dim, param.expert_tp = True, fused.dim, pairs
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


def expected_update(fused: Fused, ranks: int, scalar_optimizer: str = "adam") -> torch.Tensor:
    """The same steps on the logical matrices, one by one, on one rank."""
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
        direction = orthogonalized(MOMENTUM * buffer + (1 - MOMENTUM) * grad, coefficients("quintic", 5))
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


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", WEIGHTS)
def test_update_is_that_of_the_logical_matrices(pool: RankPool, name: str, world_size: int, mode: str) -> None:
    expected = expected_update(WEIGHTS[name], world_size if WEIGHTS[name].dim == 0 else 1)
    for result in pool.run(update_of_shards, world_size, name, mode):
        torch.testing.assert_close(result, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("mode", ["owner", "gram", "distributed"])
@pytest.mark.parametrize("name", EIGHT_RANKS)
def test_update_on_eight_ranks(pool: RankPool, name: str, mode: str) -> None:
    expected = expected_update(WEIGHTS[name], 8)
    for result in pool.run(update_of_shards, 8, name, mode):
        torch.testing.assert_close(result, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("mode", ["owner", "gram", "distributed"])
@pytest.mark.parametrize("name", ["gdn", "mamba", "experts_gdn"])
def test_rows_under_the_rule_of_lion(pool: RankPool, name: str, mode: str) -> None:
    expected = expected_update(WEIGHTS[name], 2, "lion")
    for result in pool.run(update_of_shards, 2, name, mode, "lion"):
        torch.testing.assert_close(result, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("name", ["glu", "experts_glu", "experts_columns"])
def test_experts_over_their_own_group(pool: RankPool, name: str, mode: str) -> None:
    """Four tensor-parallel ranks, experts divided over pairs of them."""
    expected = expected_update(WEIGHTS[name], 2 if WEIGHTS[name].dim == 0 else 1)
    for result in pool.run(update_of_shards, 4, name, mode, pairs=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=TOLERANCE)


def counters_of_a_step(name: str, mode: str) -> Counters:
    fused, world = WEIGHTS[name], dist.get_world_size()
    whole = row_orders.assemble(fused.order(world), parts_of(fused, world, seed=1))
    param = torch.nn.Parameter(whole.chunk(world, dim=-2)[dist.get_rank()].contiguous())
    param.tensor_model_parallel, param.partition_dim, param.matrix_layout = True, 0, fused.layout(world)
    optimizer = Muon([param], tp_mode=mode, fp32_matmul_prec="highest", tp_group=dist.group.WORLD)
    param.grad = param.detach().clone()
    optimizer.step()
    return optimizer.prepare().counters


@pytest.mark.parametrize("mode", ["owner", "gram", "duplicated", "distributed"])
def test_heads_are_updated_without_communication(pool: RankPool, mode: str) -> None:
    for world_size in (2, 4):
        for counters in pool.run(counters_of_a_step, world_size, "qkv_per_head", mode):
            assert (counters.collectives, counters.bytes) == (0, 0) and counters.flops > 0


@pytest.mark.parametrize("mode,collectives", [("owner", 2), ("duplicated", 1), ("distributed", 2 * 6)])
def test_other_weights_are_exchanged_as_their_mode_says(pool: RankPool, mode: str, collectives: int) -> None:
    """One message there and one back; one gather; or a norm and five Gram matrices for q with gate and for k with v."""
    for counters in pool.run(counters_of_a_step, 2, "qkv", mode):
        assert counters.collectives == collectives


@pytest.mark.parametrize("mode", EXACT)
def test_heads_that_shards_cut_are_put_together(pool: RankPool, mode: str) -> None:
    """Two groups on four ranks: no rank holds a whole group, and some heads are whole nowhere."""
    expected = expected_update(CUT_HEADS["qkv_per_head_cut"], 4)
    for result in pool.run(update_of_shards, 4, "qkv_per_head_cut", mode):
        torch.testing.assert_close(result, expected, rtol=0, atol=TOLERANCE)


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
