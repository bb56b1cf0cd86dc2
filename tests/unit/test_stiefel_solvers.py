"""Solvers of the tangent problem on the Stiefel manifold: published numbers, closed forms, feasibility."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_muon import Muon
from megatron_muon.optimizers.stiefel import StiefelMuon
from megatron_muon.optimizers.stiefel_solvers import PROJECTION_STEPS, SOLVERS, defect, msign, tangency, tangent
from megatron_muon.routing.layout import STIEFEL, MatrixLayout
from tests.pairwise import pairwise

# Su's numerical example (https://kexue.fm/archives/11221): W with orthonormal columns to its six digits, and G.
W = """
 0.69453734 -0.26590866 -0.44721806  0.2753041
-0.11738148 -0.5588003  -0.17580748  0.3218624
-0.4515288  -0.23489913 -0.26683152 -0.25739142
 0.02392521  0.02664689  0.48423648  0.6193399
 0.45194831 -0.25206333  0.27654836 -0.60242337
 0.21197332 -0.09174792  0.24521762 -0.08484317
-0.15496767 -0.26446804 -0.34942415 -0.01877318
-0.16181251 -0.6474956   0.45243263 -0.01776086
"""
G = """
-17.85745   -10.758921  -2.9583392   6.245008
-28.883093   19.772121   8.086545  -21.564013
 -1.6274693 -14.96859    3.4465332   3.1070817
 -7.8890743   1.5304767 -8.949573    9.579629
  2.246596   14.46572   12.8451     -2.7370298
 -0.9496974   6.9879804  2.849277    1.1148484
 -8.115278  -18.054405  -0.19287404  7.0389237
