"""Coefficient sets of the Newton-Schulz iteration.

Sets of emerging-optimizers, whichever the installed version has, and two that the oldest supported one lacks.
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
        coefficients: one (a, b, c) for each step; ``A A`` is not formed where c is 0.
        balanced: whether rows of X (columns of a tall matrix) are first divided by the square roots of the sums of the
            rows of ``|X X^T|``, which bounds singular values by 1 much closer than the norm does
            (:func:`megatron_muon.orthogonalize.newton_schulz.balance_`). It changes the polar factor.
    """

    coefficients: Coefficients
    balanced: bool = False


TURBO = "turbo_muon"
"""Balanced, with coefficients of ``quintic``: Turbo-Muon, arXiv 2512.04632, whose four steps are the last four."""

_CUBIC5 = "cubic5"
_OWN_SETS = {
    # arXiv 2606.00371, as emerging-optimizers 0.4 rounds it: each step maps [0, 1.3] into itself
    _CUBIC5: (
        (3.3656576, -3.3420992, 0.0),
        (2.5744352, -1.4957376, 0.0),
        (2.5368962, -1.4312570, 0.0),
        (2.4418906, -1.2764040, 0.0),
        (2.2230472, -0.9630650, 0.0),
    )
}
MADE_FOR = {_CUBIC5: 5, TURBO: 4}
"""The number of steps that the authors of a set give, where it is one."""

# Sets that converge: their last entry is the one to go on with. The others are cycles.
_REPEAT_LAST = ("polar_express", "cans", "deepseekv4")


@cache
def coefficient_types() -> tuple[str, ...]:
    """Names of the coefficient sets: those of the installed emerging-optimizers, in its order, and this package's.

    :data:`CUSTOM` is left out: it stands for coefficients that the user gives.
    """
    from emerging_optimizers.orthogonalized_optimizers.muon_utils import NSCoeffT

    return tuple(name for name in dict.fromkeys((*get_args(NSCoeffT), *MADE_FOR)) if name != CUSTOM)


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
            ``cans`` and ``deepseekv4`` repeat their last entry, the others (custom ones too) start again. Of ``cubic5``
            and ``turbo_muon`` fewer steps are the last ones, whose results stay near 1, and more repeat the last one.
            (emerging-optimizers refuses ``cubic5`` with any number but 5.)
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
    tables = {**_OWN_SETS, **muon_utils._COEFFICIENT_SETS, CUSTOM: custom}
    table = list(tables["quintic" if coefficient_type == TURBO else coefficient_type])
    if coefficient_type in MADE_FOR:
        table = table[-num_steps:]
    repeats = coefficient_type in _REPEAT_LAST or coefficient_type in MADE_FOR
    steps = muon_utils.get_coefficient_iterator(num_steps, table, "repeat_last" if repeats else "cycle")
    return Iteration(tuple(steps), balanced=coefficient_type == TURBO)
