"""One model, many parallel layouts: the same losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.test_routing import GDN, MLA, MOE
from tests.pool import RankPool
from tests.slow import with_slow

STEPS = 20
# float32 everywhere. Layouts add the same numbers in another order (tensor-parallel partial sums, gradient averages),
# which changes losses of about 4 by up to 4e-7 (measured, over all layouts and steps); ten times that is allowed.
TOLERANCE = 4e-6


@pytest.fixture(scope="module")
def weights(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("weights") / "initial")
    pool.run(harness.save_initial_weights, 1, folder)
    return folder


@pytest.fixture(scope="module")
def reference(pool: RankPool, weights: str) -> list[float]:
    return pool.run(train, 1, Layout(), weights)[0]


def train(layout: Layout, weights: str, steps: int = STEPS, **options: Any) -> list[float]:
    return harness.start(layout, weights=weights, **options).losses(steps)


LAYOUTS = {
    "tp2": (2, Layout(tp=2)),
    "tp2_sp": (2, Layout(tp=2, sp=True)),
    "pp2": (2, Layout(pp=2)),
    "pp2_vpp2": (2, Layout(pp=2, vpp=2)),
    "dp2": (2, Layout()),
    "tp2_pp2": (4, Layout(tp=2, pp=2)),
    "dp2_layer_wise": (2, Layout(layer_wise=True)),
    "tp2_dp2_layer_wise": (4, Layout(tp=2, layer_wise=True)),
    "tp4_more_ranks_than_query_groups": (4, Layout(tp=4)),
}


@pytest.mark.parametrize("name", with_slow(LAYOUTS, "pp2", "dp2_layer_wise"))
def test_losses_do_not_depend_on_the_layout(pool: RankPool, weights: str, reference: list[float], name: str) -> None:
    world_size, layout = LAYOUTS[name]
    losses = pool.run(train, world_size, layout, weights)
    assert all(rank == losses[0] for rank in losses)
    assert losses[0] == pytest.approx(reference, abs=TOLERANCE)
    assert reference[-1] < 0.8 * reference[0], "the model must have learnt something for this to mean anything"


# Adam divides gradients by their size, also those that are rounding alone. At the harness's learning rate of 0.01 that
# grows to 6e-6 in eight steps of this model, at 0.003 to 8e-7.
HYBRID = {**GDN, "optimizer": {"lr": 0.003, "min_lr": 0.003}}
MODELS = {
    "moe_ep2": (2, Layout(ep=2), MOE),
    "moe_tp2_ep2": (4, Layout(tp=2, ep=2, etp=1, sp=True), MOE),
    "moe_dp2_layer_wise": (2, Layout(layer_wise=True), MOE),
    "mla_tp2": (2, Layout(tp=2), MLA),
    "gated_delta_net_tp2": (2, Layout(tp=2), HYBRID),
    "gated_delta_net_dp2_layer_wise": (2, Layout(layer_wise=True), HYBRID),
}
FEWER_STEPS = 8


@pytest.mark.parametrize(
    "name", with_slow(MODELS, "moe_tp2_ep2", "moe_dp2_layer_wise", "gated_delta_net_dp2_layer_wise")
)
def test_other_models(pool: RankPool, tmp_path: Path, name: str) -> None:
    """Experts, latent attention and GatedDeltaNet hybrids, each against one process."""
    world_size, layout, model = MODELS[name]
    folder = str(tmp_path / "initial")
    pool.run(harness.save_initial_weights, 1, folder, **{key: model[key] for key in model if key != "optimizer"})
    expected = pool.run(train, 1, Layout(), folder, FEWER_STEPS, **model)[0]
    losses = pool.run(train, world_size, layout, folder, FEWER_STEPS, **model)[0]
    assert losses == pytest.approx(expected, abs=TOLERANCE)
    assert expected[-1] < expected[0]
