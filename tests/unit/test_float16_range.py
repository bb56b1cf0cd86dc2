"""float16 Gram Newton-Schulz beside bfloat16 standard Newton-Schulz, rounded as GPUs round: why it is not the default.

Products are summed in float32 and rounded once. Range does not depend on the size of matrices but on what is in them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_muon.orthogonalize.gram import gram_iteration, prescale
from megatron_muon.orthogonalize.newton_schulz import normalized, standard_iteration
from megatron_muon.orthogonalize.products import TorchProducts
from megatron_muon.orthogonalize.restarts import best_restarts
from tests.iterations import EPS, error, set_of


class TensorCoreProducts(TorchProducts):
    """Products of 16 bits with float32 sums that are rounded once, scaled and added to before."""

    def gram(self, x: torch.Tensor) -> torch.Tensor:
        return super().gram(x.float()).to(x.dtype)

    def quadratic(self, r: torch.Tensor, b: float, c: float) -> torch.Tensor:
        return super().quadratic(r.float(), b, c).to(r.dtype)

    def commuting(self, r: torch.Tensor, z: torch.Tensor, a: float) -> torch.Tensor:
        return super().commuting(r.float(), z.float(), a).to(r.dtype)

    def apply(self, q: torch.Tensor, x: torch.Tensor, alpha: float) -> torch.Tensor:
        return super().apply(q.float(), x.float(), 1.0).to(x.dtype).mul_(alpha)

    def multiply_add(self, x: torch.Tensor, z: torch.Tensor, a: float) -> torch.Tensor:
        return super().multiply_add(x.float(), z.float(), a).to(x.dtype)


Random = Callable[..., torch.Tensor]


def spectrum(decades: int) -> Callable[[Random, int, int], torch.Tensor]:
    def made(random: Random, p: int, q: int) -> torch.Tensor:
        u, v = (torch.linalg.qr(random(side, p))[0] for side in (p, q))
        return (u * torch.logspace(0, -decades, p)) @ v.mT

    return made


def one_row(decades: int) -> Callable[[Random, int, int], torch.Tensor]:
    def made(random: Random, p: int, q: int) -> torch.Tensor:
        x = random(p, q) * 10.0**-decades
        x[0] = random(q)
        return x

    return made


def factors(random: Random, *shape: int) -> torch.Tensor:
    """From 1 to 1e-6, in any order."""
    return 10.0 ** (-6.0 * torch.special.ndtr(random(*shape)))


BETTER: dict[str, Callable[[Random, int, int], torch.Tensor]] = {
    "noise": lambda random, p, q: random(p, q),
    "rank p / 16": lambda random, p, q: random(p, p // 16) @ random(p // 16, q),
    "rank one": lambda random, p, q: random(p, 1) @ random(1, q),
    "rank one and 1e-3 of noise": lambda random, p, q: random(p, 1) @ random(1, q) + 1e-3 * random(p, q),
    **{f"singular values to 1e-{decades}": spectrum(decades) for decades in (1, 2, 4, 8, 12)},
    "one row 1e2 times the others": one_row(2),
    "one row 1e4 times the others": one_row(4),
    "31 of 32 rows zero": lambda random, p, q: random(p, q) * (torch.arange(p)[:, None] % 32 == 0),
}
WORSE: dict[str, Callable[[Random, int, int], torch.Tensor]] = {
    "one row 1e6 times the others": one_row(6),
    "rows from 1 to 1e-6": lambda random, p, q: random(p, q) * factors(random, p, 1),
    "columns from 1 to 1e-6": lambda random, p, q: random(p, q) * factors(random, 1, q),
}


def errors(x: torch.Tensor, name: str) -> dict[torch.dtype, tuple[float, float]]:
    """Of the whole result, and of the worst of its rows and columns, in float16 and bfloat16."""
    steps, found = set_of(name, 5), {}
    exact = standard_iteration(normalized(x[None], torch.float64, EPS, squares=None), steps)
    for dtype in (torch.float16, torch.bfloat16):
        restarts, scale = best_restarts(steps, dtype), prescale(dtype, x.size(0))
        y = normalized(x[None], dtype, EPS, scale=scale)
        if restarts is None:
            y = standard_iteration(y, steps, TensorCoreProducts())
        else:
            y = gram_iteration(y, steps, restarts, TensorCoreProducts(), scale)
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


def matrix(kind: Callable[[Random, int, int], torch.Tensor], p: int, q: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return kind(lambda *shape: torch.randn(shape, generator=generator), p, q).double()


@pytest.mark.parametrize(("p", "q", "name"), SIZES)
def test_float16_errs_less_on_matrices_of_like_rows_and_columns(p: int, q: int, name: str) -> None:
    for label, kind in BETTER.items():
        found = errors(matrix(kind, p, q), name)
        assert found[torch.float16][0] < found[torch.bfloat16][0], label


@pytest.mark.parametrize(("p", "q", "name"), SIZES)
def test_float16_loses_small_rows_and_columns(p: int, q: int, name: str) -> None:
    """bfloat16 has the range of float32: this is why float16 has to be asked for.

    Entries below 6e-8, or 1e-6 of the largest, are zero in float16, or have few bits.
    """
    for label, kind in WORSE.items():
        (_, half), (_, brain) = errors(matrix(kind, p, q), name).values()
        assert half > 2 * brain, label
