"""Both iterations in plain form, and how their errors are measured."""

from __future__ import annotations

import torch

from megatron_muon.orthogonalize.coefficients import (
    CUSTOM,
    TURBO,
    Coefficients,
    Iteration,
    coefficient_types,
    iteration,
)
from megatron_muon.orthogonalize.gram import gram_iteration, prescale
from megatron_muon.orthogonalize.newton_schulz import EPS, normalized, standard_iteration
from megatron_muon.orthogonalize.products import TorchProducts
from megatron_muon.orthogonalize.restarts import best_restarts
from tests.reference import polynomial

TRIPLES = ((3.4, -4.7, 2.0), (2.0, -1.5, 0.5))
EVERY_SET = (*(name for name in coefficient_types() if name != TURBO), CUSTOM)
CPU = torch.device("cpu")
HALF_NORMAL = 2.0**-14
"""The smallest normal number of float16."""


def set_of(name: str, steps: int) -> Coefficients:
    return iteration(name, steps, TRIPLES if name == CUSTOM else ()).coefficients


def gaussian(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def standard(x: torch.Tensor, steps: Coefficients, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return standard_iteration(normalized(x, dtype, EPS), Iteration(steps))


def gram(x: torch.Tensor, steps: Coefficients, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    restarts = best_restarts(steps, dtype)
    assert restarts is not None
    scale = prescale(dtype, x.size(-2))
    return gram_iteration(normalized(x, dtype, EPS, scale=scale), Iteration(steps), restarts, TorchProducts(), scale)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float(torch.linalg.vector_norm(found.double() - expected) / torch.linalg.vector_norm(expected))


def tolerance(x: torch.Tensor, steps: Coefficients) -> float:
    """1e-12 in float64, more only where the polynomial is steep: at 1, the singular value of a single row, by ``cans``.

    Its slope there is 5e4, and multiplies the rounding of the norm.
    """
    s = torch.linalg.svdvals(x)
    s = (s / s.norm(dim=-1, keepdim=True)).requires_grad_()
    (slope,) = torch.autograd.grad(polynomial(s, steps).sum(), s)
    return max(1e-12, torch.finfo(torch.float64).eps * float(slope.abs().max()))
