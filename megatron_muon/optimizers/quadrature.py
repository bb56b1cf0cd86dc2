"""What small tridiagonal matrices T tell of singular values: the largest, and sums over all; nobody waits.

Functions of T are found without its eigenvalues: e_1^T (T - x)^-1 e_1 is a continued fraction, computed for many x at
once, and f a sum of such terms. See :mod:`megatron_muon.optimizers.lanczos`, where T comes from.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import pad


class Diagonals(NamedTuple):
    """Of T, for some matrices and vectors.

    Attributes:
        alphas: (matrices, vectors, steps).
        betas: what is beside them, (matrices, vectors, steps - 1).
        first: number of the first of the matrices that this rank has T of, where ranks have looked at a share each;
            None: each has T of all of them.
        total: number of all of them, if it has a share.
    """

    alphas: torch.Tensor
    betas: torch.Tensor
    first: int | None = None
    total: int = 0

    def of_all(self, numbers: torch.Tensor, missing: float) -> torch.Tensor:
        """Numbers of these matrices, (matrices,), among those of all, others as ``missing``."""
        if self.first is None:
            return numbers
        return pad(numbers, (self.first, self.total - self.first - numbers.size(0)), value=missing)


_STEEPNESS = 16
"""n of 1 / (1 + (4 s^2)^n), which counts singular values s below 1/2: 0.97 at 0.45, 0.05 at 0.55. Spectra that T knows
in eight steps are no sharper."""


def evaluated(spectra: Sequence[dict[str, Diagonals]]) -> list[dict[str, torch.Tensor]]:
    """What all T together tell: largest singular values by name, and of results ``unlifted`` and ``defect``.

    Returns:
        (matrices,) for each, NaN where another rank has T.
    """
    found: list[dict[str, torch.Tensor]] = [{} for _ in spectra]
    places = [(its, name, pair) for its, each in zip(found, spectra, strict=True) for name, pair in each.items()]
    if not places:
        return found
    pairs = [pair for _, _, pair in places]
    for (its, name, pair), top in zip(places, of_each(_largest_singular, pairs)[0], strict=True):
        its[name] = pair.of_all(top.amax(dim=-1), math.nan)
    results = [(its, pair) for its, name, pair in places if name == "result"]
    below, squares = of_each(quadratures, [pair for _, pair in results])
    for (its, pair), share, square in zip(results, below, squares, strict=True):
        its["unlifted"] = pair.of_all(share.mean(dim=-1).clamp(0.0, 1.0), math.nan)
        its["defect"] = pair.of_all(square.mean(dim=-1).clamp_min(0.0).sqrt(), math.nan)
    return found


def of_each(
    function: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]], pairs: Sequence[Diagonals]
) -> list[list[torch.Tensor]]:
    """Numbers of each T, (matrices, vectors) for each pair: computed together, NaN where T is not finite."""
    parts = [each.alphas for each in pairs], [each.betas for each in pairs]
    alphas, betas = (torch.cat([part.flatten(0, 1) for part in its]).double() for its in parts)
    are_finite, shapes = alphas.sum(dim=-1).isfinite(), [each.alphas.shape[:2] for each in pairs]
    found, sizes = function(alphas, betas), [m * k for m, k in shapes]
    cut = (torch.where(are_finite, values, torch.nan).split(sizes) for values in found)
    return [[part.view(shape) for part, shape in zip(each, shapes, strict=True)] for each in cut]


def largest(alphas: torch.Tensor, betas: torch.Tensor, squarings: int = 8) -> tuple[torch.Tensor]:
    """The largest eigenvalue of each T, from below: to 1e-4 of it where the second is 2 % less, to 1 % anyhow.

    A mean of the eigenvalues with their 256th powers as weights, so that it takes a dozen kernels.

    Args:
        alphas: diagonals, (..., steps), float64.
        betas: what is beside them, (..., steps - 1).
        squarings: 8, or more for higher powers: with 20 of them it is to 4e-7, whatever else T has.
    """
    matrix = torch.diag_embed(alphas) + torch.diag_embed(betas, 1) + torch.diag_embed(betas, -1)
    # No eigenvalue is larger, and the largest, as T has no negative ones, is a third of it or more.
    bound = matrix.sum(dim=-1).amax(dim=-1).clamp_min(torch.finfo(alphas.dtype).tiny)
    power = matrix / bound[..., None, None]
    for number in range(squarings):
        if number >= 8:  # before it is too small
            trace = power.diagonal(dim1=-2, dim2=-1).sum(dim=-1).clamp_min(torch.finfo(alphas.dtype).tiny)
            power = power / trace[..., None, None]
        power = power @ power
    weight = power.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return (torch.where(weight > 0, (power * matrix).sum(dim=(-2, -1)) / weight, 0.0),)


def _largest_singular(alphas: torch.Tensor, betas: torch.Tensor) -> tuple[torch.Tensor]:
    return (largest(alphas, betas)[0].clamp_min(0.0).sqrt(),)


def quadratures(alphas: torch.Tensor, betas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e_1^T f(T) e_1 for two functions of singular values s: below 1/2 or not, and (s - 1)^2.

    Args:
        alphas: diagonals, (..., steps), float64.
        betas: what is beside them, (..., steps - 1).
    """
    poles, distances, weights = _terms(alphas.device)
    shifts = torch.cat([poles, -distances.to(poles.dtype)])
    second = first = alphas.new_ones((), dtype=poles.dtype)
    for level in _levels(alphas.to(poles.dtype), betas.to(poles.dtype), shifts):
        second, first = first, level
    below = -(2.0 / _STEEPNESS) * (poles / first[..., : poles.numel()]).sum(dim=-1).real
    # (s - 1)^2 = (s^2 - 1)^2 / (1 + s)^2: the first factor as it is, so that nothing cancels near 1.
    first, second = first[..., poles.numel() :].real, second[..., poles.numel() :].real
    a, b = alphas[..., :1] - 1.0, betas[..., :1]
    if not betas.size(-1):
        return below, (weights * a.square() / first).sum(dim=-1)
    norm = a.square() * second - 2.0 * a * b.square() + b.square() * (alphas[..., :1] + distances)
    return below, (weights * norm / (first * second)).sum(dim=-1)


