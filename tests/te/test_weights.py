"""How TransformerEngine's modules mark their weights under tensor parallelism, which routing and updates rely on.

A failure here after a change of versions says that upstream has changed, not that this package has.
"""

from __future__ import annotations

import pytest

from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.pool import RankPool
from tests.te import models, needs_transformer_engine
from tests.te.models import Weight

pytestmark = needs_transformer_engine

CUT = {"tensor_model_parallel": True}
REPLICA = {"tensor_model_parallel": False, "partition_dim": 0}
"""A duplicated weight carries the ``partition_dim`` of a cut one."""
ROWS = {**CUT, "partition_dim": 0, "partition_stride": 1}
COLUMNS = {**CUT, "partition_dim": 1, "partition_stride": 1}
GATE_AND_UP = {**CUT, "partition_dim": 0, "partition_stride": 2}

ATTENTION = "decoder.layers.0.self_attention."
MLP = "decoder.layers.0.mlp."
SP = Layout(tp=2, sp=True)

EXPECTED = [
    ("dense", Layout(tp=2), ATTENTION + "linear_qkv.weight", "TELayerNormColumnParallelLinear", (32, 32), ROWS),
    ("dense", Layout(tp=2), ATTENTION + "linear_proj.weight", "TERowParallelLinear", (32, 16), COLUMNS),
    ("dense", Layout(tp=2), MLP + "linear_fc1.weight", "TELayerNormColumnParallelLinear", (48, 32), GATE_AND_UP),
    ("moe", SP, MLP + "experts.linear_fc1.weight3", "TEColumnParallelGroupedLinear", (24, 32), ROWS),
    ("moe", SP, MLP + "experts.linear_fc2.weight3", "TERowParallelGroupedLinear", (32, 12), COLUMNS),
    ("moe", SP, MLP + "shared_experts.linear_fc1.weight", "TEColumnParallelLinear", (16, 32), GATE_AND_UP),
    ("moe", SP, MLP + "router.weight", "TopKRouter", (4, 32), {"tensor_model_parallel": None}),
    ("moe_sequential", SP, MLP + "experts.local_experts.3.linear_fc1.weight", "TEColumnParallelLinear", (24, 32), ROWS),
    ("moe_latent", SP, MLP + "fc1_latent_proj.weight", "TELinear", (16, 32), REPLICA),
    ("mla", Layout(tp=2), ATTENTION + "linear_q_down_proj.weight", "TELinear", (16, 32), REPLICA),
    ("mla", Layout(tp=2), ATTENTION + "linear_kv_down_proj.weight", "TELinear", (20, 32), REPLICA),
    (
        "mla_fused_down",
        Layout(tp=2),
        ATTENTION + "linear_qkv_down_proj.weight",
        "TELayerNormColumnParallelLinear",
        (18, 32),
        ROWS,
    ),
    ("hybrid", Layout(tp=2), ATTENTION + "in_proj.weight", "TELayerNormColumnParallelLinear", (52, 32), ROWS),
    ("mtp", Layout(tp=2), "mtp.layers.0.eh_proj.weight", "TEColumnParallelLinear", (16, 64), ROWS),
    ("dsa", SP, ATTENTION + "core_attention.indexer.linear_wk.weight", "TELinear", (8, 32), REPLICA),
]


@pytest.mark.parametrize(
    ("model", "layout", "name", "owner", "shape", "attributes"),
    EXPECTED,
    ids=[f"{model}-{name.removesuffix('.weight').rpartition('.')[2]}" for model, _, name, *_ in EXPECTED],
)
def test_marks(
    pool: RankPool,
    model: str,
    layout: Layout,
    name: str,
    owner: str,
    shape: tuple[int, ...],
    attributes: dict[str, object],
) -> None:
    for weights in pool.run(models.weights, 2, layout, model):
        weight = _find(weights, name)
        assert (weight.owner, weight.shape) == (owner, shape)
        assert {key: getattr(weight, key) for key in attributes} == attributes


def test_experts_leave_the_dense_data_parallel_group_with_their_own_tensor_parallel_size(pool: RankPool) -> None:
    weights = pool.run(models.weights, 2, Layout(tp=2, etp=1, sp=True), "moe")[0]
    expert, shared = (
        _find(weights, MLP + name) for name in ("experts.linear_fc1.weight0", "shared_experts.linear_fc1.weight")
    )
    assert (expert.shape, expert.allreduce, expert.tensor_model_parallel) == ((48, 32), False, True)
    assert (shared.shape, shared.allreduce) == ((16, 32), True)


def test_experts_in_one_weight_count_dimensions_of_one_matrix(pool: RankPool) -> None:
    """``partition_dim`` 0 and 1 of a weight (experts, rows, columns) mean its rows and columns."""
    weights = pool.run(models.weights, 2, Layout(tp=2, etp=1, sp=True), "moe_single_weight")[0]
    fc1, fc2 = (_find(weights, f"{MLP}experts.linear_fc{i}.weight") for i in (1, 2))
    assert (fc1.shape, fc1.partition_dim) == ((4, 48, 32), 0)
    assert (fc2.shape, fc2.partition_dim) == ((4, 32, 24), 1)


def names_in_the_harness(model: str) -> list[str]:
    Layout().initialize()
    build = harness.build_model(Layout(), num_layers=2, **models.MODELS[model])
    return [name for name, param in build[0].named_parameters() if param.requires_grad]


@pytest.mark.parametrize("model", ["dense", "moe_sequential", "mla", "mla_without_q_lora", "mla_fused_down", "hybrid"])
def test_the_harness_has_these_weights_in_this_order(pool: RankPool, model: str) -> None:
    """By order, DDP puts weights into buckets."""
    expected = [weight.name for weight in pool.run(models.weights, 1, Layout(), model)[0]]
    assert pool.run(names_in_the_harness, 1, model)[0] == expected


def _find(weights: list[Weight], name: str) -> Weight:
    found = {weight.name: weight for weight in weights}
    assert name in found, f"{name} is not one of {sorted(found)}"
    return found[name]
