"""Steepest descent on the Stiefel manifold: the tangent problem, three ways to solve it, and the way back.

For W with orthonormal columns (m rows, n <= m columns, W^T W = I) and a gradient G, the steepest direction of spectral
norm 1 along the manifold solves

    max <G, Phi>   with   |Phi|_2 <= 1   and   W^T Phi + Phi^T W = 0.

Its dual is min |G + 2 W L|_* over symmetric L, and Phi = msign(G + 2 W L) where that has full rank (Bernstein,
https://thinkingmachines.ai/blog/modular-manifolds; Su, https://kexue.fm/archives/11221).

Everything works on whole batches (matrices, m, n), float32 or wider, in fixed numbers of matrix products: nothing but
the eigenvectors of :func:`fixed_point` waits for the device. The matrix sign is the package's Newton-Schulz with
coefficients that converge to 1, in the numbers given: 16 bits would leave errors of 1e-2, which add up over the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_muon.orthogonalize.coefficients import iteration
from megatron_muon.orthogonalize.newton_schulz import EPS, newton_schulz, normalized
from megatron_muon.orthogonalize.products import TorchProducts
from megatron_muon.orthogonalize.switches import without_autocast

SIGN_STEPS = 10
"""Newton-Schulz steps of a matrix sign: singular values above 3e-4 of the Frobenius norm come to 1 in all digits."""

PROJECTION_STEPS = 20
"""Newton-Schulz steps that bring a weight onto the manifold: singular values above 3e-7 of the Frobenius norm come to
1. Square Gaussian matrices have some as small as 1e-6."""


class Msign:
    """The matrix sign U V^T of U S V^T: Newton-Schulz in the dtype of its argument."""

    def __init__(self, products: TorchProducts | None = None) -> None:
        """
        Args:
            products: how to multiply; torch's by default.
        """
        self._products = products or TorchProducts()

    def __call__(self, x: torch.Tensor, steps: int = SIGN_STEPS) -> torch.Tensor:
        """(matrices, m, n) of singular values 1, or 0 where ``x`` has 0.

        Args:
            x: (matrices, m, n), float32 or wider.
            steps: of Newton-Schulz.
        """
        return newton_schulz(x, iteration("polar_express", steps), products=self._products)


msign = Msign()
"""The matrix sign with torch's products."""


def admm(weight: torch.Tensor, gradient: torch.Tensor, iterations: int, msign: Msign = msign) -> torch.Tensor:
    """Alternating directions on the dual, min |X|_* with X = G + 2 W L (Buchanan,
    https://sdbuchanan.com/blog/manifold-muon); the result is minus their multiplier Omega.

    It is feasible after any number of iterations (|Phi|_2 <= 1, to the accuracy of the matrix sign), which
    msign(G + 2 W L) is not. With P = -Omega, the thresholding X = SVT(B) of singular values and the step of Omega by
    rho (X - G - 2 W L) come to P = clip(rho B), singular values clipped at 1, and X = B - P / rho. Clipping takes two
    matrix signs; eigh would be exact, but waits for the device and is slow on it.

    The penalty is 4 for 4 columns, as published, and grows with the root of their number, as the singular values of a
    gradient of norm 1 fall: with 4 for all, ten iterations on 512 x 384 are still a quarter below the optimum.
    """
    rho = 2.0 * weight.size(-1) ** 0.5
    phi = torch.zeros_like(gradient)
    x = _plus(gradient, weight, weight.mT @ gradient, -0.5)
    for _ in range(iterations):
        residual = x.sub_(gradient).sub_(phi, alpha=1.0 / rho)
        shifted = _plus(gradient, weight, weight.mT @ residual, 0.5).add_(phi, alpha=1.0 / rho)
        phi = _clipped(rho * shifted, msign)
        x = shifted.sub_(phi, alpha=1.0 / rho)
    return phi


def dual_ascent(weight: torch.Tensor, gradient: torch.Tensor, iterations: int, msign: Msign = msign) -> torch.Tensor:
    """Descent on the dual along its subgradient W^T Phi + Phi^T W, with steps .01 (1 - t / T) (Bernstein)."""
    multiplier = -0.25 * _twice_symmetric(weight.mT @ gradient)
    for number in range(iterations):
        phi = msign(gradient + 2.0 * weight @ multiplier)
        multiplier -= 0.01 * (1.0 - number / iterations) * _twice_symmetric(weight.mT @ phi)
    return msign(gradient + 2.0 * weight @ multiplier)


def fixed_point(weight: torch.Tensor, gradient: torch.Tensor, iterations: int, msign: Msign = msign) -> torch.Tensor:
    """Phi = msign(G + W X) and X from Phi's tangency in turn (Su).

    With Q = (G + W X)^T Phi, X solves Q X + X Q = -2 sym(Q W^T G), by Q's eigenvectors. Their computation waits for the
    device on GPUs.
    """
    product = weight.mT @ gradient
    x = -0.5 * _twice_symmetric(product)
    for _ in range(iterations - 1):
        shifted = gradient + weight @ x
        q = shifted.mT @ msign(shifted)
        # Of NaN eigh raises, on the owner alone, for whom its peers would wait. The result is NaN all the same, by the
        # gradient that msign is given.
        finite = torch.nan_to_num(_twice_symmetric(q), nan=0.0, posinf=0.0, neginf=0.0)
        values, vectors = torch.linalg.eigh(0.5 * finite)
        right = vectors.mT @ _twice_symmetric(q @ product) @ vectors
        sums = values.unsqueeze(-1) + values.unsqueeze(-2)
        # Of a gradient of zeros, or one that lacks rank, sums vanish: what they divide is 0, too, but for rounding.
        floor = torch.finfo(sums.dtype).eps * sums.amax(dim=(-2, -1), keepdim=True)
        quotient = torch.where(sums > floor, right / sums, torch.zeros_like(right))
        x = -vectors @ quotient @ vectors.mT
    return msign(gradient + weight @ x)