@functools.cache
def _terms(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Poles of the function that counts, above the real line; d and w of 1 / (1 + s)^2 = sum of w / (s^2 + d)."""
    each = torch.arange(_STEEPNESS // 2, device=device, dtype=torch.float64)
    poles = 0.25 * torch.polar(torch.ones_like(each), math.pi * (2.0 * each + 1.0) / _STEEPNESS)
    # 1 / (1 + s)^2 = (2 / pi) int_0^inf sqrt(d) / ((1 + d)^2 (s^2 + d)) dd, by the trapezoidal rule in log d: to 1e-3.
    roots = torch.exp(0.8 * torch.arange(-10, 7, device=device, dtype=torch.float64))
    weights = (4.0 / math.pi) * 0.8 * roots**3 / (1.0 + roots.square()).square()
    return poles, roots.square(), weights


def _levels(alphas: torch.Tensor, betas: torch.Tensor, shifts: torch.Tensor) -> Iterator[torch.Tensor]:
    """The diagonal of U in T - x = U D U^T, from its last entry to its first: 1 / e_1^T (T - x)^-1 e_1.

    Args:
        alphas: (..., steps).
        betas: (..., steps - 1).
        shifts: x, (..., many).

    Yields:
        (..., many).
    """
    diagonals, squares = alphas[..., None] - shifts, betas[..., None].square()
    level = diagonals[..., -1, :]
    for index in range(alphas.size(-1) - 1, -1, -1):
        if index < alphas.size(-1) - 1:
            level = diagonals[..., index, :] - squares[..., index, :] / level
        level = torch.where(level == 0, 1e-300, level)
        yield level
