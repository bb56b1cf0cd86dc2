"""Where Gram Newton-Schulz must form its Gram matrix anew.

In finite precision the smallest eigenvalues of ``X X^T`` come out slightly negative. The polynomials then blow these
directions up, within ``Q``, although ``X`` has next to nothing there. A restart multiplies ``X`` by ``Q`` and forms the
Gram matrix anew, which is positive semi-definite again up to one rounding. Which positions are good depends on the
coefficients; here they are computed with scalars.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import cache

import torch

from megatron_muon.orthogonalize.coefficients import Coefficients
from megatron_muon.orthogonalize.gram import segments

PERTURBATION = 4e-4
"""By how much an eigenvalue of the Gram matrix of a matrix of norm 1 can come out too small in float16 or TF32, of 11
bits: the value of the authors of Gram Newton-Schulz (products are summed in float32 and rounded once)."""

EXACT_PERTURBATION = PERTURBATION * 2.0**-13
"""The same of float32, of 24 bits; float64 takes the choices of float32."""

GAIN_LIMIT = 125.0
"""How large an eigenvalue of ``Q`` may be in any segment. Measured (docs/results/iteration.md): choices below it err
less than standard bfloat16 Newton-Schulz in float16 where rows and columns are of like size, whatever the spectrum; in
float32 by 4e-4 at most, or as the standard iteration does where that errs more."""

_KEPT = 16
"""How many beginnings of as many steps and segments are gone on with: for up to ten steps of the known sets that finds
what a search of all choices does."""

_Begun = tuple[float, tuple[int, ...], torch.Tensor]

_GRID = torch.cat([torch.zeros(1, dtype=torch.float64), torch.logspace(-6, 0, 2000, dtype=torch.float64)])


def _segments_from(
    s: torch.Tensor, coefficients: Coefficients, perturbation: float
) -> Iterator[tuple[float, torch.Tensor]]:
    """After each step of one segment: the largest eigenvalue of its ``Q``, and the singular values that it leaves.

    Args:
        s: singular values before the segment.
        coefficients: of its steps.
        perturbation: see :func:`gain`.
    """
    r, q = s.square() - perturbation, torch.ones_like(s)
    for a, b, c in coefficients:
        z = a + r * (b + r * c)
        q, r = q * z, r * z.square()
        size = q.abs()
        yield float(size.max()) if bool(torch.isfinite(size).all()) else float("inf"), s * size


def gain(coefficients: Coefficients, restarts: tuple[int, ...], perturbation: float = PERTURBATION) -> float:
    """The largest eigenvalue of ``Q`` in any segment: by so much, and its square, rounding errors in ``R`` may grow.

    Args:
        coefficients: one (a, b, c) for each step.
        restarts: before which steps the Gram matrix is formed anew, increasing, none of them 0.
        perturbation: by how much each eigenvalue of a Gram matrix is too small.

    Returns:
        Infinite if the iteration diverges.
    """
    s, worst = _GRID, 0.0
    for segment in segments(coefficients, restarts):
        *_, (its, s) = _segments_from(s, segment, perturbation)
        worst = max(worst, its)
    return worst


@cache
def best_restarts(coefficients: Coefficients, dtype: torch.dtype, *, tf32: bool = False) -> tuple[int, ...] | None:
    """Before which steps to form the Gram matrix anew: the fewest restarts that keep :func:`gain` below the limit.

    Operations are linear in the number of segments, and with one for each step they are those of the standard
    iteration: so where Gram Newton-Schulz pays at all, the fewest segments pay most. Of several choices that with the
    least gain is taken, of those equal in that the last.

    Args:
        coefficients: one (a, b, c) for each step.
        dtype: of the iteration.
        tf32: whether products of float32 may be TF32.

    Returns:
        Increasing positions; None if Gram Newton-Schulz is not accurate enough: in bfloat16, whose 8 bits are too few
        for polynomials in Q, and for sets that keep the limit with no choice of restarts.

    Source:
        Gram Newton-Schulz (Dao-AILab, https://github.com/Dao-AILab/gram-newton-schulz), extended to the number of
        restarts.
    """
    if dtype == torch.bfloat16:
        return None
    perturbation = PERTURBATION if dtype == torch.float16 or tf32 else EXACT_PERTURBATION
    # Of ever more segments: beginnings that keep the limit, with minus their restarts, by how many steps they have.
    begun: dict[int, list[_Begun]] = {0: [(0.0, (), _GRID)]}
    for _ in coefficients:
        longer: dict[int, list[_Begun]] = defaultdict(list)
        for start, some in begun.items():
            for worst, chosen, s in some:
                restarts = (*chosen, -start) if start else ()
                for stop, (its, left) in enumerate(_segments_from(s, coefficients[start:], perturbation), start + 1):
                    if max(worst, its) <= GAIN_LIMIT:
                        longer[stop].append((max(worst, its), restarts, left))
        begun = {stop: sorted(some, key=lambda each: each[:2])[:_KEPT] for stop, some in longer.items()}
        if found := begun.get(len(coefficients)):
            return tuple(-restart for restart in found[0][1])
    return None
