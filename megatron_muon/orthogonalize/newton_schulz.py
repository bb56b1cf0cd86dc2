"""The Newton-Schulz iteration: an approximation of ``U V^T`` for ``X = U S V^T``, in matrix products alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from megatron_muon.orthogonalize.coefficients import Iteration
from megatron_muon.orthogonalize.products import TorchProducts
from megatron_muon.orthogonalize.switches import without_autocast

EPS = 1e-36
"""Default of the lower bound of norms: so small that updates do not depend on the gradient's scale, which global
clipping may bring to 1e-9 and less where one weight's gradient is huge. It is the smallest power of ten by which powers
of two up to 2^8, the scales of float16, can be divided in float32; entries of matrices of such norms have lost bits.
That momentum fades away where gradients stop is not its matter: optimizers see to it.
"""

Reduce = Callable[[torch.Tensor], torch.Tensor]
"""Sums a tensor over the ranks that share a matrix; may work in place; returns the sum."""

_TORCH = TorchProducts()


def newton_schulz(
    x: torch.Tensor,
    iteration: Iteration,
    *,
    dtype: torch.dtype | None = None,
    eps: float = EPS,
    shard_dim: int | None = None,
    reduce: Reduce | None = None,
    products: TorchProducts = _TORCH,
) -> torch.Tensor:
    """Orthogonalize each matrix of a batch by the standard iteration.

    With singular values s of ``x / ||x||_F`` the result has the singular values p(s), where p is the composition of
    the odd polynomials ``a s + b s^3 + c s^5``, and the singular vectors of ``x``.

    Args:
        x: (..., m, n), floating point. A zero matrix gives zeros, one without elements itself.
        iteration: what is done to the matrices, see :func:`megatron_muon.orthogonalize.iteration`.
        dtype: of the iteration; that of ``x`` by default. The norm is always taken in float64.
        eps: lower bound of the norm that a matrix is divided by.
        shard_dim: the rows (-2) or columns (-1), also counted from the front, if ``x`` is this rank's shard of a
            matrix that is divided along them; the contraction then runs along that dimension and ``reduce`` sums what
            the ranks hold.
        reduce: required with ``shard_dim``. Both are refused where rows are balanced.
        products: how to multiply.

    Returns:
        (..., m, n) in the dtype of ``x``.

    Raises:
        ValueError: for what has fewer than two dimensions or other numbers, or a shard in a form that it cannot have.

    Source:
        Jordan et al., https://kellerjordan.github.io/posts/muon; sharded form: ``newton_schulz_tp`` in
        emerging-optimizers, mode ``distributed``.
    """
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(
            f"newton_schulz of shape {tuple(x.shape)}, {x.dtype}: give matrices (..., m, n) of real numbers"
        )
    if (shard_dim is None) != (reduce is None):
        raise ValueError("shard_dim and reduce belong together")
    if iteration.balanced and shard_dim is not None:
        raise ValueError("a shard does not tell which side of a matrix is the shorter, whose rows are balanced")
    # The Gram matrix of the shorter side is the smallest; a shard contracts along the dimension it is cut in.
    tall = x.size(-2) > x.size(-1) if shard_dim is None else shard_dim in (-2, x.dim() - 2)
    batch = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    squares = None if reduce is None else reduce(square_sums(batch))
    batch = transposed_if(normalized(batch, dtype or x.dtype, eps, squares=squares), tall)
    batch = standard_iteration(batch, iteration, products, reduce)
    return transposed_if(batch, tall).view(x.shape).to(x.dtype)


def transposed_if(x: torch.Tensor, tall: bool) -> torch.Tensor:
    """Tall matrices as their transposes, which are wide, and back again: a view, nothing is turned in memory."""
    return x.mT if tall else x


def square_sums(x: torch.Tensor) -> torch.Tensor:
    """(batch, 1, 1), float64: the squares of the norms. In float32 the square of a norm of 2e19 would be infinite."""
    return _norms(x).square_()


def _norms(x: torch.Tensor) -> torch.Tensor:
    if x.is_cuda and x.size(0):  # vector_norm converts all of x first, which takes up to four times its memory
        return torch.stack(torch._foreach_norm(x.unbind(0), 2, torch.float64)).view(-1, 1, 1)
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float64)


def normalized(
    x: torch.Tensor,
    dtype: torch.dtype,
    eps: float,
    *,
    scale: float = 1.0,
    squares: torch.Tensor | None = None,
    damped: bool = False,
    overwrite: bool = False,
) -> torch.Tensor:
    """``scale * x / ||x||_F``, rounded once to ``dtype``.

    Args:
        x: (batch, m, n).
        dtype: of the result, which is contiguous. The norm is taken in float64, where squares of all float32 numbers
            have their place.
        eps: lower bound of the norm.
        scale: a power of two.
        squares: :func:`square_sums` of the whole matrices, if ``x`` is a shard of each. They are overwritten.
        damped: add ``eps`` to the norm instead (arXiv 2512.05620).
        overwrite: write the result over ``x`` if that has its dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = _norms(x) if squares is None else squares.sqrt_()
    factor = (norm.add_(eps) if damped else norm.clamp_min_(eps)).reciprocal_()
    if scale != 1.0:
        factor.mul_(scale)
    if eps * torch.finfo(wide).max < scale:
        factor.clamp_max_(torch.finfo(wide).max)
    out = x if overwrite and x.dtype == dtype else torch.empty(x.shape, dtype=dtype, device=x.device)
    return torch.mul(x, factor.to(wide), out=out)  # in ``wide``, rounded once


