"""Both iterations against scalar polynomials and each other, their ranges and their precision."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_muon.orthogonalize.coefficients import Iteration
from megatron_muon.orthogonalize.gram import gram_iteration, prescale, segments
from megatron_muon.orthogonalize.newton_schulz import normalized, square_sums
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer
from megatron_muon.orthogonalize.products import TorchProducts
from tests.iterations import EPS, EVERY_SET, HALF_NORMAL, error, gaussian, gram, set_of, standard, tolerance
from tests.pairwise import pairwise
from tests.reference import polynomial, with_singular_values

# Against the scalar polynomial and each other, in float64.

SHAPES = [(8, 20), (12, 12), (1, 8), (1, 1), (3, 300)]


@pytest.mark.parametrize(("name", "steps", "path"), pairwise(EVERY_SET, [1, 5, 9], [standard, gram]))
def test_known_singular_values_follow_the_polynomial(name: str, steps: int, path: object) -> None:
    """Singular values from 1 to 1/1000 of the largest. Relative to the result: roundings of some hundred operations."""
    triples = set_of(name, steps)
    for p, q in SHAPES:
        s = torch.logspace(0, -3, p, dtype=torch.float64)
        x = torch.stack([with_singular_values(s, p, q, seed) for seed in (1, 2)])
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        expected = u @ torch.diag(polynomial(s / s.norm(), triples)) @ v
        assert error(path(x, triples), expected) < tolerance(x, triples)  # type: ignore[operator]


@pytest.mark.parametrize("name", EVERY_SET)
def test_gram_equals_standard(name: str) -> None:
    for steps, (p, q) in itertools.product([1, 2, 3, 4, 5, 6, 8, 10], [(8, 20), (12, 12), (1, 8)]):
        triples, x = set_of(name, steps), gaussian(2, p, q)
        assert error(gram(x, triples), standard(x, triples)) < tolerance(x, triples), (steps, p, q)


@pytest.mark.parametrize("name", EVERY_SET)
def test_restarts_anywhere_change_nothing_but_rounding(name: str) -> None:
    """Without any, small directions lose digits in float64 too: hence not 1e-12."""
    steps, x = Iteration(set_of(name, 5)), gaussian(2, 8, 20)
    expected, batch = standard(x, steps.coefficients), normalized(x, torch.float64, EPS)
    for count in range(5):
        for restarts in itertools.combinations(range(1, 5), count):
            assert error(gram_iteration(batch, steps, restarts, TorchProducts()), expected) < 1e-10, restarts


def test_segments_are_all_steps_in_order() -> None:
    triples = set_of("polar_express", 7)
    for restarts in [(), (1,), (2, 4, 6)]:
        parts = segments(triples, restarts)
        assert len(parts) == 1 + len(restarts)
        assert tuple(itertools.chain(*parts)) == triples


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_power_of_two_before_the_gram_matrix_changes_no_bit(dtype: torch.dtype) -> None:
    """Where nothing leaves the range of the numbers, the scale must cancel exactly."""
    triples = set_of("quintic", 5)
    batch = normalized(gaussian(2, 8, 20), dtype, EPS)
    expected = gram_iteration(batch, Iteration(triples), (2,), TorchProducts())
    for scale in (2.0, 16.0):
        assert torch.equal(gram_iteration(batch * scale, Iteration(triples), (2,), TorchProducts(), scale), expected)


# Ranges and precision.


def gram_slice(side: int, rows: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Off-diagonal entries of the float16 Gram matrix of some rows of a Gaussian ``side`` x ``side`` matrix; exactly.

    The slice is normalized by what the norm of the whole is on average, as one rank of a divided matrix would do it.
    """
    matrix = gaussian(1, rows, side)
    x = normalized(matrix, torch.float16, EPS, scale=scale, squares=square_sums(matrix) * (side / rows))
    off_diagonal = ~torch.eye(rows, dtype=torch.bool)
    exact = x.double() @ x.double().mT
    return TorchProducts().gram(x)[0][off_diagonal].double(), exact[0][off_diagonal]


@pytest.mark.parametrize(("side", "scale"), [(8192, 16.0), (16384, 32.0)])
def test_range_of_float16(side: int, scale: float) -> None:
    """Entries of size 1 / (8192 sqrt(8192)) = 1.3e-6 are subnormal, with steps of 6e-8; those times 16^2 are not."""
    assert prescale(torch.float16, side) == scale
    plain, exact = gram_slice(side, 128, 1.0)
    assert (plain.abs() < HALF_NORMAL).all()
    assert error(plain, exact) > 1e-2
    scaled, exact = gram_slice(side, 128, scale)
    # |z| < 6.1e-5 / 3.5e-4 = 0.18 standard deviations: 14 %.
    assert (scaled.abs() < HALF_NORMAL).double().mean() < 0.16
    assert error(scaled, exact) < 2.0**-11


@pytest.mark.parametrize("p", [1, 2, 16, 64, 1024, 8192, 65536])
def test_the_scale_is_a_power_of_two_that_leaves_room(p: int) -> None:
    """The largest eigenvalue of the scaled Gram matrix is scale^2 at most: far below 65504."""
    scale = prescale(torch.float16, p)
    assert float(scale).hex().startswith("0x1.0000")
    assert 1.0 <= scale**2 <= max(1.0, p / 8)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert prescale(dtype, p) == 1.0


@pytest.mark.parametrize("p", [128, 384])
def test_a_matrix_of_rank_one_does_not_overflow_where_it_is_scaled(p: int) -> None:
    """All of the norm in one direction: the largest entries that scaled Gram matrices can have."""
    column = torch.ones(1, p, 1)
    column[:, 1:] *= 1e-3
    out = Orthogonalizer(Iteration(set_of("quintic", 5)), torch.float16)(column @ torch.ones(1, 1, 4 * p))
    assert prescale(torch.float16, p) > 1.0
    assert torch.isfinite(out).all()
    # Singular vector times p(1): the first row holds nearly all of it.
    one = float(polynomial(torch.ones(()), set_of("quintic", 5)))
    assert float(torch.linalg.vector_norm(out[0, 0].float())) == pytest.approx(one, rel=5e-3)


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32])
def test_norms_of_tiny_and_of_huge_entries(source: torch.dtype) -> None:
    """Sums of squares that the dtype of the matrix cannot hold: beyond 65504, below 6e-8, or lost beside the others.

    The norm itself is exact: it is compared on the matrices as they were rounded to the dtype.
    """
    base = gaussian(64, 64)
    huge, tiny = (3e2, 1e-4) if source == torch.float16 else (1e15, 1e-15)
    mixed = base.clone()
    mixed[0] *= 1e3  # the others are 5 % of the norm, in 4032 summands that are each small
    for x in ((base * huge).to(source), (base * tiny).to(source), mixed.to(source)):
        # eps, the lower bound, lies below all these norms.
        found = normalized(x[None], torch.float64, 1e-30)[0]
        expected = x.double() / torch.linalg.matrix_norm(x.double())
        assert error(found, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_entries_are_rounded_once(dtype: torch.dtype) -> None:
    """From the float32 quotient, not from a matrix that was rounded before it was divided."""
    x = gaussian(2, 12, 30, dtype=torch.float32)
    norm = torch.linalg.matrix_norm(x.double(), keepdim=True)
    found, exact = normalized(x, dtype, EPS).double(), x.double() / norm
    # Half a unit in the last place of normal numbers, and of float16's subnormal ones; float32 rounds before.
    half_unit = torch.finfo(dtype).eps / 2 * (1 + 1e-4)
    assert ((found - exact).abs() <= half_unit * exact.abs() + 2.0**-25).all()