-15.062008  -15.02901    2.9083247  21.706533
"""


def parsed(text: str) -> torch.Tensor:
    return torch.tensor([[float(x) for x in line.split()] for line in text.split("\n") if line], dtype=torch.float64)


def sample(m: int, n: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(1, m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def on_manifold(m: int, n: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(sample(m, n, seed))[0]


def test_the_unconstrained_optimum() -> None:
    assert torch.linalg.matrix_norm(parsed(G), "nuc").item() == pytest.approx(122.326, abs=1e-3)


@pytest.mark.parametrize(
    ("solver", "iterations", "objective", "digits", "residual"),
    [
        ("fixed_point", 1, 115.14, 5e-3, 0.25),
        ("fixed_point", 10, 90.73, 5e-3, 7e-3),
        ("fixed_point", 20, 90.02, 5e-3, 1.4e-3),
        ("fixed_point", 100, 90.041, 5e-4, 4e-4),
        ("fixed_point", 200, 90.0456, 5e-5, 8e-5),
        ("dual_ascent", 100, 90.040, 5e-4, 5.5e-4),
        ("admm", 10, 89.986, 5e-4, 7e-4),
        ("admm", 200, 90.0482, 5e-5, 8.5e-6),
    ],
)
def test_published_numbers(solver: str, iterations: int, objective: float, digits: float, residual: float) -> None:
    weight, gradient = parsed(W)[None], parsed(G)[None]
    phi = tangent(weight, gradient, solver, iterations)
    assert (phi * gradient).sum().item() == pytest.approx(objective, abs=digits)
    assert tangency(weight, phi).item() < residual
    assert torch.linalg.matrix_norm(phi, 2).item() < 1 + 1e-6


@pytest.mark.parametrize(
    ("solver", "size", "dtype"),
    pairwise(SOLVERS, [(24, 16), (16, 16), (40, 4), (12, 1)], [torch.float64, torch.float32]),
)
def test_directions_are_feasible(solver: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    """Of spectral norm 1 at most, nearly tangent, and as good as those after many more iterations."""
    m, n = size
    weight, gradient = on_manifold(m, n, 1).to(dtype), sample(m, n, 2, dtype)
    phi = tangent(weight, gradient, solver)
    assert phi.dtype == dtype
    assert torch.linalg.matrix_norm(phi, 2).item() < 1 + 1e-5
    assert tangency(weight, phi).item() < 1e-2
    best = tangent(weight.double(), gradient.double(), "admm", 200)
    # What is not tangent may be too good to be true.
    assert (phi * gradient).sum().item() == pytest.approx((best * gradient.double()).sum().item(), rel=2e-2)


@pytest.mark.parametrize("solver", SOLVERS)
def test_square_closed_form(solver: str) -> None:
    """Phi = W msign(skew(W^T G)), a rotation's generator: of even order, so that skew has full rank."""
    weight, gradient = on_manifold(6, 6, 3), sample(6, 6, 4)
    product = weight.mT @ gradient
    phi = tangent(weight, gradient, solver)
    torch.testing.assert_close(phi, weight @ msign(product - product.mT), rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("m", [2, 7])
def test_one_column(solver: str, m: int) -> None:
    """The tangent part of the gradient, normalised."""
    weight, gradient = on_manifold(m, 1, 5), sample(m, 1, 6)
    part = gradient - weight * (weight.mT @ gradient)
    phi = tangent(weight, gradient, solver)
    torch.testing.assert_close(phi, part / part.norm(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_gradients_scale_does_not_matter(solver: str) -> None:
    weight, gradient = on_manifold(9, 4, 7), sample(9, 4, 8)
    torch.testing.assert_close(
        tangent(weight, 1e-30 * gradient, solver), tangent(weight, 1e8 * gradient, solver), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_poor_gradients(solver: str, dtype: torch.dtype) -> None:
    """One of zeros, one of rank 1, one that is no tangent direction at all; and a weight of zeros."""
    weight = on_manifold(8, 4, 9).to(dtype)
    gradients = [torch.zeros_like(weight), sample(8, 1, 10, dtype) @ sample(1, 4, 11, dtype), weight.clone()]
    directions = [tangent(weight, gradient, solver) for gradient in gradients]
    assert (directions[0] == 0).all()
    for phi in [*directions, tangent(torch.zeros_like(weight), gradients[1], solver)]:
        assert phi.isfinite().all() and torch.linalg.matrix_norm(phi, 2).item() < 1 + 1e-5


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_gradients_that_are_no_numbers(solver: str, wrong: float) -> None:
    """They give directions that are none, too, and no exception: peers would wait for the rank that raises it."""
    weight, gradient = torch.cat([on_manifold(8, 4, 9)] * 2), torch.cat([sample(8, 4, 10)] * 2)
    expected = tangent(weight[1:], gradient[1:], solver)
    gradient[0, 2, 1] = wrong
    found = tangent(weight, gradient, solver)
    assert found[0].isnan().all()
    torch.testing.assert_close(found[1:], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_batch_is_its_matrices(solver: str) -> None:
    weight = torch.cat([on_manifold(9, 4, seed) for seed in range(3)])
    gradient = torch.cat([sample(9, 4, seed) * 10.0**seed for seed in range(3)])
    together = tangent(weight, gradient, solver)
    apart = [tangent(weight[i : i + 1], gradient[i : i + 1], solver) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("m", "n", "bound"), [(96, 64, 0.0), (64, 64, 0.02)])
def test_ten_iterations_suffice_for_larger_matrices(m: int, n: int, bound: float) -> None:
    """A gradient of quickly falling singular values, whose small ones a fixed penalty would not reach."""
    weight = on_manifold(m, n, 12)
    scales = 1 / torch.arange(1, n + 1, dtype=torch.float64)
    gradient = sample(m, n, 13) * scales @ torch.linalg.qr(sample(n, n, 14))[0]
    best = (tangent(weight, gradient, "admm", 200) * gradient).sum().item()
    assert (tangent(weight, gradient) * gradient).sum().item() > (0.97 - bound) * best


def test_the_way_back_is_as_exact_as_the_numbers() -> None:
    for dtype, error in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        weight = msign(on_manifold(48, 32, 15).to(dtype) + 0.1 * sample(48, 32, 16, dtype) / 16)
        assert defect(weight).max().item() < error
    square = msign(sample(64, 64, 17), PROJECTION_STEPS)
    assert defect(square).max().item() < 1e-12


@pytest.mark.parametrize(("name", "shape", "iterations"), pairwise(SOLVERS, [(12, 8), (8, 12), (8, 8)], [0, 3]))
def test_operations_are_those_that_torch_counts(name: str, shape: tuple[int, int], iterations: int) -> None:
    """Of a whole step of the optimizer, on a weight that is on the manifold and has been looked at."""
    param = torch.nn.Parameter(torch.nn.init.orthogonal_(torch.empty(shape, dtype=torch.float64)))
    param.matrix_layout = MatrixLayout("linear", direction=STIEFEL)
    optimizer = Muon([param], variant=StiefelMuon(solver=name, iterations=iterations))
    param.grad = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert counter.get_total_flops() == SOLVERS[name].flops(*sorted(shape), iterations)
