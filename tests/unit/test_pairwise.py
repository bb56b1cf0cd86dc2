"""The helper that thins out products of parameters."""

from __future__ import annotations

import itertools
import math

import pytest

from tests.pairwise import covering, pairwise


@pytest.mark.parametrize("sizes", [(8, 3, 2), (5, 4, 3, 2), (27, 3, 5), (2, 2, 2, 2, 2), (4, 1, 3)])
def test_every_pair_of_values_occurs(sizes: tuple[int, ...]) -> None:
    chosen = covering(sizes)
    assert len(set(chosen)) == len(chosen)
    for i, j in itertools.combinations(range(len(sizes)), 2):
        found = {(case[i], case[j]) for case in chosen}
        assert found == set(itertools.product(range(sizes[i]), range(sizes[j])))
    least = math.prod(sorted(sizes)[-2:])
    assert least <= len(chosen) <= 1.5 * least


def test_the_rest_of_the_product_is_slow() -> None:
    cases = pairwise("abc", (1, 2, 3), (True, False))
    assert [case.values for case in cases] == list(itertools.product("abc", (1, 2, 3), (True, False)))
    quick = [case for case in cases if not case.marks]
    assert len(quick) == 9 and all(case.marks == (pytest.mark.slow,) for case in cases if case.marks)
