"""One model, many parallel layouts: the same losses."""

from __future__ import annotations

from typing import Any

import pytest

from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.pool import RankPool

STEPS = 20
# float32 everywhere. Layouts add the same numbers in another order (tensor-parallel partial sums, gradient averages):
# relative differences of 1e-7 in a step, which 20 steps of Newton-Schulz with slope 490 at 0 amplify.
TOLERANCE = 2e-4


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


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_do_not_depend_on_the_layout(pool: RankPool, weights: str, reference: list[float], name: str) -> None:
    world_size, layout = LAYOUTS[name]
    losses = pool.run(train, world_size, layout, weights)
    assert all(rank == losses[0] for rank in losses)
    assert losses[0] == pytest.approx(reference, abs=TOLERANCE)
    assert reference[-1] < 0.8 * reference[0], "the model must have learnt something for this to mean anything"
