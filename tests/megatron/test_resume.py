"""Stop, save, load into a new run, go on: bit for bit as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.pool import RankPool


def straight(layout: Layout, options: dict[str, Any]) -> list[float]:
    return harness.start(layout, **options).losses(8)


def first_half(layout: Layout, options: dict[str, Any], folder: str) -> list[float]:
    run = harness.start(layout, **options)
    losses = run.losses(4)
    harness.save_run(run, folder)
    return losses


def second_half(layout: Layout, options: dict[str, Any], folder: str) -> list[float]:
    run = harness.start(layout, **options)
    run.losses(1)  # the state that is loaded must replace what is there
    harness.load_run(run, folder)
    return run.losses(4)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "world_size,layout,param_layout",
    [
        (1, Layout(), True),
        (2, Layout(tp=2), True),
        (2, Layout(pp=2), True),
        (2, Layout(layer_wise=True), True),
        (2, Layout(layer_wise=True), False),
        (4, Layout(tp=2, layer_wise=True), True),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(
    pool: RankPool, tmp_path: Path, world_size: int, layout: Layout, param_layout: bool, bf16: bool
) -> None:
    options = {"bf16": bf16, "param_layout": param_layout}
    whole = pool.run(straight, world_size, layout, options)[0]
    folder = str(tmp_path / "checkpoint")
    first = pool.run(first_half, world_size, layout, options, folder)[0]
    second = pool.run(second_half, world_size, layout, options, folder)[0]
    assert first + second == whole
