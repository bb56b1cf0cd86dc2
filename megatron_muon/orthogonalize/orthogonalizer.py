"""Chooses the iteration for each shape, applies it in a given precision by given kernels, and counts its operations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_muon.choices import Budget
from megatron_muon.orthogonalize.coefficients import Iteration
from megatron_muon.orthogonalize.gram import gram_iteration, polynomial_of_gram, prescale, segments
from megatron_muon.orthogonalize.newton_schulz import (
    EPS,
    Reduce,
    normalized,
    split_iteration,
    square_sums,
    standard_iteration,
    transposed_if,
)
from megatron_muon.orthogonalize.products import TorchProducts
from megatron_muon.orthogonalize.restarts import best_restarts


@dataclass(frozen=True)
class Method:
    """An iteration, as plans and reports name it.

    Attributes:
        dtype: of the iteration.
        restarts: before which steps Gram Newton-Schulz forms its Gram matrix anew; None for standard Newton-Schulz.
        products: name of the implementation of the matrix products.
    """

    dtype: str
    restarts: tuple[int, ...] | None
    products: str

    def __str__(self) -> str:
        if self.restarts is None:
            return f"standard Newton-Schulz, {self.dtype}"
        return f"Gram Newton-Schulz, {self.dtype}, restarts {', '.join(map(str, self.restarts)) or 'none'}"


class Orthogonalizer:
    """Orthogonalizes batches of m x n matrices.

    The iteration works on the shorter side, of length p, and the longer one, q: on ``X X^T`` of wide matrices and
    ``X^T X`` of tall ones. Neither is turned in memory.
    """

    batch_bytes: ClassVar[dict[str, int]] = {"cpu": 1 << 20, "cuda": 1 << 29}
    """How many bytes of matrices are iterated together: on CPUs what a core's cache holds; on GPUs as few as keep all
    multiprocessors busy."""

    def __init__(
        self,
        iteration: Iteration,
        dtype: torch.dtype,
        eps: float = EPS,
        products: TorchProducts | None = None,
        *,
        damped: bool = False,
        tf32: bool = False,
        budgeted: Callable[[Budget], Iteration] | None = None,
    ) -> None:
        """
        Args:
            iteration: what is done to matrices of norm 1.
            dtype: of the iteration: float64, float32, bfloat16 or float16.
            eps: lower bound of the norm that a matrix is divided by.
            products: how to multiply; torch's by default.
            damped: whether ``eps`` is added to the norm, rather than a lower bound of it.
            tf32: whether products of float32 may be TF32.
            budgeted: gives the iteration of matrices that have a budget of their own.
        """
        self.dtype = dtype
        self.eps = eps
        self.damped = damped
        self.products = products or TorchProducts()
        self._tf32, self._budgeted = tf32, budgeted
        self._take(iteration)

    def _take(self, iteration: Iteration) -> None:
        self.iteration, self.coefficients = iteration, iteration.coefficients
        self.restarts = best_restarts(self.coefficients, self.dtype, tf32=self._tf32)
        self._of: dict[Budget, Orthogonalizer] = {}

    def __copy__(self) -> Orthogonalizer:
        """One that has those of its own for budgets, too."""
        found = object.__new__(type(self))
        vars(found).update(vars(self), _of={})
        return found

    def of(self, budget: Budget | None) -> Orthogonalizer:
        """That of matrices with a budget: with the same dtype and kernels, and another iteration; None: itself."""
        if budget is None:
            return self
        found = self._of.get(budget)
        if found is None or found.products is not self.products:  # tools put others there
            assert self._budgeted is not None, budget
            found = self._of[budget] = copy.copy(self)
            found._take(self._budgeted(budget))
        return found

    def method(self, m: int, n: int) -> Method:
        """The cheapest iteration for m x n matrices that is accurate in this dtype."""
        return self.named(self.restarts if self._gram_pays(m, n) else None)

    def named(self, restarts: tuple[int, ...] | None) -> Method:
        """Gram Newton-Schulz with restarts, or the standard iteration (None)."""
        return Method(str(self.dtype).removeprefix("torch."), restarts, self.products.name)

    def flops(self, m: int, n: int) -> int:
        """Multiplications and additions that one m x n matrix takes."""
        p, q = sorted((m, n))
        return self.gram_flops(p, q) if self._gram_pays(p, q) else self.standard_flops(p, q)

    def standard_flops(self, p: int, q: int) -> int:
        """Operations of standard Newton-Schulz on ``p x p`` Gram matrices of matrices, or parts of matrices, p x q."""
        symmetric = self.products.symmetric_flops
        return len(self.coefficients) * (symmetric(p, q) + 2 * p * p * q) + self.squares * symmetric(p, p)

    def gram_flops(self, p: int, q: int) -> int:
        """Operations of Gram Newton-Schulz for one p x q matrix, p <= q."""
        assert self.restarts is not None
        return self.segment_count * self.rectangular_flops(p, q) + self.polynomial_flops(p)

    @property
    def squares(self) -> int:
        """In how many steps the Gram matrix is squared."""
        return sum(c != 0.0 for _, _, c in self.coefficients)

    @property
    def segment_count(self) -> int:
        """How often Gram Newton-Schulz forms a Gram matrix."""
        return 1 + len(self.restarts or ())

    def rectangular_flops(self, p: int, q: int) -> int:
        """Operations of ``X X^T`` and ``Q X`` for q columns, in one segment of Gram Newton-Schulz."""
        return self.products.symmetric_flops(p, q) + 2 * p * p * q

    def polynomial_flops(self, p: int) -> int:
        """Operations of the products of p x p matrices, in all segments of Gram Newton-Schulz."""
        # Each step but the first of a segment multiplies Q, each but the last R twice; some square R.
        products = self.squares + 3 * (len(self.coefficients) - self.segment_count)
        return products * self.products.symmetric_flops(p, p)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The orthogonalized matrices.

        Args:
            x: (batch, m, n), floating point. A zero matrix gives zeros.

        Returns:
            (batch, m, n), contiguous, in the dtype of the iteration.
        """
        return self._orthogonalized([x], False)

    def use_up(self, given: list[torch.Tensor]) -> torch.Tensor:
        """Orthogonalize the last tensor of a list, contiguous: it is taken out, and its memory overwritten or freed."""
        return self._orthogonalized(given, True)

    def _orthogonalized(self, given: list[torch.Tensor], overwrite: bool) -> torch.Tensor:
        m, n = given[-1].shape[-2:]
        each = max(1, self.batch_bytes["cuda" if given[-1].is_cuda else "cpu"] // (m * n * self.dtype.itemsize))
        if given[-1].size(0) <= each:
            return self._iterated(given, overwrite)
        x = given.pop()
        out = x if overwrite and x.dtype == self.dtype else torch.empty(x.shape, dtype=self.dtype, device=x.device)
        for matrices, target in zip(x.split(each), out.split(each), strict=True):
            target.copy_(self._iterated([matrices], overwrite))
        return out

    def _iterated(self, given: list[torch.Tensor], overwrite: bool) -> torch.Tensor:
        m, n = given[-1].shape[-2:]
        tall = m > n
        restarts = self.restarts if self._gram_pays(m, n) else None
        scale = 1.0 if restarts is None else prescale(self.dtype, min(m, n))

        def start() -> torch.Tensor:
            # Neither this nor what it is made of has a name outside: their memory is free after the first step.
            return transposed_if(self.normalized(given.pop(), scale, overwrite=overwrite), tall)

        if restarts is None:
            return transposed_if(standard_iteration(start(), self.iteration, self.products), tall)
        return transposed_if(gram_iteration(start(), self.iteration, restarts, self.products, scale), tall)

    def split(
        self, x: torch.Tensor, reduce: Reduce, scatter: Reduce, gather: Reduce, own: Reduce, dim: int = -1
    ) -> torch.Tensor:
        """Orthogonalize this rank's part of each matrix by standard Newton-Schulz that shares the square products, too.

        Args:
            x: (batch, m, n): this rank's rows or columns; may be overwritten.
            reduce: sums a tensor over the ranks.
            scatter: gives this rank's rows of the sum.
            gather: gives all rows, from the rows that each rank has.
            own: gives this rank's rows, from all.
            dim: the dimension that they share, -2 (rows) or -1 (columns); sums run along it, whichever is longer.
        """
        start = self.normalized(x, squares=reduce(square_sums(x)), overwrite=True)
        turned = transposed_if(start, dim == -2)
        found = split_iteration(turned, self.iteration, self.products, scatter, gather, own)
        return transposed_if(found, dim == -2)

    def member_flops(self, p: int, columns: float, rows: float) -> float:
        """Operations of a rank in :meth:`split` that has ``columns`` of a matrix and ``rows`` of its Gram matrix."""
        each = (self.products.symmetric_flops(p, 1) + 2 * p * p) * columns
        return len(self.coefficients) * each + self.squares * 2 * p * p * rows

    def normalized(
        self, x: torch.Tensor, scale: float = 1.0, squares: torch.Tensor | None = None, overwrite: bool = False
    ) -> torch.Tensor:
        """What the iteration starts from: see :func:`megatron_muon.orthogonalize.newton_schulz.normalized`."""
        return normalized(
            x, self.dtype, self.eps, scale=scale, squares=squares, damped=self.damped, overwrite=overwrite
        )

    def polynomials(
        self, gram: torch.Tensor, segment: int, scale: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``Q`` of one segment from Gram matrices of whole matrices, and the diagonal of S where X becomes S X first.

        Args:
            gram: (batch, p, p) of X, which has norm 1 before the first segment; may be overwritten.
            segment: its number.
            scale: of the X that it was formed of, see :func:`megatron_muon.orthogonalize.gram.prescale`.
        """
        assert self.restarts is not None
        steps = segments(self.coefficients, self.restarts)[segment]
        return polynomial_of_gram(gram, steps, self.products, scale, self.iteration.balanced and segment == 0)

    def _gram_pays(self, m: int, n: int) -> bool:
        p, q = sorted((m, n))
        return self.restarts is not None and self.gram_flops(p, q) < self.standard_flops(p, q)
