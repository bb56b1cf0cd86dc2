"""Coefficient sets of the Newton-Schulz iteration.

The sets are emerging-optimizers' own: whichever the installed version has can be used by its name. This package adds
only the rule for running more steps than a set has entries.
"""

from __future__ import annotations

from functools import cache
from typing import get_args

__all__ = ["Coefficients", "coefficient_types", "coefficients"]

Coefficients = tuple[tuple[float, float, float], ...]
"""One ``(a, b, c)`` for each step of ``X <- a X + (b A + c A A) X`` with ``A = X X^T``."""

# Sets that converge: their last entry is the one to go on with. The others are cycles.
_REPEAT_LAST = ("polar_express", "cans", "deepseekv4")


@cache
def coefficient_types() -> tuple[str, ...]:
    """Names of the coefficient sets in the installed emerging-optimizers, in its order.

    ``custom`` is left out: it stands for coefficients passed in code, which :func:`newton_schulz` takes directly.
    """
    from emerging_optimizers.orthogonalized_optimizers.muon_utils import NSCoeffT

    return tuple(name for name in get_args(NSCoeffT) if name != "custom")


@cache
def coefficients(coefficient_type: str, num_steps: int) -> Coefficients:
    """The coefficients of ``num_steps`` steps.

    Args:
        coefficient_type: one of :func:`coefficient_types`.
        num_steps: at least 1. A set that is shorter is continued as emerging-optimizers does: ``polar_express``,
            ``cans`` and ``deepseekv4`` repeat their last entry, the others start again.

    Raises:
        ValueError: for an unknown set or fewer than one step.
    """
    from emerging_optimizers.orthogonalized_optimizers import muon_utils

    if coefficient_type not in coefficient_types():
        raise ValueError(f"coefficient_type {coefficient_type!r}: choose one of {', '.join(coefficient_types())}")
    if num_steps < 1:
        raise ValueError(f"num_steps {num_steps}: give at least 1")
    table = muon_utils._COEFFICIENT_SETS[coefficient_type]
    mode: muon_utils.CoeffIterMode = "repeat_last" if coefficient_type in _REPEAT_LAST else "cycle"
    return tuple(muon_utils.get_coefficient_iterator(num_steps, table, mode))
