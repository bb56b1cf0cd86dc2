"""Where Gram Newton-Schulz must form its Gram matrix anew.

In finite precision the smallest eigenvalues of ``X X^T`` come out slightly negative. The polynomials then blow these
directions up, within ``Q``, although ``X`` has next to nothing there. A restart multiplies ``X`` by ``Q`` and forms the
Gram matrix anew, which is positive semi-definite again up to one rounding. Which positions are good depends on the
coefficients; here they are computed with scalars.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations

import torch

from megatron_muon.orthogonalize.coefficients import Coefficients
from megatron_muon.orthogonalize.gram import segments

PERTURBATION = 4e-4
"""By how much an eigenvalue of the float16 Gram matrix of a matrix of norm 1 can come out too small: the value of the
authors of Gram Newton-Schulz (products are summed in float32 and rounded once)."""

CONDITION_LIMIT = 100.0
"""Enough restarts are made to bring :func:`condition` below this. Measured on float16 (docs/parallelism-and-cost.md):
choices below it err less than standard bfloat16 Newton-Schulz on every spectrum tried, ``polar_express`` with its best
single restart (631) does not."""

_GRID = torch.cat([torch.zeros(1, dtype=torch.float64), torch.logspace(-6, 0, 2000, dtype=torch.float64)])


def condition(coefficients: Coefficients, restarts: tuple[int, ...], perturbation: float = PERTURBATION) -> float:
    """The largest ratio of eigenvalues of ``Q`` in any segment: by so much rounding errors in ``Q`` may grow.

    Args:
        coefficients: one (a, b, c) for each step.
        restarts: before which steps the Gram matrix is formed anew, increasing, none of them 0.
        perturbation: by how much each eigenvalue of a Gram matrix is too small.

    Returns:
        At least 1; infinite if the iteration diverges.
    """
    s, worst = _GRID.clone(), 1.0
    for segment in segments(coefficients, restarts):
        r, q = s.square() - perturbation, torch.ones_like(s)
        for a, b, c in segment:
            z = a + r * (b + r * c)
            q, r = q * z, r * z.square()
        q = q.abs()
        if not bool(torch.isfinite(q).all()):
            return float("inf")
        worst = max(worst, float(q.max() / q.min().clamp_min(1e-300)))
        s = s * q
    return worst


@cache
def best_restarts(coefficients: Coefficients, dtype: torch.dtype) -> tuple[int, ...] | None:
    """Before which steps to form the Gram matrix anew.

    float32 and wider: before every second step. Pairs of steps keep the error of float32 at that of standard
    Newton-Schulz (within a factor of two on badly conditioned matrices); longer segments do not. float16: the fewest
    restarts that keep :func:`condition` below the limit, at their best positions.

    Args:
        coefficients: one (a, b, c) for each step.
        dtype: of the iteration.

    Returns:
        Increasing positions; None if Gram Newton-Schulz is not accurate enough: in bfloat16, whose 8 bits are too few
        for polynomials in Q, and for sets that keep the limit with no choice of restarts.

    Source:
        Gram Newton-Schulz (Dao-AILab, https://github.com/Dao-AILab/gram-newton-schulz), extended to the number of
        restarts.
    """
    steps = len(coefficients)
    if dtype == torch.bfloat16:
        return None
    if dtype in (torch.float32, torch.float64):
        return tuple(range(2, steps, 2))
    for count in range(steps):
        found = min((condition(coefficients, chosen), chosen) for chosen in combinations(range(1, steps), count))
        if found[0] <= CONDITION_LIMIT:
            return found[1]
    return None
