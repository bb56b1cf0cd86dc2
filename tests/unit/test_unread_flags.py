"""Flags that the optimizer of a run does not read are refused: one that is ignored is one that somebody relies on."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_muon import MuonConfig, choices
from megatron_muon.config import UNREAD, flag
from tests.unit.test_refusals import ARGUMENTS, messages


@pytest.mark.parametrize("knob", MuonConfig.__dataclass_fields__.values(), ids=lambda knob: knob.name)
def test_a_flag_is_refused_with_optimizers_that_do_not_read_it(knob: Any) -> None:
    """One rule for all: a flag that is ignored is one that somebody relies on."""
    name = f"muon_{knob.name}"
    other = {bool: not knob.default, int: 7, float: 0.125, str: "other", tuple: ("*=adam",)}[type(knob.default)]
    readers = knob.metadata["readers"]
    for optimizer in (*choices.OPTIMIZERS, "dist_muon", "adam", "soap", "lion", "sgd"):
        found = messages(UNREAD, {**ARGUMENTS, "optimizer": optimizer, name: other})
        if not readers or optimizer.removeprefix("dist_") in readers:
            assert found == []
        else:
            (message,) = found
            shown = "*=adam" if isinstance(other, tuple) else other
            given = flag(knob.name) + ("" if other is True else f" {shown}")
            if other is False:
                given = "--muon-no-split-qkv"
            assert message.startswith(f"{given} with --optimizer {optimizer}") and "leave it out" in message


@pytest.mark.parametrize(
    ("optimizer", "changes", "expected"),
    [
        (
            "muon",
            {"muon_sphere_radius": 4.0},
            "--muon-sphere-radius 4.0 with --optimizer muon, which does not read it: leave it out, or use --optimizer "
            "spectral_sphere.",
        ),
        (
            "adam",
            {"muon_transfer": "128x2"},
            "--muon-transfer 128x2 with --optimizer adam, which does not read it: leave it out, or use --optimizer "
            "muon or adaptive_muon.",
        ),
        (
            "adam",
            {"muon_nesterov": True},
            "--muon-nesterov with --optimizer adam, which does not read it: leave it out, or use --optimizer muon, "
            "adaptive_muon, spectral_sphere or stiefel_muon.",
        ),
        (
            "spectral_sphere",
            {"muon_scale_mode": "moonlight"},
            "--muon-scale-mode moonlight with --optimizer spectral_sphere: the radius decides about the size of "
            "updates (--muon-sphere-radius); leave it out.",
        ),
        (
            "soap",
            {"adaptive_muon_beta2": 0.7},
            "--adaptive-muon-beta2 0.7 with --optimizer soap, which does not read it: leave it out, or use "
            "--optimizer adaptive_muon.",
        ),
    ],
)
def test_what_is_said_of_a_flag_that_is_not_read(optimizer: str, changes: dict[str, Any], expected: str) -> None:
    assert messages(UNREAD, {**ARGUMENTS, "optimizer": optimizer, **changes}) == [expected]
