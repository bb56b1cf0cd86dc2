"""The iteration against its definition: a polynomial on singular values, in float64."""

import math

import pytest
import torch
from emerging_optimizers.orthogonalized_optimizers import muon_utils

from megatron_muon.orthogonalize import iteration, newton_schulz
from megatron_muon.orthogonalize.coefficients import _OWN_SETS
from megatron_muon.orthogonalize.newton_schulz import normalized, square_sums
from tests.iterations import EVERY_SET
from tests.reference import polynomial, singular_value_decomposition, with_singular_values


@pytest.mark.parametrize("coefficient_type", EVERY_SET[:-1])
@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16), (1, 8), (8, 1)])
def test_singular_values_follow_the_polynomial(coefficient_type: str, shape: tuple[int, int]) -> None:
    steps = iteration(coefficient_type, 6)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u, s, v = singular_value_decomposition(x)
    expected = u @ torch.diag(polynomial(s / s.norm(), steps.coefficients)) @ v
    torch.testing.assert_close(newton_schulz(x, steps), expected, rtol=0, atol=1e-11)


def test_values_at_one_are_the_published_ones() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    golden = [("simple", 5, 0.6964364), ("quintic", 5, 0.9783456), ("polar_express", 5, 1.0272973)]
    for name, steps, value in [*golden, ("polar_express", 8, 1.0)]:
        assert newton_schulz(one, iteration(name, steps)).item() == pytest.approx(value, abs=5e-7)


def test_converging_set_gives_the_polar_factor() -> None:
    x = with_singular_values(torch.logspace(0, -2, 12, dtype=torch.float64), 12, 30)
    u, _, v = singular_value_decomposition(x)
    torch.testing.assert_close(newton_schulz(x, iteration("polar_express", 12)), u @ v, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 6e-2)])
def test_low_precision_stays_near_float64(dtype: torch.dtype, tolerance: float) -> None:
    """Relative to the largest singular value, 1: float32 rounding, and the error that bfloat16 is known for."""
    x = torch.randn(64, 160, generator=torch.Generator().manual_seed(2))
    steps = iteration("quintic", 5)
    exact = newton_schulz(x.double(), steps)
    error = torch.linalg.matrix_norm(newton_schulz(x, steps, dtype=dtype).double() - exact, ord=2)
    assert error < tolerance


def test_agrees_with_emerging_optimizers() -> None:
    """Same formula, other order of operations in float32: rounding (6e-8) times the slope of seven steps at 0."""
    x = torch.randn(48, 96, generator=torch.Generator().manual_seed(3))
    for name in muon_utils._COEFFICIENT_SETS:
        if name == "cubic5":  # in versions that have it, with five steps alone
            assert [list(each) for each in muon_utils._COEFFICIENT_SETS[name]] == [
                list(each) for each in _OWN_SETS[name]
            ]
            continue
        ours = newton_schulz(x, iteration(name, 7))
        torch.testing.assert_close(ours, muon_utils.newton_schulz(x, 7, name), rtol=0, atol=2e-5)


def test_batch_is_each_matrix_by_itself() -> None:
    x = torch.randn(2, 3, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    steps = iteration("quintic", 5)
    each = torch.stack([newton_schulz(matrix, steps) for matrix in x.flatten(0, 1)]).view_as(x)
    torch.testing.assert_close(newton_schulz(x, steps), each, rtol=0, atol=1e-12)
    torch.testing.assert_close(newton_schulz(x.flatten(0, 1), steps).view_as(x), each, rtol=0, atol=1e-12)


def test_zero_matrix_and_zero_rows_stay_zero() -> None:
    steps = iteration("quintic", 5)
    assert torch.equal(newton_schulz(torch.zeros(4, 6), steps), torch.zeros(4, 6))
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
    x[2] = 0
    assert torch.equal(newton_schulz(x, steps)[2], torch.zeros(6))


def test_root_mean_square_of_an_orthogonal_matrix() -> None:
    """The lemma that scale modes rest on: RMS(U V^T) = sqrt(rank / (m n))."""
    steps = iteration("polar_express", 14)
    for m, n, rank, expected in [(8, 8, 8, 0.353553), (12, 5, 5, 0.288675), (5, 12, 5, 0.288675), (12, 5, 3, 0.223607)]:
        values = torch.zeros(min(m, n), dtype=torch.float64)
        values[:rank] = torch.linspace(1.0, 0.5, rank, dtype=torch.float64)
        x = newton_schulz(with_singular_values(values, m, n), steps)
        assert x.square().mean().sqrt().item() == pytest.approx(expected, abs=1e-5)
        assert expected == pytest.approx(math.sqrt(rank / (m * n)), abs=1e-6)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="no_such_set"):
        iteration("no_such_set", 5)
    with pytest.raises(ValueError, match="num_steps 0"):
        iteration("quintic", 0)
    with pytest.raises(ValueError, match="belong together"):
        newton_schulz(torch.ones(2, 2), iteration("quintic", 1), shard_dim=0)
    for wrong in (torch.ones(()), torch.ones(5), torch.ones(3, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"give matrices \(\.\.\., m, n\) of real numbers"):
            newton_schulz(wrong, iteration("quintic", 1))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (2, 0, 4), (0, 3, 4)])
def test_a_matrix_without_elements_is_its_own_result(shape: tuple[int, ...]) -> None:
    for steps in (iteration("quintic", 5), iteration("turbo_muon", 4)):
        assert newton_schulz(torch.ones(shape), steps).shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps", [1e-7, 1e-37])
def test_no_gradient_is_too_large_or_small_for_its_norm(dtype: torch.dtype, eps: float) -> None:
    """Squares of 1e20 and more overflow in float32, those of 1e-23 and less vanish: whole matrices, and shards."""
    matrix = torch.randn(3, 16, 24, dtype=torch.float64)

    def reduce(partial: torch.Tensor) -> torch.Tensor:
        return (partial[:3] + partial[3:]).repeat(2, 1, 1)

    for exponent in (-40, -30, -20, -8, 0, 18, 20, 30, 37):
        x = (matrix * 10.0**exponent).to(dtype)
        exact = normalized(x.double(), torch.float64, eps)
        found = normalized(x, torch.float32, eps)
        # Denormal factors have fewer digits.
        torch.testing.assert_close(found.double(), exact, rtol=1e-3 if exponent == 37 else 1e-6, atol=1e-45)
        assert exact.abs().max() > 0 and found.isfinite().all()
        halves = torch.cat(x.chunk(2, dim=-1))
        shards = normalized(halves, torch.float32, eps, squares=reduce(square_sums(halves)))
        torch.testing.assert_close(torch.cat(shards.chunk(2), dim=-1), found)
    assert normalized(torch.zeros(1, 4, 4), torch.float32, 1e-45).abs().max() == 0