def balance_(gram: torch.Tensor) -> torch.Tensor:
    """``S A S`` in place of Gram matrices A, with the diagonal S that bounds its eigenvalues by the trace of A.

    Args:
        gram: (batch, p, p), ``X X^T``.

    Returns:
        (batch, p, 1): S; ``S X`` has the Gram matrix ``S A S``. S is the norm of X (1, but where the norm is below its
        lower bound), divided by the root of the sums of the rows of ``|A|``. Zeros stay zeros.

    Source:
        Almost-orthogonal layers, arXiv 2208.03160; before Newton-Schulz: Turbo-Muon, arXiv 2512.04632, which does not
        multiply by the norm, so that the smallest gradients get updates of full size.
    """
    rows = torch.linalg.vector_norm(gram, 1, dim=-1, keepdim=True, dtype=torch.promote_types(gram.dtype, torch.float32))
    norm = gram.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=rows.dtype).sqrt_().view(-1, 1, 1)
    factors = rows.clamp_min_(torch.finfo(gram.dtype).tiny).rsqrt_().mul_(norm).to(gram.dtype)
    gram.mul_(factors).mul_(factors.mT)
    return factors


def standard_iteration(
    x: torch.Tensor, iteration: Iteration, products: TorchProducts = _TORCH, reduce: Reduce | None = None
) -> torch.Tensor:
    """``X <- a X + (b A + c A A) X`` with ``A = X X^T``, once for each (a, b, c).

    Args:
        x: (batch, p, q) of Frobenius norm at most 1, in the dtype of the iteration; the result lies in memory as it
            does, see :class:`megatron_muon.orthogonalize.products.TorchProducts`. Overwritten if it is balanced.
        iteration: the steps.
        products: how to multiply.
        reduce: sums A over the ranks, if ``x`` is this rank's columns of each matrix.
    """
    with without_autocast():
        for number, (a, b, c) in enumerate(iteration.coefficients):
            z = products.gram(x)
            if reduce is not None:  # partial sums are added in float32: bfloat16 loses bits
                z = reduce(z.to(torch.promote_types(z.dtype, torch.float32))).to(z.dtype)
            if number == 0 and iteration.balanced:
                x.mul_(balance_(z))
            z, b = quadratic(z, b, c, products)  # the Gram matrix is gone before there is another X
            x = products.multiply_add(x, z, a, b)
            del z
    return x


def quadratic(gram: torch.Tensor, b: float, c: float, products: TorchProducts) -> tuple[torch.Tensor, float]:
    """``b A + c A A``, as a matrix and its factor: nothing is squared for c = 0."""
    return (products.quadratic(gram, b, c), 1.0) if c else (gram, b)


def split_iteration(
    x: torch.Tensor, iteration: Iteration, products: TorchProducts, scatter: Reduce, gather: Reduce, own: Reduce
) -> torch.Tensor:
    """:func:`standard_iteration` of a matrix whose columns several ranks have: each computes some rows of ``A A`` too.

    Args:
        x: (batch, p, columns of this rank) of whole matrices of Frobenius norm at most 1; may be overwritten.
        iteration: the steps.
        products: how to multiply.
        scatter: this rank's rows of the sum over the ranks.
        gather: all rows, from those of each rank.
        own: this rank's rows, from all.
    """
    with without_autocast():
        for number, (a, b, c) in enumerate(iteration.coefficients):
            rows = scatter(products.gram(x).to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)
            z = gather(rows)
            if number == 0 and iteration.balanced:
                x.mul_(balance_(z))
                rows = own(z)
            if c:
                z = torch.baddbmm(rows, rows, z, beta=b, alpha=c)  # the Gram matrix is gone before all rows are there
                z, b = gather(z), 1.0
            x = products.multiply_add(x, z, a, b)
            del z
    return x
