"""Slow, plain, float64: what the package is compared with."""

from __future__ import annotations

import torch

from megatron_muon.orthogonalize.coefficients import Coefficients


def singular_value_decomposition(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``U, s, V^T`` of the reduced decomposition."""
    return torch.linalg.svd(x, full_matrices=False)


def polynomial(s: torch.Tensor, steps: Coefficients) -> torch.Tensor:
    """The scalar map of the Newton-Schulz iteration."""
    for a, b, c in steps:
        s = a * s + b * s**3 + c * s**5
    return s


def with_singular_values(s: torch.Tensor, m: int, n: int, seed: int = 0) -> torch.Tensor:
    """A float64 (m, n) matrix with the given singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(m, len(s), dtype=torch.float64, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(n, len(s), dtype=torch.float64, generator=generator))[0]
    return u @ torch.diag(s) @ v.T


def orthogonalized(x: torch.Tensor, steps: Coefficients, balanced: bool = False) -> torch.Tensor:
    """What Newton-Schulz gives for ``x``, by singular values in float64.

    Turbo-Muon scales the rows of ``x``, or the columns of a tall one, instead of the whole.
    """
    x = x.double()
    if balanced and x.size(0) > x.size(1):
        return orthogonalized(x.mT, steps, True).mT
    scales = (x @ x.mT).abs().sum(1, keepdim=True).rsqrt() if balanced else 1 / x.norm()
    u, s, v = singular_value_decomposition((x * scales).nan_to_num(0.0))
    return u @ torch.diag(polynomial(s, steps)) @ v
