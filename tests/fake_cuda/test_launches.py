"""How many kernels a step launches, on fake GPUs, and how that grows with weights."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from megatron_muon import Muon
from megatron_muon.optimizers.probe import Probe
from megatron_muon.routing.layout import WHOLE, MatrixLayout, Section
from tests.fake_cuda.models import taken
from tests.fake_cuda.world import FIRST_STEP, World
from tests.megatron.planner import Planner
from tools.host_time import VARIANTS

PLAIN = ["--use-distributed-optimizer", "--overlap-param-gather"]
"""Left out, every rank has all weights of its stage: the most that there can be."""

QKV = MatrixLayout("qkv", (Section("q", 256), Section("k", 128), Section("v", 128)))
LAYOUTS = {"whole": (WHOLE, (256, 512)), "qkv": (QKV, (512, 512)), "experts": (WHOLE.stack(), (4, 256, 512))}

OWN = {"hyperball": 3, "namo": 1, "spectral_sphere": 3}
"""Kernels of variants for each block of a weight: norms of rows where they lie, and a factor for each."""


@pytest.mark.parametrize(
    ("model", "stage", "weights", "launches", "fused"),
    [pytest.param("llama3_70b", 1, 80, 17, 8.5, marks=pytest.mark.slow), ("deepseek_v3", 1, 64, 25, 17.5)],
)
def test_models(planner: Planner, model: str, stage: int, weights: int, launches: float, fused: float) -> None:
    """Of a rank with all weights of its stage, for each weight; what is elementwise is two kernels a chunk."""
    rank = planner.ranks(model, stage, PLAIN)[0]
    assert len(rank.weights) == weights
    found = taken(rank)
    assert found.launches.total() <= launches * weights
    assert found.fused.total() <= fused * weights
    assert found.fused["an elementwise pass"] == 2 * found.chunks


@pytest.mark.parametrize(
    ("variant", "layout"),
    [*((variant, "whole") for variant in VARIANTS), ("nesterov", "qkv"), ("cautious", "qkv"), ("nesterov", "experts")],
)
def test_weights_of_one_chunk_share_kernels(variant: str, layout: str) -> None:
    """But for a few of some variants; and kernels for lists take 30 to 110 tensors each."""
    few, many = (launches(variant, layout, count) for count in (4, 20))
    blocks = 3 if layout == "qkv" else 1
    assert (many.total() - few.total()) / 16 <= (OWN.get(variant, 0) + 0.5) * blocks, many - few


def launches(variant: str, layout: str, count: int) -> Counter[str]:
    """Of a step, by torch's operations alone."""
    options: dict[str, Any] = VARIANTS[variant]
    with World() as world:
        of, shape = LAYOUTS[layout]
        muon = Muon([world.parameter(*shape, layout=of) for _ in range(count)], **options)
        with world.refusing(FIRST_STEP):
            muon.step()
        world.watch.launches.clear()
        with world.refusing(FIRST_STEP):
            muon.step()
        return world.watch.launches


@pytest.mark.parametrize("count", [4, 20])
def test_a_probe_asks_the_same_of_few_weights_and_many(count: int) -> None:
    """What a measured step launches beside its own kernels, and then ``take()``, whose kernels are small."""
    with World() as world:
        muon = Muon([world.parameter(64, 96) for _ in range(count)])
        muon.probe = probe = Probe()
        found = []
        with world.refusing(FIRST_STEP):
            muon.step()
            for is_due in (False, True):
                probe.is_due = is_due
                world.watch.launches.clear()
                muon.step()
                found.append(world.watch.launches.total())
            world.watch.launches.clear()
            assert len(probe.take()) == count
        assert 200 < found[1] - found[0] < 280 and world.watch.launches.total() < 200