def _admm_flops(m: int, n: int, iterations: int) -> int:
    product = 2 * m * n * n
    return 2 * product + iterations * (4 * product + _sign_flops(m, n) + _sign_flops(n, n))


def _dual_ascent_flops(m: int, n: int, iterations: int) -> int:
    product = 2 * m * n * n
    return 2 * product + _sign_flops(m, n) + iterations * (2 * product + _sign_flops(m, n))


def _fixed_point_flops(m: int, n: int, iterations: int) -> int:
    """Without the eigenvalue problems, one of n x n in each iteration but one."""
    product = 2 * m * n * n
    return 2 * product + _sign_flops(m, n) + (iterations - 1) * (2 * product + _sign_flops(m, n) + 10 * n**3)


def _sign_flops(m: int, n: int) -> int:
    return SIGN_STEPS * (4 * m * n * n + 2 * n**3)


@dataclass(frozen=True)
class Solver:
    """A way to solve the tangent problem.

    Attributes:
        solve: a function like :func:`admm`.
        iterations: its default number of iterations.
        products: operations in its matrix products, for one m x n matrix and a number of iterations.
    """

    solve: Callable[[torch.Tensor, torch.Tensor, int, Msign], torch.Tensor]
    iterations: int
    products: Callable[[int, int, int], int]

    def flops(self, p: int, q: int, iterations: int = 0) -> int:
        """Operations in the matrix products of one update, with the way back to the manifold and the residual.

        Args:
            p: the shorter side of the matrix.
            q: the longer side.
            iterations: of the solver; 0: its default.
        """
        return self.products(q, p, iterations or self.iterations) + 2 * q * p * p + _sign_flops(q, p)


SOLVERS = {
    "admm": Solver(admm, 10, _admm_flops),
    "dual_ascent": Solver(dual_ascent, 100, _dual_ascent_flops),
    "fixed_point": Solver(fixed_point, 20, _fixed_point_flops),
}
"""The solvers, by the names that ``--muon-stiefel-solver`` takes."""


@without_autocast()
def tangent(
    weight: torch.Tensor, gradient: torch.Tensor, solver: str = "admm", iterations: int = 0, msign: Msign = msign
) -> torch.Tensor:
    """The steepest tangent direction at each weight of a batch.

    Args:
        weight: (matrices, m, n) with m >= n and orthonormal columns, float32 or wider.
        gradient: of the same shape and dtype; its scale does not matter.
        solver: one of :data:`SOLVERS`.
        iterations: of the solver; 0: its default.
        msign: the matrix sign.

    Returns:
        Phi, (matrices, m, n): zeros for a gradient of zeros. How nearly it is tangent, :func:`tangency` says.
    """
    way = SOLVERS[solver]
    # Always of norm 1: the direction does not depend on the gradient's scale, but the solvers' step sizes do.
    return way.solve(weight, normalized(gradient, gradient.dtype, EPS), iterations or way.iterations, msign)


@without_autocast()
def tangency(weight: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """(matrices,): |W^T Phi + Phi^T W|_F / n, how far each direction is from the tangent space."""
    return torch.linalg.matrix_norm(_twice_symmetric(weight.mT @ direction)) / weight.size(-1)


@without_autocast()
def defect(weight: torch.Tensor) -> torch.Tensor:
    """(matrices, 1, 1): |W^T W - I|_F / sqrt(n), how far each weight is from the manifold."""
    gram = weight.mT @ weight
    gram.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return torch.linalg.matrix_norm(gram, keepdim=True) / weight.size(-1) ** 0.5


def _clipped(x: torch.Tensor, msign: Msign) -> torch.Tensor:
    """Singular values s clipped at 1: (s + 1 - |s - 1|) / 2, with the sign of s - 1 from that of H - I, X = O H.

    A sign that has not converged does no harm: where s is near 1 it is multiplied by s - 1, and where O has not, s is
    small, and O drops out.
    """
    o = msign(x)
    shifted = _twice_symmetric(o.mT @ x).mul_(0.5)
    shifted.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    sign = msign(shifted)
    difference = x - o
    return torch.baddbmm(o.add_(x), difference, sign, beta=0.5, alpha=-0.5)


def _plus(gradient: torch.Tensor, weight: torch.Tensor, product: torch.Tensor, factor: float) -> torch.Tensor:
    """G + factor W (P + P^T), as a new tensor."""
    return torch.baddbmm(gradient, weight, _twice_symmetric(product), alpha=factor)


def _twice_symmetric(x: torch.Tensor) -> torch.Tensor:
    return x + x.mT
