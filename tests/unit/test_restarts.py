"""Where the Gram iteration starts again: what rounding allows in each type of numbers."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_muon.orthogonalize.coefficients import CUSTOM, Iteration
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer
from megatron_muon.orthogonalize.restarts import EXACT_PERTURBATION, GAIN_LIMIT, PERTURBATION, best_restarts, gain
from tests.iterations import set_of

Restarts = tuple[int, ...] | None

# (set, steps) -> restarts in float16 and in float32.
CHOICES: list[tuple[str, int, Restarts, Restarts]] = [
    ("quintic", 1, (), ()),
    ("quintic", 5, (2,), (2,)),
    ("quintic", 8, (2, 5), (3, 6)),
    ("simple", 5, (3,), (3,)),
    ("polar_express", 5, (1, 3), (2,)),
    ("polar_express", 8, (1, 4), (2, 5)),
    ("deepseekv4", 10, (2, 4, 7), (3, 6)),
    ("cans", 5, None, (2,)),
    ("aol", 5, (2,), (2,)),
    ("cubic5", 5, (2,), ()),
    ("cubic5", 7, (3,), (3,)),
    ("quintic", 12, (2, 5, 7, 10), (3, 6, 9)),
    (CUSTOM, 4, (), ()),
]


@pytest.mark.parametrize(("name", "steps", "half", "single"), CHOICES)
def test_choices(name: str, steps: int, half: Restarts, single: Restarts) -> None:
    triples = set_of(name, steps)
    assert best_restarts(triples, torch.float16) == best_restarts(triples, torch.float32, tf32=True) == half
    assert best_restarts(triples, torch.float32) == best_restarts(triples, torch.float64) == single
    assert best_restarts(triples, torch.bfloat16) is None


@pytest.mark.parametrize(("name", "steps", "half", "single"), CHOICES)
def test_no_other_choice_is_better_and_fewer_restarts_are_not_enough(
    name: str, steps: int, half: Restarts, single: Restarts
) -> None:
    triples, positions = set_of(name, steps), range(1, steps)
    for chosen, perturbation in ((half, PERTURBATION), (single, EXACT_PERTURBATION)):
        fewer = range(steps if chosen is None else len(chosen))
        for restarts in itertools.chain(*(itertools.combinations(positions, count) for count in fewer)):
            assert gain(triples, restarts, perturbation) > GAIN_LIMIT, restarts
        if chosen is not None:
            least = min(gain(triples, each, perturbation) for each in itertools.combinations(positions, len(chosen)))
            assert gain(triples, chosen, perturbation) == least <= GAIN_LIMIT


def test_without_rounding_the_gain_is_that_of_the_polynomial_at_0() -> None:
    triples = set_of("cubic5", 5)
    assert round(gain(triples, (), 0.0), 1) == 119.3
    assert gain(triples, (2,), 0.0) == pytest.approx(2.5368962 * 2.4418906 * 2.2230472)


def test_a_set_without_a_choice_is_iterated_by_the_standard_form() -> None:
    assert Orthogonalizer(Iteration(set_of("cans", 5)), torch.float16).method(8, 400).restarts is None


def test_operations_are_least_with_fewest_segments_or_with_all() -> None:
    """They are linear in the number of segments, and standard Newton-Schulz is one of as many as steps."""
    for name, p, q in itertools.product(("quintic", "cubic5"), (8,), (8, 12, 16, 40)):
        iteration = Orthogonalizer(Iteration(set_of(name, 5)), torch.float64)
        found = []
        for count in range(5):
            iteration.restarts = tuple(range(1, 1 + count))
            found.append(iteration.gram_flops(p, q))
        assert found[4] == iteration.standard_flops(p, q)
        assert {after - before for before, after in itertools.pairwise(found)} == {found[1] - found[0]}


def test_a_diverging_iteration_has_no_gain() -> None:
    assert gain(((1e200, 1e200, 1e200),) * 3, ()) == float("inf")
