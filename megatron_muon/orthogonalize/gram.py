"""Gram Newton-Schulz: the same iteration on the small square matrix ``X X^T``.

Every iterate of Newton-Schulz is ``Q X`` with a polynomial ``Q`` of ``R = X X^T``. The iteration on ``Q`` and ``R``
multiplies square matrices of the smaller side only; ``X`` itself is touched twice in each segment between restarts (see
:mod:`megatron_muon.orthogonalize.restarts`).
"""

from __future__ import annotations

import itertools

import torch

from megatron_muon.orthogonalize.coefficients import Coefficients
from megatron_muon.orthogonalize.products import TorchProducts, is_exact, shifted_
from megatron_muon.orthogonalize.switches import without_autocast


def segments(coefficients: Coefficients, restarts: tuple[int, ...]) -> list[Coefficients]:
    """The coefficients of each run of steps between restarts."""
    bounds = (0, *restarts, len(coefficients))
    return [coefficients[start:stop] for start, stop in itertools.pairwise(bounds)]


def gram_iteration(
    x: torch.Tensor, coefficients: Coefficients, restarts: tuple[int, ...], products: TorchProducts, scale: float = 1.0
) -> torch.Tensor:
    """Apply the iteration to matrices of Frobenius norm at most 1.

    Args:
        x: (batch, p, q) with p <= q, in the dtype of the iteration, multiplied by ``scale``.
        coefficients: one (a, b, c) for each step.
        restarts: before which steps the Gram matrix is formed anew.
        products: how to multiply.
        scale: see :func:`prescale`.

    Returns:
        (batch, p, q), not scaled, in the memory order of ``x``.

    Source:
        Gram Newton-Schulz, Dao-AILab, https://github.com/Dao-AILab/gram-newton-schulz. The power-of-two scale of the
        first segment, which keeps float16 Gram matrices of large p in range, is this package's.
    """
    with without_autocast():
        for segment in segments(coefficients, restarts):
            q = polynomial_of_gram(products.gram(x), segment, products, scale)
            x = products.apply(q, x, 1.0 / scale)
            scale = 1.0
    return x


def polynomial_of_gram(
    r: torch.Tensor, coefficients: Coefficients, products: TorchProducts, scale: float = 1.0
) -> torch.Tensor:
    """The ``Q`` of one segment, such that the segment maps ``X`` to ``Q X``.

    Args:
        r: (batch, p, p), ``scale**2 X X^T``.
        coefficients: of the segment's steps.
        products: how to multiply.
        scale: of the ``X`` that ``r`` was formed of, a power of two.
    """
    q: torch.Tensor | None = None
    square = scale * scale
    with without_autocast():
        for step, (a, b, c) in enumerate(coefficients):
            z = products.quadratic(r, b / square, c / (square * square))  # b R + c R R, of the unscaled R
            y, shift = (shifted_(z, a), 0.0) if is_exact(r.dtype) else (z, a)  # below, y + shift stands for Z + a
            q = _summed(y, shift) if q is None else products.commuting(q, y, shift)
            if step + 1 < len(coefficients):
                r = products.commuting(products.commuting(r, y, shift), y, shift)  # R (Z + a) (Z + a)
    assert q is not None, "a segment has at least one step"
    return q


def _summed(y: torch.Tensor, shift: float) -> torch.Tensor:
    return shifted_(y.clone(), shift) if shift else y


def prescale(dtype: torch.dtype, p: int) -> float:
    """The power of two by which a p x q matrix of norm 1 is multiplied before it is rounded to ``dtype``; p <= q.

    The off-diagonal entries of ``X X^T`` are about ``1 / (p sqrt(q))``: below float16's normal range for p in the
    thousands. With a scale of about ``sqrt(p) / 4`` they are not; the largest eigenvalue is then p / 16 at most.
    """
    if dtype != torch.float16:
        return 1.0
    return float(2 ** max(0, (p.bit_length() - 5) // 2))
