"""Gram Newton-Schulz: the same iteration on the small square matrix ``X X^T``.

Every iterate of Newton-Schulz is ``Q X`` with a polynomial ``Q`` of ``R = X X^T``. The iteration on ``Q`` and ``R``
multiplies square matrices of the smaller side only; ``X`` itself is touched twice in each segment between restarts (see
:mod:`megatron_muon.orthogonalize.restarts`).
"""

from __future__ import annotations

import itertools

import torch

from megatron_muon.orthogonalize.coefficients import Coefficients, Iteration
from megatron_muon.orthogonalize.newton_schulz import balance_
from megatron_muon.orthogonalize.products import TorchProducts, is_exact, shifted_
from megatron_muon.orthogonalize.switches import without_autocast


def segments(coefficients: Coefficients, restarts: tuple[int, ...]) -> list[Coefficients]:
    """The coefficients of each run of steps between restarts."""
    bounds = (0, *restarts, len(coefficients))
    return [coefficients[start:stop] for start, stop in itertools.pairwise(bounds)]


def gram_iteration(
    x: torch.Tensor, iteration: Iteration, restarts: tuple[int, ...], products: TorchProducts, scale: float = 1.0
) -> torch.Tensor:
    """Apply the iteration to matrices of Frobenius norm at most 1.

    Args:
        x: (batch, p, q) with p <= q, in the dtype of the iteration, multiplied by ``scale``.
        iteration: the steps.
        restarts: before which steps the Gram matrix is formed anew.
        products: how to multiply.
        scale: see :func:`prescale`.

    Returns:
        (batch, p, q), not scaled, in the memory order of ``x``.

    Source:
        Gram Newton-Schulz, Dao-AILab, https://github.com/Dao-AILab/gram-newton-schulz. The power-of-two scale of the
        first segment, which keeps float16 Gram matrices of large p in range, and steps without a square are this
        package's.
    """
    with without_autocast():
        for number, segment in enumerate(segments(iteration.coefficients, restarts)):
            balanced = number == 0 and iteration.balanced
            q, factors = polynomial_of_gram(products.gram(x), segment, products, scale, balanced)
            q = q if factors is None else q.mul_(factors.mT)
            x = products.apply(q, x, 1.0 / scale)
            scale = 1.0
    return x


def polynomial_of_gram(
    r: torch.Tensor,
    coefficients: Coefficients,
    products: TorchProducts,
    scale: float = 1.0,
    balanced: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The ``Q`` of one segment, such that the segment maps ``X`` to ``Q X``, or to ``Q S X`` if it is balanced.

    Args:
        r: (batch, p, p), ``scale**2 X X^T``; overwritten if it is balanced.
        coefficients: of the segment's steps.
        products: how to multiply.
        scale: of the ``X`` that ``r`` was formed of, a power of two.
        balanced: whether ``X`` becomes ``S X`` first.

    Returns:
        Q, and the diagonal of S, (batch, p, 1), if it is balanced: see
        :func:`megatron_muon.orthogonalize.newton_schulz.balance_`.
    """
    q: torch.Tensor | None = None
    factors = balance_(r) if balanced else None
    square = scale * scale
    with without_autocast():
        for step, (a, b, c) in enumerate(coefficients):
            b, c = b / square, c / (square * square)  # of the unscaled R
            # Below, alpha Y + shift stands for b R + c R R + a.
            if c:
                y, alpha = products.quadratic(r, b, c), 1.0
            else:
                y, alpha = (r * b, 1.0) if is_exact(r.dtype) else (r, b)
            y, shift = (shifted_(y, a), 0.0) if is_exact(r.dtype) else (y, a)
            q = _summed(y, alpha, shift) if q is None else products.commuting(q, y, shift, alpha)
            if step + 1 < len(coefficients):
                r = products.commuting(products.commuting(r, y, shift, alpha), y, shift, alpha)
    assert q is not None, "a segment has at least one step"
    return q, factors


def _summed(y: torch.Tensor, alpha: float, shift: float) -> torch.Tensor:
    return shifted_(y * alpha, shift) if shift or alpha != 1.0 else y


def prescale(dtype: torch.dtype, p: int) -> float:
    """The power of two by which a p x q matrix of norm 1 is multiplied before it is rounded to ``dtype``; p <= q.

    The off-diagonal entries of ``X X^T`` are about ``1 / (p sqrt(q))``: below float16's normal range for p in the
    thousands. With a scale of about ``sqrt(p) / 4`` they are not; the largest eigenvalue is then p / 16 at most.
    """
    if dtype != torch.float16:
        return 1.0
    return float(2 ** max(0, (p.bit_length() - 5) // 2))
