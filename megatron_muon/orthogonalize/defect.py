"""How far from orthogonal Newton-Schulz leaves a matrix, told from its singular values: nothing is iterated.

It makes p(s) of each singular value s of ``X / ||X||_F`` (balanced, if the set is), whatever the others are: those of
one matrix tell of any number of steps and any coefficients.
"""

from __future__ import annotations

import functools

import torch

from megatron_muon.orthogonalize.coefficients import Iteration
from megatron_muon.orthogonalize.newton_schulz import balance_

_SMALL = 32
"""Sizes from which on the quarter circle law holds well enough."""


def singular_values(x: torch.Tensor, balanced: bool = False) -> torch.Tensor:
    """Those of ``x / ||x||_F``, (min(m, n),), float64, ascending, but for what is below 1e-8; 0 of zeros and of NaN.

    Args:
        x: (m, n), floating point.
        balanced: of that after :func:`megatron_muon.orthogonalize.newton_schulz.balance_`.
    """
    wide = x.double() if x.size(0) <= x.size(1) else x.mT.double()
    largest = wide.abs().amax()  # squares of the smallest and the largest numbers have no place even in float64
    wide = torch.where((largest > 0) & largest.isfinite(), wide / largest, 0.0)
    gram = wide @ wide.mT
    gram /= gram.trace().clamp_min(1e-300)
    if balanced:
        balance_(gram[None])
    return torch.linalg.eigvalsh(gram).clamp_min_(0.0).sqrt_()


def defect(s: torch.Tensor, iteration: Iteration) -> float:
    """Root mean square of p(s) - 1: 0 of an orthogonal result, 1 of one that has not left 0.

    Args:
        s: singular values of matrices of norm 1, float64.
        iteration: p.
    """
    for a, b, c in iteration.coefficients:
        square = s * s
        s = s * (a + square * (b + square * c))
    return float((s - 1.0).square_().mean().sqrt())


@functools.cache
def random_defect(p: int, iteration: Iteration) -> float:
    """:func:`defect` of a p x p matrix of independent Gaussian entries: of small ones, root mean square over many.

    Of large ones by the quarter circle law: the density of sqrt(p) s is sqrt(4 - x^2) / pi, in 0 .. 2. Balancing
    divides by the sum of a row of its Gram matrix: 1 / p in the diagonal, and normal numbers of variance p^-3.
    """
    if p < _SMALL:
        some = torch.randn(1 + 512 // p, p, p, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        return defect(torch.cat([singular_values(x, iteration.balanced) for x in some]), iteration)
    x = torch.linspace(0.0, 2.0, 1 << 16, dtype=torch.float64)
    shares = (x * (4.0 - x * x).sqrt() / 2.0 + 2.0 * (x / 2.0).asin()) / torch.pi
    quantiles = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    row = 1.0 / p + (p - 1) * (2.0 / torch.pi / p**3) ** 0.5 if iteration.balanced else 1.0
    return defect(x[torch.searchsorted(shares, quantiles)] / (p * row) ** 0.5, iteration)


def rounding(p: int, q: int, dtype: torch.dtype) -> float:
    """About the largest singular value of what rounding adds to a p x q matrix of norm 1: smaller ones drown in it."""
    return torch.finfo(dtype).eps / 4.0 * (p**-0.5 + q**-0.5)
