"""What the plan says of a rank's memory and step, against numbers worked out by hand."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from megatron_muon import Muon, MuonConfig
from megatron_muon.engine.modes import MODES, Cost
from megatron_muon.optimizers.precision import Precision, precision_of
from megatron_muon.planning.accounts import (
    COPIES,
    GRADIENTS,
    MASTERS,
    MOMENTS,
    MOMENTUM,
    MUON,
    OTHERS,
    PADDING,
    SCALAR_MOMENTS,
    STEP,
    WEIGHTS,
    Account,
    Entry,
)
from megatron_muon.planning.cost import (
    RankLoad,
    active_parameters,
    attention_flops,
    choices_of_stage,
    loads_of_stage,
    refusals_of_stage,
)
from megatron_muon.planning.flags import Layout, Position
from megatron_muon.planning.holding import Weight, held_in_stage
from megatron_muon.planning.ownership import _pieces
from megatron_muon.planning.state import StateCounter
from megatron_muon.planning.steps import StepPlanner
from megatron_muon.routing.layout import SCALAR, STIEFEL, WHOLE, MatrixLayout, Section

QKV = MatrixLayout("qkv", (Section("q", 4), Section("k", 2), Section("v", 2)))
PER_HEAD = MatrixLayout("qkv", (Section("q", 4, matrix_rows=2), Section("k", 2, matrix_rows=2)))
GATED = MatrixLayout("gdn", (Section("q", 4), Section("beta", 1, SCALAR)))
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def layout_of(world: int, tensor: int = 1, expert: int = 1, expert_tensor: int | None = None) -> Layout:
    return Layout(world, tensor, expert_tensor or tensor, pipeline=1, context=1, expert=expert)


def loads_of(weights: list[Weight], layout: Layout, **options: object) -> list[RankLoad]:
    return loads_of_stage(weights, layout, "adam", StepPlanner(MuonConfig(**options)))


def work_of(weight: Weight, mode: str, **options: object) -> list[Cost]:
    """Of each tensor-parallel rank (those that do the same count once)."""
    loads = loads_of([weight], layout_of(weight.shards, weight.shards), **options)
    return list(dict.fromkeys(load.work[mode] for load in loads))


def standard(rows: int, columns: int) -> int:
    """Operations of five standard steps: X X^T, its square, and that with X."""
    p, q = sorted((rows, columns))
    return 5 * (2 * p * p * q + 2 * p**3 + 2 * p * p * q)


def test_a_whole_matrix() -> None:
    """In bfloat16, the default, the iteration is the standard one, in every mode."""
    for mode in set(MODES) - {"gram"}:
        assert work_of(Weight("w", (3, 5), WHOLE), mode) == [Cost(standard(3, 5), 0, 0)]


def test_duplicated_gathers_in_16_bits() -> None:
    """8 x 6 on 4 ranks: each sends its 12 elements to 3 others and does the work of the whole matrix."""
    weight = Weight("w", (8, 6), WHOLE, shards=4, shard_dim=-2)
    assert work_of(weight, "duplicated") == [Cost(standard(8, 6), 3 * 12 * 2, 1)]
    assert work_of(weight, "duplicated", tp_wire_dtype="fp32") == [Cost(standard(8, 6), 3 * 12 * 4, 1)]


def test_an_owner_and_the_others() -> None:
    """8 x 6 on 4 ranks: three send their 12 elements; the owner does the work, and sends 3 x 12 back."""
    loads = loads_of([Weight("w", (8, 6), WHOLE, shards=4, shard_dim=-2)], layout_of(4, 4))
    assert [(load.ranks, load.work["owner"]) for load in loads] == [
        (1, Cost(standard(8, 6), 3 * 12 * 2, 2)),
        (3, Cost(0, 12 * 2, 2)),
    ]


def test_both_ways_are_as_narrow_as_they_are_told() -> None:
    """The iteration's float32 is for Gram matrices: between ranks 12 elements a shard travel in 2 bytes each."""
    weight = Weight("w", (8, 6), WHOLE, shards=4, shard_dim=-2)
    work = work_of(weight, "owner", ns_dtype="fp32", tp_wire_dtype="bf16")
    assert [cost.bytes for cost in work] == [3 * 12 * 2, 12 * 2]


