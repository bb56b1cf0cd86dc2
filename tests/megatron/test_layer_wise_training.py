"""Layer-wise runs with owners by cost resume what other owners have saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.megatron import harness
from tests.megatron.harness import Layout, Run
from tests.megatron.test_layer_wise_balance import THREE_LAYERS, names_of
from tests.megatron.test_layer_wise_lists import upstream_owners
from tests.megatron.test_routing import MOE
from tests.pool import RankPool

# As in test_layouts: float32, losses of about 4, ten times the 4e-7 by which the order of additions changes them.
TOLERANCE = 4e-6


def states(run: Run) -> dict[str, torch.Tensor]:
    """This rank's momentum, by the name of the weight."""
    names, found = names_of(run), {}
    for part in (run.optimizer, *run.optimizer.chained_optimizers):
        for inner in getattr(part, "chained_optimizers", []) or [part]:
            for param, state in getattr(getattr(inner, "optimizer", None), "state", {}).items():
                if "momentum_buffer" in state and param in names:
                    found[names[param]] = state["momentum_buffer"].clone()
    return found


def save_with_upstream_owners(layout: Layout, options: dict[str, Any], folder: str) -> tuple[dict, list[float]]:
    with upstream_owners():
        run = harness.start(layout, **options)
    run.losses(3)
    saved = states(run)
    harness.save_run(run, folder)
    return saved, run.losses(3)


def load(layout: Layout, options: dict[str, Any], folder: str) -> tuple[dict, list[float]]:
    run = harness.start(layout, **options)
    run.losses(1)  # the state that is loaded must replace what is there
    harness.load_run(run, folder)
    return states(run), run.losses(3)


@pytest.mark.parametrize(
    "param_layout,bf16",
    [
        pytest.param(True, False, id="layout"),
        pytest.param(False, True, id="older", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_of_other_owners_resumes(pool: RankPool, tmp_path: Path, param_layout: bool, bf16: bool) -> None:
    """State is saved under names: a run that Megatron-Core's assignment saved goes on, each weight with its momentum.

    The losses are equal to rounding, not to the bit: each rank sums the gradient norm of its own weights.
    """
    options = {**THREE_LAYERS, **MOE, "param_layout": param_layout, "bf16": bf16}
    folder = str(tmp_path / "checkpoint")
    saved = pool.run(save_with_upstream_owners, 2, Layout(layer_wise=True), options, folder)
    loaded = pool.run(load, 2, Layout(layer_wise=True), options, folder)
    assert saved[0][0].keys() != loaded[0][0].keys(), "weights have changed their owners"
    before = {**saved[0][0], **saved[1][0]}
    after = {**loaded[0][0], **loaded[1][0]}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loaded[0][1] == pytest.approx(saved[0][1], abs=TOLERANCE)
