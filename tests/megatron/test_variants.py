"""Variants of Muon in Megatron-Core's factory: every layout trains alike, and their state is saved for every layout."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_muon import choices
from megatron_muon.errors import ConfigError
from megatron_muon.routing.layout import STIEFEL, layout_of
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.test_routing import GDN, MOE
from tests.pool import RankPool
from tests.slow import with_slow

GQA = {"num_query_groups": 2}
STEPS = 4


def adaptive(method: str) -> dict[str, Any]:
    return {"name": "adaptive_muon", "adaptive_muon_moment2_method": method}


VARIANTS: dict[str, dict[str, Any]] = {
    **{method: adaptive(method) for method in ("adamuon", "adamuon_eo", "normuon", "namo")},
    "update_norm": {"muon_scale_mode": "update_norm"},
    **{
        name: {"muon_variant": name, "muon_scale_mode": "none", "muon_extra_scale_factor": 1.0}
        for name in choices.VARIANTS
        if name != "none"
    },
    "sphere": {
        "name": "spectral_sphere",
        "muon_coefficient_type": "polar_express",
        "muon_num_ns_steps": 8,
    },
    "stiefel": {"name": "stiefel_muon", "muon_param_rule": ("*.self_attention.*.weight=stiefel",)},
}
VARIANTS["scion"] = {
    "muon_scale_mode": "unit_rms_norm",
    "muon_extra_scale_factor": 2.0,
    "muon_ball_radius": 3.0,
    "muon_param_rule": ("*word_embeddings*=row_norm", "output_layer*=sign", "*linear_fc2*=col_norm"),
    "weight_decay": 1.0,
}
VARIANTS["transfer"] = {
    "muon_transfer": "8x2",
    # The spectral norm is measured, at every layout.
    "muon_scale_mode": "spectral_norm",
    "muon_weight_decay_method": "independent_scheduled",
    "muon_extra_scale_factor": 1.0,
    "muon_eps": 0.01,
}
SAVED = ("adamuon_eo", "normuon", "namo", *choices.VARIANTS[1:], "sphere", "stiefel", "scion", "transfer")
"""Those that may have state of their own, or several rules: resumed at every layout. The others are trained from the
start."""

LAYOUTS = {
    "one": (1, Layout()),
    "tp2": (2, Layout(tp=2)),
    "pp2": (2, Layout(pp=2)),
    "dp2_layer_wise": (2, Layout(layer_wise=True)),
    "tp4, more ranks than query groups": (4, Layout(tp=4)),
}
# adamuon takes the sign of the momentum: elements that are rounding alone have one or the other at other layouts.
TOLERANCE = {"adamuon": 2e-3}


def train(layout: Layout, weights: str, optimizer: dict[str, Any]) -> list[float]:
    return harness.start(layout, weights=weights, optimizer=optimizer, early=True, **GQA).losses(STEPS)


@pytest.fixture(scope="module")
def weights(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("variants") / "initial")
    pool.run(harness.save_initial_weights, 1, folder, **GQA)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - set(SAVED)))
def test_losses_do_not_depend_on_the_layout(pool: RankPool, weights: str, name: str) -> None:
    expected = pool.run(train, 1, Layout(), weights, VARIANTS[name])[0]
    assert expected[-1] < expected[0]
    for ranks, layout in list(LAYOUTS.values())[1:]:
        found = pool.run(train, ranks, layout, weights, VARIANTS[name])[0]
        assert found == pytest.approx(expected, abs=TOLERANCE.get(name, 1e-4)), layout


EXPERTS = {**MOE, **GQA}


@pytest.fixture(scope="module")
def weights_of_experts(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("variants") / "experts")
    pool.run(harness.save_initial_weights, 1, folder, **EXPERTS)
    return folder


def train_experts(layout: Layout, weights: str, optimizer: dict[str, Any]) -> list[float]:
    return harness.start(layout, weights=weights, optimizer=optimizer, early=True, **EXPERTS).losses(STEPS)


BALLS = {
    **VARIANTS["scion"],
    "muon_param_rule": ("*.experts.*linear_fc1*=col_norm", "*.experts.*linear_fc2*=row_norm"),
}
WHOLE, DIVIDED = Layout(tp=2, etp=1, sp=True), Layout(tp=2, sp=True)
OWNED = Layout(tp=2, etp=1, sp=True, layer_wise=True)


@pytest.mark.parametrize(
    ("optimizer", "layouts"),
    [
        pytest.param(BALLS, [DIVIDED, OWNED], id="balls"),
        pytest.param(BALLS, [WHOLE], id="balls, not layer-wise", marks=pytest.mark.slow),
        *(
            pytest.param(each, [WHOLE, DIVIDED, OWNED], id=name, marks=pytest.mark.slow)
            for name, each in {
                "stiefel": {"name": "stiefel_muon", "muon_param_rule": ("*.experts.*=stiefel",)},
                "sphere": VARIANTS["sphere"],
                "normuon": VARIANTS["normuon"],
            }.items()
        ),
    ],
)
def test_experts_have_a_tensor_parallel_group_of_their_own(
    pool: RankPool, weights_of_experts: str, optimizer: dict[str, Any], layouts: list[Layout]
) -> None:
    """Whole experts where other weights are divided, and divided experts beside them."""
    expected = pool.run(train_experts, 1, Layout(), weights_of_experts, optimizer)[0]
    assert expected[-1] < expected[0]
    for layout in layouts:
        found = pool.run(train_experts, 2, layout, weights_of_experts, optimizer)[0]
        assert found == pytest.approx(expected, abs=1e-4), layout


def save(layout: Layout, weights: str, optimizer: dict[str, Any], folder: str) -> list[float]:
    run = harness.start(layout, weights=weights, optimizer=optimizer, early=True, **GQA)
    run.losses(2)
    harness.save_run(run, folder)
    return run.losses(2)


def resume(layout: Layout, optimizer: dict[str, Any], folder: str) -> list[float] | str:
    run = harness.start(layout, optimizer=optimizer, early=True, **GQA)
    try:
        harness.load_run(run, folder)
    except (ConfigError, ValueError, RuntimeError) as error:
        return str(error)
    return run.losses(2)


HARDEST = ("dp2_layer_wise", "tp4, more ranks than query groups")


@pytest.mark.parametrize(
    ("name", "layouts"),
    [
        pytest.param("sphere", HARDEST, id="sphere"),
        pytest.param("sphere", [each for each in LAYOUTS if each not in HARDEST], id="rest", marks=pytest.mark.slow),
        *(pytest.param(each, LAYOUTS, id=each, marks=pytest.mark.slow) for each in SAVED if each != "sphere"),
    ],
)
def test_state_is_saved_for_every_layout(
    pool: RankPool, weights: str, tmp_path: Path, name: str, layouts: Iterable[str]
) -> None:
    """TP 2 to TP 4 (more ranks than query groups), PP 2 and layer-wise; without its state the losses would differ."""
    folder = str(tmp_path / "checkpoint")
    expected = pool.run(save, 2, Layout(tp=2), weights, VARIANTS[name], folder)[0]
    assert pool.run(resume, 2, Layout(tp=2), VARIANTS[name], folder)[0] == expected
    for ranks, layout in (LAYOUTS[each] for each in layouts):
        assert pool.run(resume, ranks, layout, VARIANTS[name], folder)[0] == pytest.approx(expected, abs=1e-4), layout


MAMBA: dict[str, Any] = {
    "pattern": "M*-M",
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_state_dim": 16,
    "mamba_num_groups": 2,
    **GQA,
}
IN_PROJ: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gdn": ({**GDN, **GQA}, {**VARIANTS["normuon"], "muon_gdn_in_proj": "split"}),
    "mamba": (MAMBA, {**VARIANTS["sphere"], "muon_mamba_in_proj": "split"}),
}


def save_model(layout: Layout, model: dict[str, Any], optimizer: dict[str, Any], folder: str) -> list[float]:
    run = harness.start(layout, optimizer=optimizer, early=True, **model)
    run.losses(2)
    harness.save_run(run, folder)
    return run.losses(2)


def resume_model(layout: Layout, model: dict[str, Any], optimizer: dict[str, Any], folder: str) -> list[float]:
    run = harness.start(layout, optimizer=optimizer, early=True, **model)
    harness.load_run(run, folder)
    return run.losses(2)


@pytest.mark.parametrize("kind", with_slow(IN_PROJ, "mamba"))
def test_numbers_of_rows_of_input_projections_are_saved(pool: RankPool, tmp_path: Path, kind: str) -> None:
    """Models save these weights in blocks of rows, by functions that look at the weight's shape."""
    folder = str(tmp_path / "checkpoint")
    model, optimizer = IN_PROJ[kind]
    expected = pool.run(save_model, 2, Layout(tp=2), model, optimizer, folder)[0]
    assert pool.run(resume_model, 2, Layout(tp=2), model, optimizer, folder)[0] == expected
    for ranks, layout in ((1, Layout()), (2, Layout(pp=2))):
        found = pool.run(resume_model, ranks, layout, model, optimizer, folder)[0]
        assert found == pytest.approx(expected, abs=1e-4), layout


