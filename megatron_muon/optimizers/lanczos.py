"""Singular values of many matrices at once, as far as products with a few vectors tell them, and nobody waits.

Each matrix A, of shorter side p, has the Gram matrix G of that side. Lanczos' iteration from a unit vector v leads to a
small tridiagonal matrix T, whose largest eigenvalue comes near to that of G from below, and which gives v^T f(G) v for
smooth functions f as e_1^T f(T) e_1 (Gauss quadrature: Golub and Meurant, *Matrices, Moments and Quadrature with
Applications*). The mean over vectors of random signs estimates tr f(G) / p (stochastic Lanczos quadrature: Ubaru, Chen
and Saad, SIAM J. Matrix Anal. Appl. 38, 2017). With k vectors its relative standard deviation is at most
sqrt(2 / (k p_eff)), where p_eff is the number of directions that the trace is a sum of. Where p is small the vectors
are a basis, and nothing is random.

What T tells is found by :mod:`megatron_muon.optimizers.quadrature`; :mod:`megatron_muon.optimizers.spectra` has
matrices brought together for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from megatron_muon.optimizers.matrices import Update, first_row_of
from megatron_muon.optimizers.power import noise_of
from megatron_muon.optimizers.quadrature import Diagonals

STEPS = 8
"""Of the iteration. The largest eigenvalue of the Gram matrix of a large random square matrix, whose spectrum ends
without a gap, is found to about (pi / (2 STEPS + 1))^2 = 3.4 %, the singular value to half as much."""

Start = Callable[[Update, torch.Tensor], torch.Tensor]
"""Gives vectors to start from for a tensor of an update, (its shorter side on this rank, vectors)."""

_BUDGET = 4096
"""Vectors of signs times p, at least; see the module."""

_FEWEST, _MOST = 2, 64
"""Vectors of signs. Where p is ``_MOST`` or less they are a basis."""

_BROKEN = 1e-10
"""Norm of what is left of a vector that ends the iteration, where the matrix has a norm of about 1."""


class Run:
    """The iterations of all matrices of one update: (matrices, vectors, .), vectors of all tensors one after the other.

    Attributes:
        sums_short: whether tensor parallelism divides the shorter side, the one of T's vectors, if any.
        alphas: the diagonals of T so far, (matrices, vectors, 1) each.
        betas: what is beside the diagonals, after the norms of the vectors that it started from.
    """

    def __init__(self, update: Update, tensors: Sequence[torch.Tensor], starts: Sequence[torch.Tensor]) -> None:
        is_wide = update.rows <= update.columns
        self.sums_short = update.divides_shorter
        self._tensors = [tensor if is_wide else tensor.mT for tensor in tensors]
        self._widths = [start.size(-1) for start in starts]
        self._next = torch.cat([start.mT for start in starts], dim=-2).expand(tensors[0].size(0), -1, -1)
        self._vector = self._before = self._other = self._next
        self.alphas: list[torch.Tensor] = []
        self.betas: list[torch.Tensor] = []

    def to_longer(self) -> list[torch.Tensor]:
        """A^T z of this rank's z, and its square."""
        return [self._times(self._next, True), self._next.square().sum(dim=-1, keepdim=True)]

    def at_longer(self, product: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """Take these sums over the shorter side; returns A (A^T v)."""
        beta = square.sqrt()
        factor = torch.where(beta > _BROKEN, beta.reciprocal(), 0.0)
        self.betas.append(beta)
        self._before, self._vector = self._vector, self._next * factor
        self._other = product.mul_(factor)
        return self._times(self._other, False)

    def at_shorter(self, product: torch.Tensor) -> None:
        """Take this sum over the longer side: what is left of it is the next vector."""
        # |A^T v|^2 = v^T A A^T v, by that of both sides which this rank has all of.
        pair = (self._other, self._other) if self.sums_short else (self._vector, product)
        alpha = (pair[0] * pair[1]).sum(dim=-1, keepdim=True)
        product.addcmul_(alpha, self._vector, value=-1.0)
        if self.alphas:
            product.addcmul_(self.betas[-1], self._before, value=-1.0)
        self.alphas.append(alpha)
        self._next = product

    def results(self) -> list[Diagonals]:
        """Diagonals and what is beside them, for each tensor: (matrices, vectors, STEPS) and one less."""
        alphas = torch.cat(self.alphas, dim=-1).split(self._widths, dim=-2)
        betas = torch.cat(self.betas, dim=-1)[..., 1:].split(self._widths, dim=-2)
        return [Diagonals(*pair) for pair in zip(alphas, betas, strict=True)]

    def _times(self, vectors: torch.Tensor, transposed: bool) -> torch.Tensor:
        pairs = zip(self._tensors, vectors.split(self._widths, dim=-2), strict=True)
        # By rows: on CPUs products of transposed matrices with columns take three times as long.
        products = [vector @ (a if transposed else a.mT) for a, vector in pairs]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-2)


