"""Products of parameters, of which ``make test`` runs enough to see each pair of values together.

Faults that need three values of three parameters at once are rare; those that need two are not. The other cases of the
product are marked slow.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

__all__ = ["covering", "pairwise"]


def pairwise(*factors: Iterable[Any]) -> list[Any]:
    """Cases for ``pytest.mark.parametrize``: all of the product; slow are those that no pair of values needs.

    Args:
        factors: the values of each parameter, at least three: of two, every case is a pair.
    """
    values = [list(factor) for factor in factors]
    chosen = set(covering([len(each) for each in values]))
    return [
        pytest.param(
            *(each[place] for each, place in zip(values, places, strict=True)),
            marks=() if places in chosen else pytest.mark.slow,
        )
        for places in itertools.product(*(range(len(each)) for each in values))
    ]


def covering(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Few cases (a number below each size) in which each pair of numbers of two factors occurs; the same each time.

    Greedy: the case that brings the most pairs that are still missing comes next.
    """
    cases = list(itertools.product(*map(range, sizes)))
    pairs = {
        case: {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(sizes)), 2)} for case in cases
    }
    missing = set().union(*pairs.values())
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(pairs[case] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return chosen