def test_distributed_sums_gram_matrices() -> None:
    """8 x 6 with rows on 4 ranks, 5 steps: norms and 5 triangles of 21, 2 * 3/4 of their bytes in float32."""
    by_rows = Weight("w", (8, 6), WHOLE, shards=4, shard_dim=-2)
    flops = 5 * (2 * 36 * 2 + 2 * 6**3 + 2 * 36 * 2)
    assert work_of(by_rows, "distributed") == [Cost(flops, 2 * 3 / 4 * (5 * 21 * 4 + 8), 6)]


def test_gram_exchanges_triangles() -> None:
    """4 x 8 by columns on 2 ranks, one step of float32, Gram's one segment; the one matrix has one owner.

    A norm; the triangle of 10 elements from the rank that is no owner; and the all-gather of as many from both.
    """
    weight = Weight("w", (4, 8), WHOLE, shards=2, shard_dim=-1)
    work = work_of(weight, "gram", ns_dtype="fp32", num_ns_steps=1)
    rectangular, square = 2 * (2 * 16 * 4), 2 * 4**3
    assert work == [Cost(rectangular + square, 8 + 10 * 4, 3), Cost(rectangular, 8 + 2 * 10 * 4, 3)]


def test_blockwise_exchanges_nothing() -> None:
    weight = Weight("w", (8, 6), WHOLE, shards=4, shard_dim=-2)
    assert work_of(weight, "blockwise") == [Cost(standard(2, 6), 0, 0)]


def test_blocks_of_a_fused_weight_are_matrices_of_their_own() -> None:
    """Two periods of 8 rows: q 8 x 6, k and v 4 x 6."""
    weight = Weight("w", (16, 6), QKV)
    assert work_of(weight, "auto") == [Cost(standard(8, 6) + 2 * standard(4, 6), 0, 0)]


@pytest.mark.parametrize("mode", sorted(set(MODES) - {"gram"}))
def test_heads_that_a_shard_holds_whole_are_updated_alone(mode: str) -> None:
    """Four periods of three 2 x 8 heads on 2 ranks: six heads each, nothing exchanged."""
    weight = Weight("w", (24, 8), PER_HEAD, shards=2, shard_dim=-2)
    assert work_of(weight, mode) == [Cost(6 * standard(2, 8), 0, 0)]


def test_rows_under_the_scalar_rule_cost_no_newton_schulz() -> None:
    assert work_of(Weight("w", (10, 8), GATED), "auto") == [Cost(standard(8, 8), 0, 0)]
    assert work_of(Weight("w", (10, 8), None), "auto") == [Cost()]


def test_chunks() -> None:
    """Eight 256 x 256 matrices of 1/4 MiB; two ranks share a chunk of one MiB each."""
    weights = [Weight("w", (256, 256), WHOLE, shards=2, shard_dim=-1)] * 8
    for chunk_mb, chunks in ((256.0, 1), (1.0, 1), (0.5, 2)):
        (load,) = loads_of(weights, layout_of(2, 2), chunk_mb=chunk_mb)
        assert load.work["owner"].collectives == 2 * chunks


def test_modes_that_cannot_be() -> None:
    """Two periods of 8 rows on 4 ranks; Gram Newton-Schulz in bfloat16 and in float32."""
    weights = [Weight("w", (16, 6), QKV, shards=4, shard_dim=-2), Weight("a", (6, 6), None)]
    refusals = refusals_of_stage(weights, StepPlanner(MuonConfig()))
    assert set(refusals) == {"gram", "blockwise"}
    assert "--muon-tp-mode gram" in refusals["gram"] and "--muon-ns-dtype" in refusals["gram"]
    assert "--muon-tp-mode blockwise" in refusals["blockwise"] and "4 rows on each of 4" in refusals["blockwise"]
    (load, *_) = loads_of(weights, layout_of(4, 4))
    assert set(load.work) == {"auto", "owner", "duplicated", "distributed"}
    assert set(refusals_of_stage(weights, StepPlanner(MuonConfig(ns_dtype="fp32")))) == {"blockwise"}