def norms_after_resume(optimizer: dict[str, Any], folder: str, heads: int) -> tuple[list[float], list[float]]:
    """Of each of so many parts of a qkv weight, as loaded, and after a step that hardly moves it."""
    run = harness.start(Layout(), optimizer={**optimizer, "lr": 1e-8, "min_lr": 1e-8}, early=True, **GQA)
    harness.load_run(run, folder)
    named = dict(run.chunks[0].named_parameters())
    weight = named["module.decoder.layers.0.self_attention.linear_qkv.weight"]
    found = []
    for _ in range(2):
        found.append([part.norm().item() for part in weight.detach().chunk(heads)])
        run.losses(1)
    return found[0], found[1]


@pytest.mark.parametrize("name", with_slow(["hyperball", "sphere"], "hyperball"))
def test_another_split_does_not_inherit_radii(pool: RankPool, weights: str, tmp_path: Path, name: str) -> None:
    """Saved with q, k and v over all heads; then each head keeps its own norm, not that of all together."""
    folder, heads = str(tmp_path / "checkpoint"), 8
    radius = {"muon_sphere_radius": 0.0} if name == "sphere" else {}
    pool.run(save, 1, Layout(), weights, {**VARIANTS[name], **radius}, folder)
    for split in ("per_head", "whole"):
        changes = {**VARIANTS[name], **radius, "muon_qkv": split, "muon_ckpt_changes": "accept"}
        before, after = pool.run(norms_after_resume, 1, changes, folder, heads)[0]
        assert after == pytest.approx(before, rel=5e-3), split


