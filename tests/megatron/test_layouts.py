"""One model, many parallel layouts: the losses and norms of one process, and in each step equal bits in all replicas.

All run as the harness does by default: weights in TransformerEngine's order, several buckets, and exchanges that are
under way during the passes. The harness compares replicas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.test_routing import GDN, MLA, MOE
from tests.pool import RankPool
from tests.slow import with_slow

STEPS = 5
# Adam divides gradients by their size, also those that are rounding alone. At the harness's learning rate of 0.01 that
# grows to 6e-6 in eight steps of GatedDeltaNet, at 0.003 to 8e-7.
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "moe": MOE,
    "mla": MLA,
    "gated_delta_net": {**GDN, "optimizer": {"lr": 0.003, "min_lr": 0.003}},
}


class Tolerance(NamedTuple):
    """How far layouts may be from one process: absolute of losses (of about 4), relative of the norms of gradients."""

    losses: float
    norms: float


# Layouts add the same numbers in another order (tensor-parallel partial sums, gradient averages). Measured over all
# cases: float32 losses 4.8e-7 (GatedDeltaNet 1.7e-6), norms 9.8e-7 (GatedDeltaNet 2.0e-5); bfloat16, which routes a
# token to another expert now and then, losses 1.2e-2, norms 2.6e-2 (dense models 3.2e-3 and 5.6e-3).
FP32, BF16 = Tolerance(losses=4e-6, norms=1e-5), Tolerance(losses=4e-2, norms=8e-2)
DELTA = Tolerance(losses=1e-5, norms=2e-4)


class Case(NamedTuple):
    """A run: on how many ranks, and what of it is not as one process has it."""

    ranks: int
    layout: Layout
    model: str = "dense"
    bf16: bool = False
    param_layout: bool = True


class Trained(NamedTuple):
    losses: list[float]
    norms: list[float]


# Two replicas of each, so that layer-wise runs have something to share.
SHAPES = {
    "dp2": (2, {}, "dense"),
    "tp2_dp2": (4, {"tp": 2}, "dense"),
    "tp2_sp_dp2": (4, {"tp": 2, "sp": True}, "dense"),
    "pp2_dp2": (4, {"pp": 2}, "dense"),
    "pp2_vpp2_dp2": (4, {"pp": 2, "vpp": 2}, "dense"),
    "cp2_dp2": (4, {"cp": 2}, "dense"),
    "moe_dp2": (2, {}, "moe"),
    "moe_ep2_dp2": (4, {"ep": 2}, "moe"),
    "moe_experts_whole": (4, {"tp": 2, "etp": 1, "sp": True}, "moe"),
}
WAYS = {"plain": (False, True), "layer_wise": (True, True), "lists": (True, False)}
CASES = {
    f"{shape}-{way}-{'bf16' if bf16 else 'fp32'}": Case(
        ranks, Layout(layer_wise=layer_wise, **sizes), model, bf16, param_layout
    )
    for shape, (ranks, sizes, model) in SHAPES.items()
    for way, (layer_wise, param_layout) in WAYS.items()
    for bf16 in (False, True)
} | {
    "tp2": Case(2, Layout(tp=2)),
    "tp2_sp": Case(2, Layout(tp=2, sp=True)),
    "pp2": Case(2, Layout(pp=2)),
    "pp2_vpp2": Case(2, Layout(pp=2, vpp=2)),
    "tp2_pp2": Case(4, Layout(tp=2, pp=2)),
    "dp4_layer_wise": Case(4, Layout(layer_wise=True)),
    "tp4_more_ranks_than_query_groups": Case(4, Layout(tp=4)),
    "moe_tp2_ep2": Case(4, Layout(tp=2, ep=2, etp=1, sp=True), "moe"),
    "mla_tp2": Case(2, Layout(tp=2), "mla"),
    "mla_dp2_layer_wise": Case(2, Layout(layer_wise=True), "mla"),
    "gated_delta_net_tp2": Case(2, Layout(tp=2), "gated_delta_net"),
    "gated_delta_net_dp2_layer_wise": Case(2, Layout(layer_wise=True), "gated_delta_net"),
    # Megatron-Core's own modules, one bucket, every exchange by itself.
    "local_layer_wise": Case(2, Layout(layer_wise=True, overlap=False, local=True)),
    "no_overlap_layer_wise": Case(2, Layout(layer_wise=True, overlap=False)),
    "no_overlap_vpp2_layer_wise": Case(4, Layout(pp=2, vpp=2, layer_wise=True, overlap=False)),
}
QUICK = {
    *("pp2_vpp2_dp2-layer_wise-fp32", "tp2_sp_dp2-layer_wise-bf16", "dp2-lists-bf16"),
    *("moe_ep2_dp2-layer_wise-fp32", "dp2-plain-fp32"),
    *("tp4_more_ranks_than_query_groups", "mla_tp2", "gated_delta_net_tp2", "local_layer_wise"),
}


def train(layout: Layout, weights: str, **options: Any) -> Trained:
    run = harness.start(layout, weights=weights, **options)
    return Trained(run.losses(STEPS), run.gradient_norms)


@pytest.fixture(scope="module")
def reference(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], tuple[str, Trained]]:
    """Initial weights of a model, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("weights")
    found: dict[tuple[str, bool], Trained] = {}

    def of(model: str, bf16: bool) -> tuple[str, Trained]:
        options, weights = MODELS[model], folder / model
        if not weights.exists():
            build = {key: options[key] for key in options if key != "optimizer"}
            pool.run(harness.save_initial_weights, 1, str(weights), **build)
        if (model, bf16) not in found:
            found[model, bf16] = pool.run(train, 1, Layout(), str(weights), bf16=bf16, **options)[0]
        return str(weights), found[model, bf16]

    return of


@pytest.mark.parametrize("name", with_slow(CASES, *(CASES.keys() - QUICK)))
def test_training_does_not_depend_on_the_layout(
    pool: RankPool, reference: Callable[[str, bool], tuple[str, Trained]], name: str
) -> None:
    case = CASES[name]
    tolerance = BF16 if case.bf16 else DELTA if case.model == "gated_delta_net" else FP32
    weights, expected = reference(case.model, case.bf16)
    options = {**MODELS[case.model], "bf16": case.bf16, "param_layout": case.param_layout}
    ranks = pool.run(train, case.ranks, case.layout, weights, **options)
    assert all(rank.losses == ranks[0].losses for rank in ranks)
    assert ranks[0].losses == pytest.approx(expected.losses, abs=tolerance.losses)
    # Neither Muon nor Adam depends on the scale of gradients, so that a wrong one would show here only.
    assert ranks[0].norms == pytest.approx(expected.norms, rel=tolerance.norms)
    assert expected.losses[-1] < 0.9 * expected.losses[0], "the model must have learnt something for this to mean much"
