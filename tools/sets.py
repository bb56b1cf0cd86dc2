"""What each coefficient set costs and how much it errs, as Markdown: ``python -m tools.sets [--shape PxQ]``.

Products of 16 bits are rounded as tensor cores round them: summed in float32, and rounded once. Exact values are those
of float64. The tables of docs/results/iteration.md are its output.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable

import torch

from megatron_muon.orthogonalize import Iteration, Orthogonalizer, iteration
from megatron_muon.orthogonalize.products import TorchProducts
from megatron_muon.orthogonalize.restarts import best_restarts

SETS = [("quintic", 5), ("cubic5", 5), ("turbo_muon", 4), ("polar_express", 5), ("polar_express", 8), ("simple", 5)]
SETS += [("aol", 4), ("cans", 5), ("deepseekv4", 10)]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Random = Callable[..., torch.Tensor]
Kind = Callable[[Random, int, int], torch.Tensor]


class TensorCoreProducts(TorchProducts):
    """Products of 16 bits with float32 sums that are rounded once, scaled and added to before."""

    def gram(self, x: torch.Tensor) -> torch.Tensor:
        """See :class:`~megatron_muon.orthogonalize.products.TorchProducts`, as for the others."""
        return super().gram(x.float()).to(x.dtype)

    def quadratic(self, r: torch.Tensor, b: float, c: float) -> torch.Tensor:
        """``b R + c R R``."""
        return super().quadratic(r.float(), b, c).to(r.dtype)

    def commuting(self, r: torch.Tensor, z: torch.Tensor, a: float, b: float = 1.0) -> torch.Tensor:
        """``a R + b R Z``."""
        return super().commuting(r.float(), z.float(), a, b).to(r.dtype)

    def apply(self, q: torch.Tensor, x: torch.Tensor, alpha: float) -> torch.Tensor:
        """``alpha Q X``."""
        return super().apply(q.float(), x.float(), 1.0).to(x.dtype).mul_(alpha)

    def multiply_add(self, x: torch.Tensor, z: torch.Tensor, a: float, b: float = 1.0) -> torch.Tensor:
        """``a X + b Z X``."""
        return super().multiply_add(x.float(), z.float(), a, b).to(x.dtype)


def with_values(values: Callable[[int], torch.Tensor]) -> Kind:
    """Matrices with these singular values, and random vectors."""

    def made(random: Random, p: int, q: int) -> torch.Tensor:
        u, v = (torch.linalg.qr(random(side, p))[0] for side in (p, q))
        return (u * values(p)) @ v.mT

    return made


def spectrum(decades: int) -> Kind:
    """Singular values from 1 down over so many decades, in equal ratios."""
    return with_values(lambda p: torch.logspace(0, -decades, p))


def one_row(decades: int) -> Kind:
    """The first row is so many decades larger than the others."""

    def made(random: Random, p: int, q: int) -> torch.Tensor:
        x = random(p, q) * 10.0**-decades
        x[0] = random(q)
        return x

    return made


def factors(random: Random, *shape: int) -> torch.Tensor:
    """From 1 to 1e-6, in any order."""
    return 10.0 ** (-6.0 * torch.special.ndtr(random(*shape)))


LIKE_ROWS: dict[str, Kind] = {
    "noise": lambda random, p, q: random(p, q),
    "rank p / 16": lambda random, p, q: random(p, p // 16) @ random(p // 16, q),
    "rank one": lambda random, p, q: random(p, 1) @ random(1, q),
    "rank one and 1e-3 of noise": lambda random, p, q: random(p, 1) @ random(1, q) + 1e-3 * random(p, q),
    "singular values 1 / i": with_values(lambda p: 1.0 / torch.arange(1, p + 1)),
    **{f"singular values to 1e-{decades}": spectrum(decades) for decades in (1, 2, 4, 8, 12)},
    "one row 1e2 times the others": one_row(2),
    "one row 1e4 times the others": one_row(4),
    "31 of 32 rows zero": lambda random, p, q: random(p, q) * (torch.arange(p)[:, None] % 32 == 0),
}
"""Matrices whose columns are of like size, and whose rows are too, or few are not."""

UNLIKE: dict[str, Kind] = {
    "one row 1e6 times the others": one_row(6),
    "rows from 1 to 1e-6": lambda random, p, q: random(p, q) * factors(random, p, 1),
    "columns from 1 to 1e-6": lambda random, p, q: random(p, q) * factors(random, 1, q),
}


def matrix(kind: Kind, p: int, q: int) -> torch.Tensor:
    """(p, q), float64."""
    generator = torch.Generator().manual_seed(0)
    return kind(lambda *shape: torch.randn(shape, generator=generator), p, q).double()


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((found.double() - exact).norm() / exact.norm())


def found_by(steps: Iteration, x: torch.Tensor, dtype: torch.dtype, restarts: tuple[int, ...] | None) -> torch.Tensor:
    """The result in a type of numbers, whatever is cheaper."""
    products = TorchProducts() if dtype.itemsize > 2 else TensorCoreProducts()
    iterate = Orthogonalizer(steps, dtype, products=products)
    iterate.restarts = restarts
    iterate._gram_pays = lambda m, n: restarts is not None  # type: ignore[method-assign]
    return iterate(x[None])[0]


def values(steps: Iteration, s: torch.Tensor) -> torch.Tensor:
    """Of the polynomial."""
    for a, b, c in steps.coefficients:
        s = s * (a + s.square() * (b + c * s.square()))
    return s


def operations(name: str, steps: Iteration) -> Iterable[str]:
    """Of the standard form, plain and with symmetric kernels, and of Gram in float32 and float16, in units of p^3."""
    count, squares = len(steps.coefficients), sum(c != 0 for _, _, c in steps.coefficients)
    yield f"{2 * count + squares}"
    yield _sum(4 * count, 2 * squares)
    yield _sum(3 * count, squares)
    for dtype in (torch.float32, torch.float16):
        restarts = best_restarts(steps.coefficients, dtype)
        segments = len(restarts or ()) + 1
        where = ", ".join(map(str, restarts or ())) or "none"
        found = _sum(3 * segments, squares + 3 * (count - segments))
        yield "standard" if restarts is None else f"{found}, restarts {where}"


def _sum(factor: int, rest: int) -> str:
    return f"{factor} a" + (f" + {rest}" if rest else "")


def _table(head: str, rows: Iterable[Iterable[str]]) -> None:
    print(f"\n{head}\n|{'---|' * head.count(' | ')}---|")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="128x352", help="of the matrices")
    p, q = map(int, parser.parse_args().shape.split("x"))
    every = {(name, count): iteration(name, count) for name, count in SETS}

    def described() -> Iterable[list[str]]:
        for (name, count), steps in every.items():
            slope = float(torch.tensor([a for a, _, _ in steps.coefficients]).prod())
            found = values(steps, torch.linspace(0.01, 1, 10_000, dtype=torch.float64))
            span = f"{float(found.min()):.2f} to {float(found.max()):.2f}"
            yield [f"`{name}`", str(count), *operations(name, steps), f"{slope:.0f}", span]

    _table(
        "| set | steps | products | standard | symmetric | Gram, fp32 | Gram, fp16 | slope at 0 | of s >= 0.01 |",
        described(),
    )

    def erring(kinds: Iterable[tuple[str, Kind]]) -> Iterable[list[str]]:
        for label, kind in kinds:
            row, x = [label], matrix(kind, p, q)
            for name in ("quintic", "cubic5", "turbo_muon"):
                steps = iteration(name, 4 if name == "turbo_muon" else 5)
                exact = found_by(steps, x, torch.float64, None)
                chosen = [(dtype, best_restarts(steps.coefficients, dtype)) for dtype in DTYPES.values()]
                tried = [(torch.float32, None), *chosen]
                row += [f"{error(found_by(steps, x, *each), exact):.1e}" for each in tried]
            yield row

    columns = [
        f"{name} {kind}" for name in ("quintic", "cubic5", "turbo") for kind in ("fp32 std", "fp32", "fp16", "bf16")
    ]
    _table(f"| matrix | {' | '.join(columns)} |", erring((LIKE_ROWS | UNLIKE).items()))

    def polar() -> Iterable[list[str]]:
        for label in (
            "noise",
            "singular values 1 / i",
            "singular values to 1e-1",
            "singular values to 1e-2",
            "rows from 1 to 1e-6",
        ):
            x = matrix((LIKE_ROWS | UNLIKE)[label], p, q)
            u, _, v = torch.linalg.svd(x, full_matrices=False)
            quintic = found_by(iteration("quintic", 5), x, torch.float64, None)
            row = [label, f"{error(quintic, u @ v):.3f}"]
            for name, count in (("cubic5", 5), ("polar_express", 5), ("turbo_muon", 4)):
                found = found_by(iteration(name, count), x, torch.float64, None)
                row += [f"{error(found, u @ v):.3f}", f"{error(found, quintic):.3f}"]
            scales = (x @ x.mT).abs().sum(1, keepdim=True).rsqrt()
            u2, _, v2 = torch.linalg.svd(x * scales, full_matrices=False)
            yield [*row, f"{error(u2 @ v2, u @ v):.3f}"]

    head = "| matrix | quintic to polar | cubic5 to polar | to quintic | polar_express to polar | to quintic "
    _table(f"{head}| turbo to polar | to quintic | polar of balanced to polar |", polar())


if __name__ == "__main__":
    main()
