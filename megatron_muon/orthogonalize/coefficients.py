"""Coefficient sets of the Newton-Schulz iteration.

The sets are emerging-optimizers' own: whichever the installed version has can be used by its name. This package adds
only the rule for running more steps than a set has entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import get_args

CUSTOM = "custom"
"""Name that stands for coefficients given by the user."""

Coefficients = tuple[tuple[float, float, float], ...]
"""One ``(a, b, c)`` for each step of ``X <- a X + (b A + c A A) X`` with ``A = X X^T``."""


@dataclass(frozen=True)
class Iteration:
    """What Newton-Schulz does to a matrix of norm 1.

    Attributes:
        coefficients: one (a, b, c) for each step.
    """

    coefficients: Coefficients


# Sets that converge: their last entry is the one to go on with. The others are cycles.
_REPEAT_LAST = ("polar_express", "cans", "deepseekv4")


@cache
def coefficient_types() -> tuple[str, ...]:
    """Names of the coefficient sets in the installed emerging-optimizers, in its order.

    :data:`CUSTOM` is left out: it stands for coefficients that the user gives.
    """
    from emerging_optimizers.orthogonalized_optimizers.muon_utils import NSCoeffT

    return tuple(name for name in get_args(NSCoeffT) if name != CUSTOM)


def parse_triple(text: str) -> tuple[float, float, float]:
    """``"3.4445,-4.775,2.0315"`` as (a, b, c).

    Raises:
        ValueError: for anything but three finite numbers.
    """
    numbers = tuple(float(number) for number in text.split(","))
    if len(numbers) != 3 or not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"{text!r} is not a,b,c")
    return numbers


@cache
def iteration(coefficient_type: str, num_steps: int, custom: Coefficients = ()) -> Iteration:
    """The iteration of ``num_steps`` steps.

    Args:
        coefficient_type: one of :func:`coefficient_types`, or :data:`CUSTOM`.
        num_steps: at least 1. A set that is shorter is continued as emerging-optimizers does: ``polar_express``,
            ``cans`` and ``deepseekv4`` repeat their last entry, the others (custom ones too) start again.
        custom: the set that :data:`CUSTOM` stands for.

    Raises:
        ValueError: for an unknown set, an empty custom one, or fewer than one step.
    """
    from emerging_optimizers.orthogonalized_optimizers import muon_utils

    if coefficient_type == CUSTOM and not custom:
        raise ValueError("coefficient_type 'custom': give the coefficients")
    if coefficient_type not in (CUSTOM, *coefficient_types()):
        raise ValueError(f"coefficient_type {coefficient_type!r}: choose one of {', '.join(coefficient_types())}")
    if num_steps < 1:
        raise ValueError(f"num_steps {num_steps}: give at least 1")
    table = list(custom) if coefficient_type == CUSTOM else muon_utils._COEFFICIENT_SETS[coefficient_type]
    mode: muon_utils.CoeffIterMode = "repeat_last" if coefficient_type in _REPEAT_LAST else "cycle"
    return Iteration(tuple(muon_utils.get_coefficient_iterator(num_steps, table, mode)))
