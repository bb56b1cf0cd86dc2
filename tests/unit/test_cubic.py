"""Steps without a square: no product and no pass that is not needed, in any form of the iteration."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_muon.orthogonalize import Iteration, Orthogonalizer, iteration
from megatron_muon.orthogonalize.gram import polynomial_of_gram
from megatron_muon.orthogonalize.newton_schulz import split_iteration
from megatron_muon.orthogonalize.products import BlockProducts, TorchProducts
from tests.iterations import error, gaussian
from tests.reference import orthogonalized, polynomial

CUBIC = iteration("cubic5", 5)
MIXED = Iteration(((3.0, -2.0, 0.0), (3.4, -4.7, 2.0), (2.5, -1.4, 0.0), (2.0, -1.5, 0.5)))


class Half(TorchProducts):
    """Counts products with a symmetric result as half, as kernels that compute one triangle do."""

    def __init__(self) -> None:
        self.flops = 0

    def symmetric_flops(self, p: int, inner: int) -> int:
        return p * p * inner

    def _counted(self, p: int, inner: int) -> None:
        self.flops += self.symmetric_flops(p, inner)

    def gram(self, x: torch.Tensor) -> torch.Tensor:
        self._counted(*x.shape[-2:])
        return super().gram(x)

    def quadratic(self, r: torch.Tensor, b: float, c: float) -> torch.Tensor:
        self._counted(*r.shape[-2:])
        return super().quadratic(r, b, c)

    def commuting(self, r: torch.Tensor, z: torch.Tensor, a: float, b: float = 1.0) -> torch.Tensor:
        self._counted(*r.shape[-2:])
        return super().commuting(r, z, a, b)

    def apply(self, q: torch.Tensor, x: torch.Tensor, alpha: float) -> torch.Tensor:
        self.flops += 2 * q.size(-1) * x[0].numel()
        return super().apply(q, x, alpha)

    def multiply_add(self, x: torch.Tensor, z: torch.Tensor, a: float, b: float = 1.0) -> torch.Tensor:
        self.flops += 2 * z.size(-1) * x[0].numel()
        return super().multiply_add(x, z, a, b)


@pytest.mark.parametrize("ratio", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_operations_are_those_of_the_formulas_and_those_done(dtype: torch.dtype, ratio: int) -> None:
    p, steps = 8, CUBIC
    iterate = Orthogonalizer(steps, dtype, products=Half())
    assert iterate.standard_flops(p, ratio * p) == 15 * ratio * p**3
    if dtype in (torch.float64, torch.float32):
        assert iterate.gram_flops(p, ratio * p) == (3 * ratio + 12) * p**3
    for shape in ((p, ratio * p), (ratio * p, p)):
        iterate.products.flops = 0
        iterate(gaussian(1, *shape, dtype=dtype))
        assert iterate.products.flops == iterate.flops(*shape)


@pytest.mark.parametrize("products", [TorchProducts(), BlockProducts(4)], ids=lambda products: products.name)
@pytest.mark.parametrize("steps", [CUBIC, MIXED], ids=["cubic", "mixed"])
def test_it_is_the_polynomial(steps: Iteration, products: TorchProducts) -> None:
    for m, n in ((16, 16), (16, 80), (80, 16), (1, 9)):
        x = gaussian(2, m, n)
        expected = torch.stack([orthogonalized(each, steps.coefficients) for each in x])
        assert error(Orthogonalizer(steps, torch.float64, products=products)(x), expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["shifted", "not shifted"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_polynomials_of_the_gram_matrix(dtype: torch.dtype, scale: float) -> None:
    """Both ways to form ``R (a + b R)``: exact types add a to the diagonal, others to the product."""
    for steps in (CUBIC.coefficients[2:], CUBIC.coefficients[:1], MIXED.coefficients):
        x = gaussian(2, 12, 20) / 20
        found, factors = polynomial_of_gram((scale**2 * x @ x.mT).to(dtype), steps, TorchProducts(), scale)
        s = torch.linalg.svdvals(x)
        u = torch.linalg.svd(x, full_matrices=False)[0]
        expected = u @ torch.diag_embed(polynomial(s, steps) / s) @ u.mT
        assert factors is None and found.dtype == dtype
        assert error(found, expected) < (1e-12 if dtype == torch.float64 else 2e-3)


@pytest.mark.parametrize("steps", [CUBIC, MIXED], ids=["cubic", "mixed"])
def test_split_gathers_once_in_a_step_without_a_square(steps: Iteration) -> None:
    """As one rank of one; the exchange of several is in tests/distributed."""
    gathers: list[int] = []

    def gather(rows: torch.Tensor) -> torch.Tensor:
        gathers.append(rows.size(1))
        return rows

    x = torch.nn.functional.normalize(gaussian(1, 6, 30), dim=(-2, -1))
    found = split_iteration(x.clone(), steps, TorchProducts(), lambda z: z, gather, lambda z: z)
    assert error(found[0], orthogonalized(x[0], steps.coefficients)) < 1e-12
    assert len(gathers) == len(steps.coefficients) + sum(c != 0 for _, _, c in steps.coefficients)


def test_results_of_any_number_of_steps_stay_in_the_band() -> None:
    """The published range, 0.774 to 1.30, of five steps from 0.007 on; fewer and more keep it, from other values on."""
    for steps, least in ((3, 0.13), (4, 0.03), (5, 0.007), (6, 0.004), (8, 0.001)):
        s = polynomial(torch.linspace(least, 1, 4000, dtype=torch.float64), iteration("cubic5", steps).coefficients)
        assert float(s.min()) > 0.77 and float(s.max()) < 1.301, steps


def test_custom_sets_are_cut_into_segments_by_their_own_gain() -> None:
    steps = ((2.0, -1.0, 0.0),) * 3
    iterate = Orthogonalizer(Iteration(steps), torch.float32, products=Half())
    assert iterate.restarts == () and iterate.squares == 0
    for p, ratio in itertools.product((4, 8), (1, 2, 6)):
        assert iterate.flops(p, ratio * p) == min(9 * ratio, 3 * ratio + 6) * p**3
