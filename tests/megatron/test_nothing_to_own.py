"""Ranks that have nothing to own: frozen stages, fewer matrices than ranks, chunks of virtual stages without any."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from tests.megatron import harness
from tests.megatron.harness import Layout, Run
from tests.megatron.test_routing import MOE
from tests.pool import RankError, RankPool

# Float32, losses of about 4: ten times the 6e-7 (measured, over all cases) that layouts change them.
TOLERANCE = 6e-6


def start(
    layout: Layout,
    trained: list[str],
    weights: str,
    *,
    bf16: bool = False,
    param_layout: bool = True,
    optimizer: dict[str, Any] | None = None,
    **model: Any,
) -> Run:
    """As ``harness.start``; weights are frozen whose names, of the whole model, match none of ``trained``."""
    import megatron_muon
    from megatron_muon.routing import global_names

    megatron_muon.install()
    layout.initialize()
    from megatron.core.optimizer import get_megatron_optimizer

    chunks = harness.build_model(layout, bf16=bf16, **model)
    for chunk in chunks:
        for name, param in global_names(chunk):
            param.requires_grad_(any(fnmatch(name, pattern) for pattern in trained))
    chunks = harness.wrap(chunks, layout, param_layout=param_layout)
    harness.load_weights(chunks, weights)
    config = harness.optimizer_config(layout, bf16=bf16, **(optimizer or {}))
    return Run(layout, chunks, get_megatron_optimizer(config, chunks))


def train(cases: list[tuple[Layout, list[str], dict[str, Any]]], weights: str, folder: str = "") -> list[list[float]]:
    """Runs on a rank: four losses of each case, saved after two."""
    found = []
    for number, (layout, trained, options) in enumerate(cases):
        run = start(layout, trained, weights, **options)
        losses = run.losses(2)
        if folder:
            harness.save_run(run, f"{folder}-{number}")
        found.append(losses + run.losses(2))
    return found


def resume(cases: list[tuple[Layout, list[str], dict[str, Any]]], weights: str, folder: str) -> list[list[float]]:
    """Runs on a rank: two losses after what :func:`train` saved."""
    found = []
    for number, (layout, trained, options) in enumerate(cases):
        run = start(layout, trained, weights, **options)
        run.losses(1)  # the state that is loaded must replace what is there
        harness.load_run(run, f"{folder}-{number}")
        found.append(run.losses(2))
    return found


FIRST, LAST = ["decoder.layers.[01].*"], ["decoder.layers.[23].*", "output_layer.*"]
STAGES, VIRTUAL = Layout(pp=2), Layout(pp=2, vpp=2)
SOME_EXPERTS = {**MOE, "moe_layer_freq": [1, 1, 0, 0]}
CASES: dict[str, tuple[list[str], Layout, dict[str, Any]]] = {
    "frozen first stage": (LAST, STAGES, {}),
    "frozen last stage": (FIRST, STAGES, {}),
    "no matrices on the last stage": ([*FIRST, "*layer*norm*", "output_layer.*"], STAGES, {}),
    "no matrices on the first stage": ([*LAST, "*layer*norm*", "embedding.*"], STAGES, {}),
    "one stage Adam's, one Muon's": (["embedding.*", "*.layers.3.*linear*"], STAGES, {}),
    "one matrix": (["*.layers.3.mlp.linear_fc1*"], Layout(), {}),
    "three matrices": (
        ["*.layers.[013].mlp.linear_fc1*", "*.layers.0.*linear_qkv.layer_norm*"],
        Layout(),
        {},
    ),
    "frozen chunk": (["*.layers.2.*", "*.layers.3.*"], VIRTUAL, {}),
    "chunk without matrices": (["*.layers.2.*", "*layer*norm*"], VIRTUAL, {}),
    "experts on the first stage only": (["*.experts.*", "embedding.*"], STAGES, SOME_EXPERTS),
    "no matrices at all": (["*layer*norm*", "embedding.*", "output_layer.*"], STAGES, {}),
}
"""What is trained, the layout on four ranks, the model."""
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "layout": ({"layer_wise": True, "overlap": False}, {}),
    "lists": ({"layer_wise": True, "overlap": False}, {"param_layout": False}),
    "layout, overlap": ({"layer_wise": True}, {}),
    "lists, overlap": ({"layer_wise": True}, {"param_layout": False}),
}
"""Changes to the layout, options of :func:`start`."""
QUICK = {"frozen first stage": ("lists",), "no matrices at all": ("layout",)}


@pytest.mark.parametrize("name", QUICK)
def test_training_is_that_of_one_process(pool: RankPool, tmp_path: Path, name: str) -> None:
    trained, _, model = CASES[name]
    weights = str(tmp_path / "initial")
    pool.run(harness.save_initial_weights, 1, weights, **model)
    (expected,) = pool.run(train, 1, [(Layout(), trained, model)], weights)[0]
    for losses in pool.run(train, 4, cases_of(name, QUICK[name], (False,)), weights)[0]:
        assert losses == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_training_in_all_forms_goes_on_from_a_checkpoint(pool: RankPool, tmp_path: Path, name: str) -> None:
    """At half as many replicas. Of bfloat16 nothing but that it runs is known exactly."""
    trained, _, model = CASES[name]
    weights, folder = str(tmp_path / "initial"), str(tmp_path / "checkpoint")
    pool.run(harness.save_initial_weights, 1, weights, **model)
    (expected,) = pool.run(train, 1, [(Layout(), trained, model)], weights)[0]
    cases = cases_of(name, FORMS, (False, True))
    losses = pool.run(train, 4, cases, weights, folder)[0]
    resumed = pool.run(resume, 2, cases, weights, folder)[0]
    for case, found, after in zip(cases, losses, resumed, strict=True):
        # bfloat16 changes these losses by 2e-3 at most (measured).
        tolerance = 5e-3 if case[2]["bf16"] else TOLERANCE
        assert found == pytest.approx(expected, abs=tolerance), case
        assert after == pytest.approx(found[2:], abs=tolerance), case


def cases_of(
    name: str, forms: Iterable[str], types: tuple[bool, ...]
) -> list[tuple[Layout, list[str], dict[str, Any]]]:
    """Arguments of :func:`start`: one of ``CASES`` in some forms, in float32 (False) or bfloat16 (True)."""
    trained, layout, model = CASES[name]
    return [
        (replace(layout, **changes), trained, {**model, **options, "bf16": bf16})
        for changes, options in (FORMS[form] for form in forms)
        for bf16 in types
    ]


def test_a_frozen_model_is_refused_on_all_ranks(pool: RankPool, tmp_path: Path) -> None:
    weights = str(tmp_path / "initial")
    pool.run(harness.save_initial_weights, 1, weights)
    with pytest.raises(RankError, match="--optimizer muon has nothing to train: no weight of the model, on any rank"):
        pool.run(train, 2, [(Layout(pp=2), [], {})], weights)
