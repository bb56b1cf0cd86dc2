"""The Newton-Schulz iteration: an approximation of ``U V^T`` for ``X = U S V^T``, in matrix products alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_muon.orthogonalize.coefficients import Coefficients

__all__ = ["newton_schulz"]

Reduce = Callable[[torch.Tensor], torch.Tensor]
"""Sums a tensor over the ranks that share a matrix; may work in place; returns the sum."""


def newton_schulz(
    x: torch.Tensor,
    coefficients: Coefficients,
    *,
    dtype: torch.dtype | None = None,
    eps: float = 1e-7,
    shard_dim: int | None = None,
    reduce: Reduce | None = None,
) -> torch.Tensor:
    """Orthogonalize each matrix of a batch.

    With singular values s of ``x / ||x||_F`` the result has the singular values p(s), where p is the composition of
    the odd polynomials ``a s + b s^3 + c s^5``, and the singular vectors of ``x``.

    Args:
        x: (..., m, n), floating point. A zero matrix gives zeros.
        coefficients: one (a, b, c) for each step, see :func:`megatron_muon.orthogonalize.coefficients`.
        dtype: of the iteration; that of ``x`` by default. The norm is always taken in float32 or better.
        eps: lower bound of the norm that a matrix is divided by.
        shard_dim: the rows (-2) or columns (-1), also counted from the front, if ``x`` is this rank's shard of a
            matrix that is divided along them; the contraction then runs along that dimension and ``reduce`` sums what
            the ranks hold.
        reduce: required with ``shard_dim``.

    Returns:
        (..., m, n) in the dtype of ``x``.

    Source:
        Jordan et al., https://kellerjordan.github.io/posts/muon; sharded form: ``newton_schulz_tp`` in
        emerging-optimizers, mode ``distributed``.
    """
    if (shard_dim is None) != (reduce is None):
        raise ValueError("shard_dim and reduce belong together")
    # Work on rows <= columns, where the Gram matrix is smallest; a shard contracts along the dimension it is cut in.
    transpose = x.size(-2) > x.size(-1) if shard_dim is None else shard_dim in (-2, x.dim() - 2)
    y = x.mT if transpose else x
    wide = torch.promote_types(x.dtype, torch.float32)
    square_sum = y.to(wide).square().sum(dim=(-2, -1), keepdim=True)
    if reduce is not None:
        square_sum = reduce(square_sum)
    y = (y.to(wide) / square_sum.sqrt().clamp_min(eps)).to(dtype or x.dtype)
    for a, b, c in coefficients:
        gram = y @ y.mT
        if reduce is not None:
            gram = reduce(gram.to(wide)).to(gram.dtype)  # partial sums are added in float32: bfloat16 loses bits
        y = _multiply_add(y, _multiply_add(gram, gram, gram, b, c), y, a, 1.0)
    y = y.to(x.dtype)
    return y.mT if transpose else y


def _multiply_add(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: float, alpha: float) -> torch.Tensor:
    """``beta c + alpha a b`` in one kernel for a matrix or a batch of them."""
    if c.dim() == 2:
        return torch.addmm(c, a, b, beta=beta, alpha=alpha)
    if c.dim() == 3:
        return torch.baddbmm(c, a, b, beta=beta, alpha=alpha)
    return beta * c + alpha * (a @ b)