def test_what_auto_chooses() -> None:
    """Each data-parallel rank chooses for what it owns; experts of other ranks count, heads of other shards do."""
    layout = layout_of(8, 2, expert=2, expert_tensor=2)
    columns = {"shards": 2, "shard_dim": -1}
    weights = [
        *[Weight("a", (64, 4096), WHOLE, owners=((0, 0),), **columns)] * 4,
        *[Weight("b", (4, 4), WHOLE, owners=((1, 0),), **columns)] * 3,
        Weight("heads", (24, 8), PER_HEAD, shards=2, shard_dim=-2, owners=((3, 0),)),
        Weight("expert", (4, 4), WHOLE, routed=True, copies=2, by_expert_data=True, owners=((1, 0),), **columns),
        Weight("norm", (8,), None, owners=((0, 0), (1, 0))),
    ]
    planner = StepPlanner(MuonConfig())
    assert choices_of_stage(weights, layout, planner) == {
        ("owner", 64, 4096): 4,
        ("owner", 4, 4): 3 + 2,
        ("local", 2, 8): 12,
    }
    large = [Weight("c", (4096, 4096), WHOLE, **columns)] * 5
    assert choices_of_stage(large, layout, planner) == {("owner", 4096, 4096): 4, ("distributed", 4096, 4096): 1}


def test_equal_sets_of_weights_are_planned_once() -> None:
    planner = StepPlanner(MuonConfig())
    one, two = (Weight("w", shape, WHOLE).engine_weight for shape in ((4, 6), (6, 4)))
    assert planner.step([one, two, one]) is planner.step([two, one, one])
    assert planner.step([one, two]) is not planner.step([two, one, one])


def test_custom_coefficients() -> None:
    """Three steps of one triple."""
    options = {"coefficient_type": "custom", "custom_coefficients": ("2,-1.5,0.5",), "num_ns_steps": 3}
    assert work_of(Weight("w", (8, 8), WHOLE), "auto", **options) == [Cost(3 * (6 * 8**3), 0, 0)]


@pytest.mark.parametrize(
    ("options", "weights", "expected"),
    [
        ({}, FP32, Precision(FP32, BF16, BF16)),
        ({}, BF16, Precision(FP32, BF16, BF16)),
        ({"fp32_matmul_prec": "high"}, FP32, Precision(FP32, FP32, FP32)),
        ({"fp32_matmul_prec": "highest"}, FP64, Precision(FP64, FP64, FP64)),
        ({"ns_dtype": "fp16"}, FP32, Precision(FP32, torch.float16, BF16)),
        ({"ns_dtype": "fp16", "tp_wire_dtype": "fp32"}, FP32, Precision(FP32, torch.float16, FP32)),
        ({"ns_dtype": "fp32", "tp_wire_dtype": "bf16"}, FP64, Precision(FP64, FP32, BF16)),
        ({"ns_dtype": "fp32"}, FP64, Precision(FP64, FP32, FP64)),
    ],
)
def test_precision(options: dict[str, str], weights: torch.dtype, expected: Precision) -> None:
    assert precision_of(MuonConfig(**options), weights) == expected


