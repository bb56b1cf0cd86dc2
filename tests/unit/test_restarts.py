"""Where the Gram iteration starts again: what rounding allows in each type of numbers."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_muon.orthogonalize.coefficients import CUSTOM, Iteration
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer
from megatron_muon.orthogonalize.restarts import CONDITION_LIMIT, best_restarts, condition
from tests.iterations import EVERY_SET, set_of

# Condition of the best choice by the table in the notes on Gram Newton-Schulz: (set, steps) -> positions, condition.
TABLE = [
    ("quintic", 5, (2,), 53),
    ("simple", 5, (3,), 63),
    ("polar_express", 5, (1,), 631),
    ("polar_express", 5, (1, 2), 69),
    ("deepseekv4", 10, (2, 4, 6), 73),
]
CHOSEN = [("quintic", 5), ("simple", 5), ("polar_express", 5), ("polar_express", 8), ("deepseekv4", 10), (CUSTOM, 4)]


@pytest.mark.parametrize(("name", "steps", "restarts", "expected"), TABLE)
def test_conditions_of_the_table(name: str, steps: int, restarts: tuple[int, ...], expected: int) -> None:
    assert round(condition(set_of(name, steps), restarts)) == expected


@pytest.mark.parametrize(
    ("name", "steps", "expected"),
    [
        ("quintic", 5, (2,)),
        ("simple", 5, (3,)),
        ("polar_express", 5, (1, 2)),
        ("deepseekv4", 10, (2, 4, 6)),
        ("cans", 5, None),
        ("aol", 5, None),
        ("quintic", 1, ()),
    ],
)
def test_choice_for_float16(name: str, steps: int, expected: tuple[int, ...] | None) -> None:
    assert best_restarts(set_of(name, steps), torch.float16) == expected


@pytest.mark.parametrize(("name", "steps"), CHOSEN)
def test_no_other_choice_is_better_and_fewer_restarts_are_not_enough(name: str, steps: int) -> None:
    triples = set_of(name, steps)
    chosen = best_restarts(triples, torch.float16)
    assert chosen is not None
    found = condition(triples, chosen)
    assert 1 <= found <= CONDITION_LIMIT
    positions = range(1, steps)
    for other in itertools.combinations(positions, len(chosen)):
        assert condition(triples, other) >= found, other
    for count in range(len(chosen)):
        for fewer in itertools.combinations(positions, count):
            assert condition(triples, fewer) > CONDITION_LIMIT, fewer


@pytest.mark.parametrize(("name", "steps"), [("cans", 5), ("aol", 5), ("quintic", 8)])
def test_sets_without_a_choice_have_none_at_all(name: str, steps: int) -> None:
    triples = set_of(name, steps)
    assert best_restarts(triples, torch.float16) is None
    for count in range(steps):
        for restarts in itertools.combinations(range(1, steps), count):
            assert condition(triples, restarts) > CONDITION_LIMIT, restarts
    assert Orthogonalizer(Iteration(triples), torch.float16).method(8, 400).restarts is None


def test_a_diverging_iteration_has_no_condition() -> None:
    assert condition(((1e200, 1e200, 1e200),) * 3, ()) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_types_restart_before_every_second_step(dtype: torch.dtype) -> None:
    expected = {1: (), 2: (), 3: (2,), 4: (2,), 5: (2, 4), 6: (2, 4), 8: (2, 4, 6)}
    for name in EVERY_SET:
        assert {steps: best_restarts(set_of(name, steps), dtype) for steps in expected} == expected
