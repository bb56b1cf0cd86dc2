"""``--muon-param-rule '*=steps:auto'``: measured alike at every layout, and kept in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.megatron import harness
from tests.megatron.crossing import DENSE, TOLERANCE
from tests.megatron.harness import Layout, Run
from tests.pool import RankPool

RULE = {"muon_param_rule": ("*=steps:auto", "*linear_fc2*=coefficients:simple")}
BEFORE, AFTER, STEPS = "before", "after", 4
"""Checkpoints without the first of the steps that are compared, which measures, and with it."""

Found = tuple[list[float], dict[str, int]]


def count_from(run: Run, step: int) -> None:
    """As if so many steps had been made."""
    from megatron_muon.plugin.optimizer_state import leaves

    for leaf, _ in leaves(run.optimizer):
        for group in leaf.optimizer.param_groups:
            if "step" in group:
                group["step"] = step
        for state in leaf.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"] * 0 + step


def steps_of(run: Run) -> dict[str, int]:
    """What all param groups of Muon's have; nothing else of the model says it."""
    from megatron_muon import Muon
    from megatron_muon.plugin.optimizer_state import leaves

    inner = [leaf.optimizer for leaf, _ in leaves(run.optimizer) if isinstance(leaf.optimizer, Muon)]
    found = [dict(group.get("auto_steps", ())) for each in inner for group in each.param_groups]
    assert all(each == found[0] for each in found)
    return found[0]


def trained(layout: Layout, options: dict[str, Any], folder: str) -> Found:
    from megatron_muon.optimizers.auto_steps import MEASURED_IN

    run = harness.start(layout, optimizer=RULE, early=True, **options)
    run.losses(1)
    count_from(run, MEASURED_IN - 1)
    harness.save_run(run, folder + BEFORE)
    assert steps_of(run) == {}
    losses = run.losses(1)
    harness.save_run(run, folder + AFTER)
    return losses + run.losses(STEPS - 1), steps_of(run)


def resumed(layout: Layout, options: dict[str, Any], folder: str, more: dict[str, Any]) -> list[Found]:
    """From after the measurement, and then, in the same process, from before it."""
    run = harness.start(layout, optimizer=RULE | more, early=True, **options)
    found = []
    for name, steps in ((AFTER, STEPS - 1), (BEFORE, STEPS)):
        harness.load_run(run, folder + name)
        run.step = 1 + STEPS - steps  # of the data
        assert bool(steps_of(run)) == (name == AFTER)
        found.append((run.losses(steps), steps_of(run)))
    return found


def test_resumed_at_every_layout(pool: RankPool, tmp_path: Path) -> None:
    """With the same bits at the same one."""
    folder = str(tmp_path / "run-")
    ranks, layout, options = DENSE["tp2"]
    (losses, steps), other = pool.run(trained, ranks, layout, options, folder)
    assert steps == other[1] and len(steps) == 4 and len(set(steps.values())) > 1, steps
    assert "decoder.layers.*.mlp.linear_fc2.weight (*, simple), where others take 5 of quintic in own" in steps
    for to, more in (("tp2", {}), ("pp2", {"muon_nonfinite": "propagate"}), ("dp2_layer_wise", {})):
        ranks, layout, options = DENSE[to]
        for after, before in pool.run(resumed, ranks, layout, options, folder, more):
            assert after[1] == before[1] == steps, to
            tolerance = 0.0 if to == "tp2" else TOLERANCE["float32"]
            assert before[0] == pytest.approx(losses, abs=tolerance, rel=0.0), to
            assert after[0] == pytest.approx(losses[1:], abs=tolerance, rel=0.0), to