@pytest.mark.parametrize("is_slow", [False, True])
@pytest.mark.parametrize("weights", [FP32, FP64, BF16])
def test_precision_is_that_of_the_optimizer(
    weights: torch.dtype, is_slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_muon.optimizers.engines.slow_bfloat16", lambda *_: "slow" if is_slow else "")
    for ns_dtype, wire, precision in itertools.product(
        ("auto", "fp32", "bf16", "fp16"), ("auto", "fp32", "bf16"), ("medium", "high", "highest")
    ):
        options = {"ns_dtype": ns_dtype, "tp_wire_dtype": wire, "fp32_matmul_prec": precision}
        engine = Muon([torch.nn.Parameter(torch.ones(4, 6, dtype=weights))], **options).prepare()
        found = Precision(engine.local_dtype, engine.orthogonalizer.dtype, engine.wire.dtype)
        assert found == precision_of(MuonConfig(**options), weights, slow_bfloat16=is_slow), options


def kept(elements: int, masters: int = 4, momentum: int = 4) -> tuple[tuple[Entry, int], ...]:
    """State of so many elements of a weight under Muon."""
    return (Entry(MASTERS, MUON), masters * elements), (Entry(MOMENTUM, MUON), momentum * elements)


@pytest.mark.parametrize(
    ("element_bytes", "gradient_bytes", "scalar_optimizer", "expected"),
    [
        (2, 4, "adam", {MASTERS: 4, SCALAR_MOMENTS: 8}),
        (4, 4, "adam", {SCALAR_MOMENTS: 8}),
        (2, 4, "lion", {MASTERS: 4, SCALAR_MOMENTS: 4}),
        (2, 2, "adam", {MASTERS: 4, SCALAR_MOMENTS: 8, COPIES: 4}),  # Megatron-Core's step makes float32 gradients
    ],
)
def test_bytes_under_the_scalar_optimizer(
    element_bytes: int, gradient_bytes: int, scalar_optimizer: str, expected: dict[str, int]
) -> None:
    """Two replicas, the second of which holds the state of 30 of 80 elements."""
    owners = ((0, 50), (1, 30))
    weight = Weight("w", (80,), None, element_bytes=element_bytes, gradient_bytes=gradient_bytes, owners=owners)
    whole = {WEIGHTS: element_bytes * 80, GRADIENTS: gradient_bytes * 80}
    for held, elements in zip(held_in_stage([weight], layout_of(2), scalar_optimizer), (50, 30), strict=True):
        found = {entry.kind: size for entry, size in Account.of(held).entries}
        assert found == whole | {kind: each * elements for kind, each in expected.items()}
        assert {entry.whose for entry in held if held[entry]} == {OTHERS}


def test_an_account_of_a_rank() -> None:
    """Activations are gone when the step's buffers are there."""
    (load,) = loads_of_stage(
        [Weight("w", (10, 8), WHOLE, state=kept(80))], layout_of(1), "adam", StepPlanner(MuonConfig()), padding=7
    )
    account, step = load.account, load.step_bytes
    assert account.total(MASTERS, MOMENTUM, whose=MUON) == load.state_bytes == 8 * 80
    assert account.total() == 14 * 80 + 7 + step and step > 0
    assert account.peak(step - 1) == account.total() == account.peak(step + 1) - 1
    host = Account.of({Entry(MOMENTUM, MUON, on_host=True): 5, Entry(STEP, MUON): 3, Entry(PADDING, MUON): 0})
    assert (host.total(), host.total(on_host=True), host.total(on_host=None)) == (3, 5, 8)
    assert [entry.kind for entry, _ in host.entries] == [MOMENTUM, STEP]


@pytest.mark.parametrize(
    ("optimizer", "options", "method", "layout", "extra"),
    [
        ("muon", {}, "adamuon", WHOLE, ""),
        ("muon", {}, "adamuon", GATED, "gates"),  # the second moment of 4 rows
        ("muon", {"scalar_optimizer": "lion"}, "adamuon", GATED, ""),
        ("muon", {"scale_mode": "spectral_norm"}, "adamuon", WHOLE, ""),
        ("muon", {"scale_mode": "moonlight_hidden"}, "adamuon", WHOLE, ""),
        ("muon", {"variant": "hyperball", "scale_mode": "none"}, "adamuon", WHOLE, "row"),
        ("adaptive_muon", {}, "adamuon", WHOLE, "full"),
        ("adaptive_muon", {}, "adamuon_eo", WHOLE, "full"),
        ("adaptive_muon", {"scale_mode": "spectral_norm"}, "normuon", WHOLE, "row"),
        ("adaptive_muon", {}, "namo", WHOLE, "row"),
        ("spectral_sphere", {}, "adamuon", WHOLE, "row row row"),
        ("stiefel_muon", {}, "adamuon", MatrixLayout("linear", direction=STIEFEL), ""),
        ("stiefel_muon", {"scale_mode": "spectral_norm"}, "adamuon", MatrixLayout("linear", direction="sign"), ""),
    ],
)
def test_what_optimizers_keep(
    optimizer: str, options: dict[str, str], method: str, layout: MatrixLayout, extra: str
) -> None:
    counter = StateCounter(optimizer, MuonConfig(**options), method)
    full, rows, gates = extra.count("full"), 1 + extra.count("row"), 32 * extra.count("gates")

    def moments(*division: int) -> int:
        found = Counter(dict(counter.bytes((20, 8), layout, *division)))
        assert found[Entry(MOMENTUM, MUON)] == 4 * 160 // (division or (1,))[0] and not found[Entry(MASTERS, MUON)]
        return found[Entry(MOMENTS, MUON)] // 4

    assert moments() == full * 160 + rows * 20 + gates
    assert moments(4, -2) == full * 40 + rows * 5 + gates // 4
    # Each of four ranks has a part of every row.
    assert moments(4, -1) == full * 40 + rows * 20 + gates // 4


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize(("dtype", "each", "scales"), [("auto", 4, 0), ("fp32", 4, 0), ("bf16", 2, 0), ("int8", 1, 4)])
@pytest.mark.parametrize("master", ["fp32", "remainder"])
def test_forms_of_momentum_and_masters(master: str, dtype: str, each: int, scales: int, element_bytes: int) -> None:
    """Of a shard of 30 rows and 300 of 600 columns: two blocks of a row, and 38 bytes of bits."""
    counter = StateCounter("muon", MuonConfig(master=master, momentum_dtype=dtype))
    found = Counter(dict(counter.bytes((30, 600), WHOLE, 2, -1, element_bytes)))
    assert found[Entry(MOMENTUM, MUON)] == 30 * (300 * each + 2 * scales)
    masters = {"fp32": 30 * 300 * 4, "remainder": 30 * (300 * 2 + 38)}[master]
    assert found[Entry(MASTERS, MUON)] == (masters if element_bytes == 2 else 0)


def test_what_is_on_the_host() -> None:
    """Momentum with its scales; with ``all`` remainders, too."""
    for offload, masters in (("momentum", False), ("all", True)):
        options = MuonConfig(master="remainder", momentum_dtype="int8", offload=offload)
        found = dict(StateCounter("muon", options).bytes((30, 300), WHOLE, element_bytes=2))
        assert found[Entry(MOMENTUM, MUON, on_host=True)] == 30 * (300 + 2 * 4)
        assert found[Entry(MASTERS, MUON, on_host=masters)] == 30 * (300 * 2 + 38)
        assert found.keys() == {Entry(MOMENTUM, MUON, True), Entry(MASTERS, MUON, masters), Entry(MOMENTS, MUON)}


def test_plain_replicas_are_alike() -> None:
    (load,) = loads_of([Weight("a", (4, 4), WHOLE, state=kept(16)), Weight("b", (4,), None)], layout_of(4))
    assert (load.ranks, load.parameter_bytes, load.state_bytes) == (4, 20 * 2, 16 * 8 + 4 * 12)
    assert load.work["duplicated"].flops == standard(4, 4)


def test_owners_do_the_work_and_hold_the_state() -> None:
    """Four ranks, tensor 2: two replicas, each on two ranks."""
    weights = [
        Weight("a", (4, 4), WHOLE, owners=((0, 16),), state=kept(16)),
        Weight("b", (2, 8), WHOLE, owners=((1, 16),), state=kept(16)),
        Weight("c", (6,), None, owners=((0, 4), (1, 2))),
    ]
    loads = loads_of(weights, layout_of(4, 2))
    assert [(load.ranks, load.state_bytes) for load in loads] == [(2, 16 * 8 + 4 * 12), (2, 16 * 8 + 2 * 12)]
    assert [load.work["duplicated"].flops for load in loads] == [standard(4, 4), standard(2, 8)]


def test_owners_in_both_groups() -> None:
    """Four ranks, tensor 2: each of two replicas owns a divided matrix, that one of its two ranks orthogonalizes."""
    weights = [Weight("a", (4, 4), WHOLE, shards=2, owners=((rank, 8),)) for rank in range(2)]
    loads = loads_of(weights, layout_of(4, 2))
    assert [(load.ranks, load.work["owner"].flops) for load in loads] == [(2, standard(4, 4)), (2, 0)]


def test_experts_have_their_own_data_parallel_group() -> None:
    """Four ranks, expert 2: four replicas of a dense weight, two of an expert; ranks 0 and 1 hold different experts."""
    weights = [
        Weight("dense", (4, 4), WHOLE, owners=((3, 16),), state=kept(16)),
        Weight("expert", (2, 8), WHOLE, routed=True, copies=2, by_expert_data=True, owners=((1, 16),), state=kept(16)),
    ]
    loads = loads_of(weights, layout_of(4, expert=2))
    assert [(load.ranks, load.state_bytes) for load in loads] == [(2, 0), (1, 16 * 8), (1, 2 * 16 * 8)]
    assert [load.work["auto"].flops for load in loads] == [0, standard(2, 8), standard(2, 8) + standard(4, 4)]


def test_experts_have_their_own_tensor_parallel_group() -> None:
    """Four tensor-parallel ranks, experts over pairs: the same rank owns the dense matrix and, in both pairs, one's."""
    weights = [
        Weight("dense", (4, 4), WHOLE, shards=4),
        Weight("expert", (2, 8), WHOLE, shards=2, routed=True, copies=2, by_expert_data=True),
    ]
    layout = layout_of(4, 4, expert=2, expert_tensor=2)
    flops = [load.work["owner"].flops for load in loads_of(weights, layout) for _ in range(load.ranks)]
    assert sorted(flops) == [0, 0, standard(2, 8), standard(2, 8) + standard(4, 4)]


def test_positions() -> None:
    layout = Layout(world=32, tensor=4, expert_tensor=2, pipeline=2, context=2, expert=4)
    assert [layout.position(rank) for rank in (0, 1, 2, 7, 15)] == [
        Position(tensor=0, data=0, expert_tensor=0, expert_data=0),
        Position(tensor=1, data=0, expert_tensor=1, expert_data=0),
        Position(tensor=2, data=0, expert_tensor=0, expert_data=0),
        Position(tensor=3, data=1, expert_tensor=1, expert_data=0),
        Position(tensor=3, data=3, expert_tensor=1, expert_data=1),
    ]


def test_buffer_shards_cut_weights() -> None:
    assert _pieces(0, 10, 10) == ((0, 10),)
    assert _pieces(8, 25, 10) == ((0, 2), (1, 10), (2, 5))
    assert _pieces(20, 30, 10) == ((2, 10),)


def test_active_parameters() -> None:
    """2 of 8 experts; the input table is looked up; the output layer is applied twice with one prediction layer."""
    weights = [
        Weight("embedding.word_embeddings.weight", (100, 4), None),
        Weight("decoder.layers.*.mlp.linear_fc1.weight", (8, 4), WHOLE),
        Weight("decoder.layers.*.mlp.experts.weight", (6, 4), WHOLE, routed=True, copies=4),
        Weight("output_layer.weight", (100, 4), None),
    ]
    assert active_parameters(weights, 2 / 8, 1) == 32 + 96 / 4 + 400
    assert active_parameters(weights, 2 / 8, 2) == 32 + 96 / 4 + 800
    tied = [weight for weight in weights if weight.name != "output_layer.weight"]
    assert active_parameters(tied, 2 / 8, 1) == 32 + 96 / 4 + 400


def test_attention() -> None:
    """2 heads of 8 over 16 positions: 8 keys on average, 2 * 8 * 8 for scores and as much for values, three times."""
    assert attention_flops(2, 8, 8, 16) == 3 * 2 * (2 * 8 * 8 + 2 * 8 * 8)


def test_sizes_of_groups() -> None:
    layout = Layout(world=2048, tensor=2, expert_tensor=1, pipeline=16, context=2, expert=64)
    assert (layout.ranks_of_stage, layout.data, layout.expert_data) == (128, 64, 2)


def test_the_sphere_orthogonalizes_several_times() -> None:
    weight = Weight("w", (8, 6), WHOLE).engine_weight
    once, ten = (StepPlanner(MuonConfig(), passes).step([weight]).cost("auto", {}) for passes in (1, 10))
    assert once == Cost(standard(8, 6), 0, 0) and ten.flops == 10 * once.flops


def test_weights_in_balls_cost_no_newton_schulz() -> None:
    layout = MatrixLayout("embedding", direction="sign")
    assert work_of(Weight("w", (10, 8), layout), "auto") == [Cost()]