def test_state_of_another_variant_is_refused(pool: RankPool, weights: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    pool.run(save, 1, Layout(), weights, VARIANTS["normuon"], folder)
    message = pool.run(resume, 1, Layout(), VARIANTS["adamuon_eo"], folder)[0]
    assert isinstance(message, str) and "normuon" in message and "adamuon_eo" in message
    accepted = {**VARIANTS["adamuon_eo"], "muon_ckpt_changes": "accept"}
    assert isinstance(pool.run(resume, 1, Layout(), accepted, folder)[0], list)


def test_a_measured_norm_starts_anew_where_it_was_not_measured(pool: RankPool, weights: str, tmp_path: Path) -> None:
    """Its singular vectors are found again in a few steps: no reason to refuse a checkpoint, and momentum is kept."""
    folder = str(tmp_path / "checkpoint")
    pool.run(save, 1, Layout(), weights, {"muon_scale_mode": "unit_rms_norm"}, folder)
    losses = pool.run(resume, 1, Layout(), {"muon_scale_mode": "spectral_norm"}, folder)[0]
    assert isinstance(losses, list), losses


def wrong_method() -> str:
    try:
        harness.start(Layout(), optimizer=adaptive("adam"), **GQA)
    except ConfigError as error:
        return str(error)
    return ""


def test_unknown_method(pool: RankPool) -> None:
    assert pool.run(wrong_method, 1)[0].startswith("--adaptive-muon-moment2-method adam: choose one of adamuon")


def start_stiefel(layout: Layout, changes: dict[str, Any]) -> str | int:
    """The refusal; or how many weights of this rank are on the manifold."""
    try:
        run = harness.start(layout, optimizer={"name": "stiefel_muon", **changes}, **GQA)
    except ConfigError as error:
        return str(error)
    params = [param for chunk in run.chunks for param in chunk.parameters()]
    return sum(layout_of(param).direction == STIEFEL for param in params)


def test_stiefel_muon_without_weights_for_it_stops_every_rank(pool: RankPool) -> None:
    for message in pool.run(start_stiefel, 2, Layout(pp=2), {}):
        assert isinstance(message, str) and "without a weight on the Stiefel manifold" in message
        assert "--muon-param-rule '*.linear_qkv.weight=stiefel'" in message


def test_stages_without_such_weights_are_fine(pool: RankPool) -> None:
    rule = {"muon_param_rule": ("decoder.layers.0.*.linear_qkv.weight=stiefel",)}
    assert pool.run(start_stiefel, 2, Layout(pp=2), rule) == [1, 0]


def test_lion_is_refused(pool: RankPool) -> None:
    changes = {**VARIANTS["stiefel"], "muon_scalar_optimizer": "lion"}
    message = str(pool.run(start_stiefel, 1, Layout(), changes)[0])
    assert message.startswith("--muon-scalar-optimizer lion with --optimizer stiefel_muon")


def upstream_step() -> str:
    """Megatron-Core's own adaptive Muon, with the released emerging-optimizers."""
    import megatron_muon

    megatron_muon.uninstall()
    try:
        run = harness.start(Layout(), optimizer=adaptive("normuon"), install=False, **GQA)
        run.losses(1)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        torch.set_float32_matmul_precision("highest")
    return ""


def test_why_megatrons_own_is_replaced(pool: RankPool) -> None:
    assert pool.run(upstream_step, 1)[0].endswith("'TensorParallelAdaptiveMuon' object has no attribute 'scale_mode'")