def together(
    add_up: Callable[[list[torch.Tensor]], list[torch.Tensor]], runs: Sequence[Run], steps: int
) -> list[list[Diagonals]]:
    """Take the steps of some runs, each step of all together: T of each tensor of each run."""
    for _ in range(steps):
        pairs = [(run, run.to_longer()) for run in runs]
        sums = iter(add_up([part for run, two in pairs if run.sums_short for part in two]))
        products = [run.at_longer(*([next(sums), next(sums)] if run.sums_short else two)) for run, two in pairs]
        sums = iter(add_up([z for run, z in zip(runs, products, strict=True) if not run.sums_short]))
        for run, product in zip(runs, products, strict=True):
            run.at_shorter(product if run.sums_short else next(sums))
    return [run.results() for run in runs]


def by_gram(gram: torch.Tensor, start: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Diagonals of T and what is beside them: with Gram matrices in place of two products a step."""
    vector = last = start.mT.expand(gram.size(0), -1, -1)
    alphas, betas = list[torch.Tensor](), list[torch.Tensor]()
    for _ in range(steps):
        beta = last.square().sum(dim=-1, keepdim=True).sqrt()
        before, vector = vector, last * torch.where(beta > _BROKEN, beta.reciprocal(), 0.0)
        last = vector @ gram
        alphas.append((vector * last).sum(dim=-1, keepdim=True))
        last.addcmul_(alphas[-1], vector, value=-1.0)
        if betas:
            last.addcmul_(beta, before, value=-1.0)
        betas.append(beta)
    return torch.cat(alphas, dim=-1), torch.cat(betas, dim=-1)[..., 1:]


def signs(update: Update, tensor: torch.Tensor) -> torch.Tensor:
    """Vectors for traces, (shorter side on this rank, vectors): random signs, or a basis where that is small."""
    p, first, size = side(update, tensor)
    count = min(max(-(-_BUDGET // p), _FEWEST), _MOST)
    return _vectors(p, first, size, 0 if p <= _MOST else count, tensor.device, tensor.dtype)


def noise(update: Update, tensor: torch.Tensor) -> torch.Tensor:
    """Two vectors for largest singular values, (shorter side on this rank, 2): noise, orthogonal to no direction."""
    p, first, size = side(update, tensor)
    return _vectors(p, first, size, -2, tensor.device, tensor.dtype)


def side(update: Update, tensor: torch.Tensor) -> tuple[int, int, int]:
    """The shorter side p, the number of this rank's first entry of it, and how many it has."""
    if update.rows > update.columns:
        size = tensor.size(-1)
        return update.columns, update.first_column if size < update.columns else 0, size
    size = tensor.size(-2)
    if size == update.rows:
        return update.rows, 0, size
    return update.rows, first_row_of(update.slices), size


@functools.cache
def _vectors(p: int, first: int, size: int, count: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(size, vectors): of signs; noise where ``count`` is negative; a basis where it is 0. The same on all devices."""
    if count == 0:
        return torch.eye(p, device=device, dtype=dtype)[first : first + size]
    found = noise_of(max(p, first + size) * abs(count), device).view(-1, abs(count))[first : first + size].to(dtype)
    return found if count < 0 else torch.where(found < 0, -1.0, 1.0).to(dtype)
