"""Variants of Muon in Megatron-Core's factory: every layout trains alike, and their state is saved for every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_muon.errors import ConfigError
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.pool import RankPool

GQA = {"num_query_groups": 2}
STEPS = 4


def adaptive(method: str) -> dict[str, Any]:
    return {"name": "adaptive_muon", "adaptive_muon_moment2_method": method}


VARIANTS: dict[str, dict[str, Any]] = {
    **{method: adaptive(method) for method in ("adamuon", "adamuon_eo", "normuon", "namo")},
    "update_norm": {"muon_scale_mode": "update_norm"},
    "polargrad": {"muon_variant": "polargrad", "muon_scale_mode": "none", "muon_extra_scale_factor": 1.0},
    "hyperball": {"muon_variant": "hyperball", "muon_scale_mode": "none"},
    "sphere": {
        "name": "spectral_sphere",
        "muon_coefficient_type": "polar_express",
        "muon_num_ns_steps": 8,
        "muon_sphere_tolerance": 0.1,
    },
}
LAYOUTS = {
    "tp2": (2, Layout(tp=2)),
    "pp2": (2, Layout(pp=2)),
    "dp2_layer_wise": (2, Layout(layer_wise=True)),
    "tp4, more ranks than query groups": (4, Layout(tp=4)),
}
# adamuon takes the sign of the momentum: elements that are rounding alone have one or the other at other layouts.
TOLERANCE = {"adamuon": 2e-3}


def train(layout: Layout, weights: str, optimizer: dict[str, Any]) -> list[float]:
    return harness.start(layout, weights=weights, optimizer=optimizer, **GQA).losses(STEPS)


@pytest.fixture(scope="module")
def weights(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("variants") / "initial")
    pool.run(harness.save_initial_weights, 1, folder, **GQA)
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_do_not_depend_on_the_layout(pool: RankPool, weights: str, name: str) -> None:
    expected = pool.run(train, 1, Layout(), weights, VARIANTS[name])[0]
    assert expected[-1] < expected[0]
    for ranks, layout in LAYOUTS.values():
        found = pool.run(train, ranks, layout, weights, VARIANTS[name])[0]
        assert found == pytest.approx(expected, abs=TOLERANCE.get(name, 1e-4)), layout


def save(layout: Layout, weights: str, optimizer: dict[str, Any], folder: str) -> list[float]:
    run = harness.start(layout, weights=weights, optimizer=optimizer, **GQA)
    run.losses(2)
    harness.save_run(run, folder)
    return run.losses(2)


def resume(layout: Layout, optimizer: dict[str, Any], folder: str) -> list[float] | str:
    run = harness.start(layout, optimizer=optimizer, **GQA)
    try:
        harness.load_run(run, folder)
    except (ConfigError, ValueError, RuntimeError) as error:
        return str(error)
    return run.losses(2)


@pytest.mark.parametrize("name", ["adamuon_eo", "normuon", "namo", "hyperball", "sphere"])
def test_state_is_saved_for_every_layout(pool: RankPool, weights: str, tmp_path: Path, name: str) -> None:
    """TP 2 to TP 4 (more ranks than query groups), PP 2 and layer-wise; without its state the losses would differ."""
    folder = str(tmp_path / "checkpoint")
    expected = pool.run(save, 2, Layout(tp=2), weights, VARIANTS[name], folder)[0]
    assert pool.run(resume, 2, Layout(tp=2), VARIANTS[name], folder)[0] == expected
    for ranks, layout in LAYOUTS.values():
        assert pool.run(resume, ranks, layout, VARIANTS[name], folder)[0] == pytest.approx(expected, abs=1e-4), layout


def test_state_of_another_variant_is_refused(pool: RankPool, weights: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    pool.run(save, 1, Layout(), weights, VARIANTS["normuon"], folder)
    message = pool.run(resume, 1, Layout(), VARIANTS["adamuon_eo"], folder)[0]
    assert isinstance(message, str) and "normuon" in message and "adamuon_eo" in message
    accepted = {**VARIANTS["adamuon_eo"], "muon_ckpt_changes": "accept"}
    assert isinstance(pool.run(resume, 1, Layout(), accepted, folder)[0], list)


def wrong_method() -> str:
    try:
        harness.start(Layout(), optimizer=adaptive("adam"), **GQA)
    except ConfigError as error:
        return str(error)
    return ""


def test_unknown_method(pool: RankPool) -> None:
    assert pool.run(wrong_method, 1)[0].startswith("--adaptive-muon-moment2-method adam: choose one of adamuon")


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
    assert pool.run(upstream_step, 1)[0] != ""
