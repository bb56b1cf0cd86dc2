"""Turbo-Muon: rows are balanced before the first step, by the Gram matrix of that step."""

from __future__ import annotations

import pytest
import torch

from megatron_muon.engine.costs import can_share
from megatron_muon.engine.modes import DISTRIBUTED, GRAM, OWNER
from megatron_muon.engine.plan import BatchKey
from megatron_muon.orthogonalize import Orthogonalizer, iteration, newton_schulz
from megatron_muon.orthogonalize.newton_schulz import balance_, normalized
from tests.iterations import EPS, error, gaussian
from tests.reference import orthogonalized

TURBO = iteration("turbo_muon", 4)
SHAPES = [(16, 16), (12, 60), (60, 12), (1, 9), (9, 1)]
DTYPES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_polynomial_of_the_balanced_matrix(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Standard and Gram, wide and tall: the rows that are balanced are those of the shorter side."""
    x = gaussian(3, *shape)
    expected = torch.stack([orthogonalized(each, TURBO.coefficients, balanced=True) for each in x])
    assert error(Orthogonalizer(TURBO, dtype)(x), expected) < DTYPES[dtype]
    if dtype == torch.float64:
        assert error(newton_schulz(x, TURBO), expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_rows_and_matrices_stay_zero(dtype: torch.dtype) -> None:
    for shape in ((8, 8), (4, 40), (40, 4)):
        x = gaussian(3, *shape, dtype=torch.float32)
        x[0] = 0.0
        x.mT[1, 2] = 0.0 if shape[0] > shape[1] else x.mT[1, 2]
        if shape[0] <= shape[1]:
            x[1, 2] = 0.0
        found = Orthogonalizer(TURBO, dtype)(x)
        assert torch.isfinite(found).all() and not found[0].any()
        assert not (found.mT[1, 2] if shape[0] > shape[1] else found[1, 2]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_updates_do_not_depend_on_the_size_of_the_gradient_nor_of_its_rows(dtype: torch.dtype) -> None:
    """But for what the norm's lower bound makes smaller, by as much as without balancing."""
    x, iterate = gaussian(1, 12, 60, dtype=torch.float32), Orthogonalizer(TURBO, dtype, eps=1e-12)
    expected = iterate(x)
    rows = 10.0 ** torch.linspace(0, -2, 12).view(12, 1)
    exact = orthogonalized((rows * x)[0], TURBO.coefficients, balanced=True)
    assert error(iterate(rows * x)[0], exact) < DTYPES[dtype]
    for size in (1e-8, 1e8):
        assert error(iterate(size * x), expected.double()) < DTYPES[dtype]
    if dtype == torch.float32:
        faded = iterate(1e-17 * x).norm() / iterate(1e-16 * x).norm()
        assert float(faded) == pytest.approx(0.1, rel=1e-2)


@pytest.mark.parametrize("p", [64, 256])
def test_float16_errs_less_than_bfloat16(p: int) -> None:
    x = gaussian(1, p, 2 * p, dtype=torch.float32)
    for made in (x, x * 10.0 ** -torch.linspace(0, 3, p).view(p, 1), x[:, :, :1] @ x[:, :1] + 1e-3 * x):
        exact = orthogonalized(made[0], TURBO.coefficients, balanced=True)
        half, brain = (error(Orthogonalizer(TURBO, dtype)(made)[0], exact) for dtype in (torch.float16, torch.bfloat16))
        assert half < brain


def test_no_eigenvalue_is_above_1() -> None:
    for x in (gaussian(1, 8, 20), torch.ones(1, 8, 20, dtype=torch.float64), torch.eye(8, dtype=torch.float64)[None]):
        start = normalized(x, torch.float64, EPS)
        gram = start @ start.mT
        factors = balance_(gram)
        assert error(gram, (factors * start) @ (factors * start).mT) < 1e-14
        assert float(torch.linalg.eigvalsh(gram).max()) < 1 + 1e-12


def test_matrices_stay_whole_where_ranks_have_the_rows_that_are_balanced() -> None:
    plain = Orthogonalizer(iteration("quintic", 5), torch.float32)
    turbo = Orthogonalizer(TURBO, torch.float32)
    for m, n, dim, shared in ((4, 8, -1, 3), (4, 8, -2, 1), (8, 4, -2, 3), (8, 4, -1, 1), (8, 8, -1, 3), (8, 8, -2, 1)):
        key = BatchKey(OWNER, "tp", m, n, dim, (2, 2))
        assert sum(can_share(mode, key, turbo) for mode in (OWNER, GRAM, DISTRIBUTED)) == shared
        assert can_share(DISTRIBUTED, key, plain)


def test_shards_of_one_matrix_are_refused() -> None:
    with pytest.raises(ValueError, match="balanced"):
        newton_schulz(torch.ones(4, 8), TURBO, shard_dim=-1, reduce=lambda z: z)
