"""Checkpoints that are saved and loaded by the harness's runs, and the errors that ranks raise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tests.megatron import harness
from tests.megatron.harness import Layout

TIMEOUT = 60
"""Seconds until a call counts as hanging; loading takes one or two."""

Outcome = tuple[str, str]
"""Type and text of an error; empty if there is none."""

FINE: Outcome = ("", "")


def save_after_a_step(layout: Layout, options: dict[str, Any], *names: str) -> None:
    """Train a step before each save."""
    run = harness.start(layout, **options)
    for name in names:
        run.losses(1)
        harness.save_run(run, name)


def failure(function: Callable[[], object]) -> Outcome:
    """What a function raises."""
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return FINE


def load_each(layout: Layout, options: dict[str, Any], folders: Sequence[str]) -> list[Outcome]:
    """Load one after the other into one run."""
    run = harness.start(layout, **options)
    return [failure(lambda folder=folder: harness.load_run(run, folder)) for folder in folders]  # type: ignore[misc]


def one_error(outcomes: Sequence[Outcome]) -> str:
    """The text of the error that all ranks have raised."""
    assert {name for name, _ in outcomes} == {"CheckpointError"}, outcomes
    assert len({text for _, text in outcomes}) == 1, outcomes
    return outcomes[0][1]
