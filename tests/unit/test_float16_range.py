"""float16 Gram Newton-Schulz beside bfloat16 standard Newton-Schulz, rounded as GPUs round: why it is not the default.

Products are summed in float32 and rounded once. Range does not depend on the size of matrices but on what is in them.
"""

from __future__ import annotations

import pytest
import torch

from megatron_muon.orthogonalize.coefficients import Iteration
from megatron_muon.orthogonalize.gram import gram_iteration, prescale
from megatron_muon.orthogonalize.newton_schulz import normalized, standard_iteration
from megatron_muon.orthogonalize.restarts import best_restarts
from tests.iterations import EPS, error, set_of
from tools.sets import LIKE_ROWS, UNLIKE, TensorCoreProducts, matrix


def errors(x: torch.Tensor, name: str) -> dict[torch.dtype, tuple[float, float]]:
    """Of the whole result, and of the worst of its rows and columns, in float16 and bfloat16."""
    steps, found = set_of(name, 5), {}
    exact = standard_iteration(normalized(x[None], torch.float64, EPS, squares=None), Iteration(steps))
    for dtype in (torch.float16, torch.bfloat16):
        restarts, scale = best_restarts(steps, dtype), prescale(dtype, x.size(0))
        y = normalized(x[None], dtype, EPS, scale=scale)
        if restarts is None:
            y = standard_iteration(y, Iteration(steps), TensorCoreProducts())
        else:
            y = gram_iteration(y, Iteration(steps), restarts, TensorCoreProducts(), scale)
        assert torch.isfinite(y).all()
        lines = [
            (torch.linalg.vector_norm(y - exact, dim=dim) / torch.linalg.vector_norm(exact, dim=dim))
            .nan_to_num(0.0)
            .max()
            for dim in (1, 2)
        ]
        found[dtype] = error(y, exact), float(max(lines))
    return found


SIZES = [
    (128, 352, "quintic"),
    *(pytest.param(1024, 2816, name, marks=pytest.mark.slow) for name in ("quintic", "polar_express")),
]


@pytest.mark.parametrize(("p", "q", "name"), SIZES)
def test_float16_errs_less_on_matrices_of_like_rows_and_columns(p: int, q: int, name: str) -> None:
    for label, kind in LIKE_ROWS.items():
        found = errors(matrix(kind, p, q), name)
        assert found[torch.float16][0] < found[torch.bfloat16][0], label


@pytest.mark.parametrize(("p", "q", "name"), SIZES)
def test_float16_loses_small_rows_and_columns(p: int, q: int, name: str) -> None:
    """bfloat16 has the range of float32: this is why float16 has to be asked for.

    Entries below 6e-8, or 1e-6 of the largest, are zero in float16, or have few bits.
    """
    for label, kind in UNLIKE.items():
        (_, half), (_, brain) = errors(matrix(kind, p, q), name).values()
        assert half > 2 * brain, label
