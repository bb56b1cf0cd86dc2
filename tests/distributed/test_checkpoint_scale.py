"""What our part of saving and loading costs: a rank by its own weights, the first by all, in proportion."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tests.pool import RankPool

Cost = tuple[int, int, int, int]
"""Calls of functions, collectives, bytes sent, bytes received."""


def costs(folder: str, *groups: int) -> list[dict[tuple[str, bool], Cost]]:
    """Of each phase, on the first rank and on another: a layer of two experts a group, two copies of each group."""
    from tools.ckpt_scale import phases  # imports Megatron-Core, which the pool's processes have

    found, calls = [], [0]

    def count(frame: Any, event: str, argument: Any) -> None:
        calls[0] += event in ("call", "c_call")

    for number in groups:
        sizes = argparse.Namespace(layers=4, stages=1, experts=2 * number, ranks=2 * number, groups=number)
        place = Path(folder) / str(number)
        place.mkdir()
        found.append({})
        for name, watched, work in phases(sizes, place):
            calls[0] = 0
            sys.setprofile(count)
            try:
                work()
            finally:
                sys.setprofile(None)
            found[-1][name, watched.is_first] = (calls[0], *watched.counts)
    return found


def test_cost_grows_in_proportion(pool: RankPool, tmp_path: Path) -> None:
    """Twice the experts on twice the ranks, and again: the same for each rank, in proportion for the first."""
    (found,) = pool.run(costs, 1, str(tmp_path), 2, 4, 8, 16, timeout=60)
    _, small, middle, large = found  # what is imported and made once counts in the first
    for phase in ("first save", "later save"):
        assert small[phase, False] == middle[phase, False] == large[phase, False], phase
    assert large["later save", False][2] < large["first save", False][2] / 3, "what stays the same was sent before"
    assert large["later save", False][3] == 0, "only the first rank needs the record"
    for key in small:
        assert small[key][1] == middle[key][1] == large[key][1] <= 40, "collectives"
        for one, two, four in zip(small[key], middle[key], large[key], strict=True):
            assert four - two <= 3 * (two - one) + 16, (key, one, two, four)  # 4, if it were quadratic
