"""How examples are drawn: the same in each run, on a rank of the pool, as many as the test asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import strategies as st


def each_example(strategy: st.SearchStrategy[Any], examples: int, check: Callable[[Any], None]) -> None:
    """Call ``check`` with what a strategy makes; the smallest example that fails is in the error."""
    settings = hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )

    @settings
    @hypothesis.given(strategy)
    def drawn(example: Any) -> None:
        check(example)

    drawn()
