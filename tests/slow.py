"""Cases that ``make test`` leaves out, because others test the same; ``make test-slow`` runs them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["with_slow"]


def with_slow(names: Iterable[str], *slow: str) -> list[Any]:
    """Names of cases for ``pytest.mark.parametrize``, some of them marked slow.

    Raises:
        ValueError: for a slow one that is not among the names.
    """
    known = list(names)
    if unknown := set(slow).difference(known):
        raise ValueError(f"{sorted(unknown)} are not among {known}")
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in known]
