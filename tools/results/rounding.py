"""What it does to momentum, and to the update that is made of it, to be kept in fewer bits than float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass

import torch

from megatron_muon.optimizers import storage
from megatron_muon.orthogonalize import Orthogonalizer, iteration

ROWS, COLUMNS = 256, 1024
"""Of the matrices whose spectra are made."""

Zoo = dict[str, torch.Tensor]
"""Name -> (m, n), float64: momentum as it is before it is kept."""

Keep = Callable[[torch.Tensor], torch.Tensor]
"""What float32 numbers are once they have been kept: float32."""


def keeper(dtype: str, like: torch.Tensor) -> Keep:
    """Of :mod:`megatron_muon.optimizers.storage`.

    Args:
        dtype: ``fp32``, ``bf16`` or ``int8``.
        like: has the shape of the numbers.
    """
    state: dict[str, torch.Tensor] = {}
    storage.init_momentum(like.float(), state, dtype)
    kept = storage.momentum_of(state)

    def keep(values: torch.Tensor) -> torch.Tensor:
        storage.write(kept, values)
        return storage.read(kept).clone()

    return keep


def stochastic_bfloat16(generator: torch.Generator) -> Keep:
    """Rounds up or down to a bfloat16 number, by chance, so that the mean is right; no option of this package."""

    def keep(values: torch.Tensor) -> torch.Tensor:
        chance = torch.randint(1 << 16, values.shape, generator=generator, dtype=torch.int32)
        return values.contiguous().view(torch.int32).add(chance).bitwise_and_(~0xFFFF).view(torch.float32)

    return keep


def zoo(rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> Zoo:
    """Matrices with spectra, or entries, of many kinds; in each the largest singular value, or entry, is about 1."""
    generator = torch.Generator().manual_seed(seed)

    def noise(m: int = rows, n: int = columns) -> torch.Tensor:
        return torch.randn(m, n, generator=generator, dtype=torch.float64)

    left, right = (torch.linalg.qr(noise(n, rows))[0] for n in (rows, columns))
    number = torch.arange(1, rows + 1, dtype=torch.float64)
    flat = noise()
    small = flat / torch.linalg.matrix_norm(flat, 2)

    def spectrum(values: torch.Tensor) -> torch.Tensor:
        return left * values @ right.mT

    def falling(count: int) -> torch.Tensor:
        return torch.logspace(0, -4, count, dtype=torch.float64)

    return {
        "noise": flat,
        "rows of sizes 1 to 1e-4": flat * falling(rows)[:, None],
        "columns of sizes 1 to 1e-4": flat * falling(columns)[None, :],
        "one entry in 1,000 is 100 times as large": torch.where(noise().abs() > 3.29, 100 * flat, flat),
        "singular values 1 / i": spectrum(1 / number),
        "singular values 1 / i^2": spectrum(1 / number.square()),
        "rank 10, noise of 1e-2": spectrum((number <= 10).double()) + 1e-2 * small,
        "rank 10, noise of 1e-3": spectrum((number <= 10).double()) + 1e-3 * small,
        "rank 1, noise of 1e-3": spectrum((number <= 1).double()) + 1e-3 * small,
        "rank 1": spectrum((number <= 1).double()),
    }


def relative(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of what is exact."""
    exact = exact.double()
    return float((value.double() - exact).norm() / exact.norm())


@dataclass(frozen=True)
class Errors:
    """Relative errors (Frobenius norm) that come of one matrix; those of updates against float64 of momentum as it is.

    Attributes:
        kept: of momentum, by how it is kept.
        update: of the update that a float64 iteration makes of it.
        iteration: of the update of momentum as it is, by an iteration in bfloat16.
        both: of the update of momentum as it is kept, by an iteration in bfloat16.
    """

    kept: dict[str, float]
    update: dict[str, float]
    iteration: float
    both: dict[str, float]


def errors(matrix: torch.Tensor, dtypes: tuple[str, ...] = ("fp32", "bf16", "int8")) -> Errors:
    """What quintic's five steps, the default, make of momentum.

    Args:
        matrix: float64.
        dtypes: how it is kept.
    """
    exact, rough = (Orthogonalizer(iteration("quintic", 5), dtype) for dtype in (torch.float64, torch.bfloat16))

    def update(by: Orthogonalizer, given: torch.Tensor) -> torch.Tensor:
        return by(given[None])[0]

    wanted = update(exact, matrix)
    kept = {dtype: keeper(dtype, matrix)(matrix.float()) for dtype in dtypes}
    return Errors(
        {dtype: relative(each, matrix) for dtype, each in kept.items()},
        {dtype: relative(update(exact, each.double()), wanted) for dtype, each in kept.items()},
        relative(update(rough, matrix.float()), wanted),
        {dtype: relative(update(rough, each), wanted) for dtype, each in kept.items()},
    )


LOW_RANK = "rank 10 in noise of 0.06 of its size"
"""A stream of gradients."""

Stream = Iterator[torch.Tensor]
"""Gradients of one step after the other, float32."""


def streams(steps: int, rows: int, columns: int) -> dict[str, Callable[[], Stream]]:
    """Gradients whose average says what rounding does to one."""

    def made(of_step: Callable[[int, Callable[[], torch.Tensor]], torch.Tensor]) -> Callable[[], Stream]:
        def stream() -> Stream:
            generator = torch.Generator().manual_seed(0)
            for step in range(steps):
                yield of_step(step, lambda: torch.randn(rows, columns, generator=generator))

        return stream

    signal = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    sizes = torch.logspace(0, -4, columns)
    generator = torch.Generator().manual_seed(2)
    left, right = (torch.linalg.qr(torch.randn(size, 10, generator=generator))[0] for size in (rows, columns))
    low = left @ right.mT  # ten singular values of 1; those of noise of this size reach 1, too
    spread = 1 / (math.sqrt(rows) + math.sqrt(columns))
    return {
        "noise": made(lambda _, noise: noise()),
        "a constant in ten times as much noise": made(lambda _, noise: signal + 10 * noise()),
        "a constant": made(lambda _, noise: signal),
        "noise that shrinks to 1e-3": made(lambda step, noise: noise() * math.exp(-math.log(1e3) * step / steps)),
        "noise, columns of sizes 1 to 1e-4": made(lambda _, noise: noise() * sizes),
        LOW_RANK: made(lambda _, noise: low + 0.06 * spread * noise()),
    }


ITERATION = "bf16 iteration"


@dataclass(frozen=True)
class Average:
    """What has become of an average that is kept in a form, against one in float64.

    Attributes:
        error: relative, Frobenius norm.
        gain: the average's size along the right one, less 1: what rounding adds or takes away always.
        update: relative error of quintic's five steps of it, in float64.
        stuck: entries that are 0 though the right ones are not, as a share.
    """

    error: float
    gain: float
    update: float
    stuck: float


def averages(stream: Stream, momentum: float, keeps: Mapping[str, Keep]) -> dict[str, Average]:
    """Momentum of a stream of gradients at its end, by how it is kept between steps; each step is in float32.

    The entry :data:`ITERATION` is exact momentum, with the update that a bfloat16 iteration makes of it.
    """
    exact = torch.zeros(())
    kept: dict[str, torch.Tensor] = {}
    for gradient in stream:
        exact = torch.lerp(exact.double().expand_as(gradient), gradient.double(), 1 - momentum)
        for name, keep in keeps.items():
            kept[name] = keep(torch.lerp(kept.get(name, torch.zeros_like(gradient)), gradient, 1 - momentum))
    orthogonalize, rough = (Orthogonalizer(iteration("quintic", 5), dtype) for dtype in (torch.float64, torch.bfloat16))
    wanted = orthogonalize(exact[None])

    def measured(value: torch.Tensor) -> Average:
        value = value.double()
        return Average(
            relative(value, exact),
            float((value * exact).sum() / exact.square().sum()) - 1,
            relative(orthogonalize(value[None]), wanted),
            float(((value == 0) & (exact != 0)).double().mean()),
        )

    by_itself = Average(0.0, 0.0, relative(rough(exact[None].float()), wanted), 0.0)
    return {ITERATION: by_itself, **{name: measured(value) for name, value in kept.items()}}


def all_averages(
    steps: int, momenta: tuple[float, ...], rows: int = 128, columns: int = 512
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """:func:`averages` of all :func:`streams`: momentum -> stream -> form -> what :class:`Average` has."""
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for momentum in momenta:
        found[f"{momentum:g}"] = {}
        for name, stream in streams(steps, rows, columns).items():
            like = next(stream())
            keeps = {dtype: keeper(dtype, like) for dtype in ("fp32", "bf16", "int8")}
            keeps["bf16, stochastic"] = stochastic_bfloat16(torch.Generator().manual_seed(2))
            of = averages(stream(), momentum, keeps)
            found[f"{momentum:g}"][name] = {form: asdict(each) for form, each in of.items()}
    return found


def gradient_errors(counts: tuple[int, ...], rows: int = 128, columns: int = 512) -> dict[str, float]:
    """Relative error of a sum of gradients of so many micro-batches, noise, added up in bfloat16."""
    found = {}
    for count in counts:
        generator = torch.Generator().manual_seed(0)
        exact, rounded = torch.zeros(rows, columns, dtype=torch.float64), torch.zeros(rows, columns).bfloat16()
        for _ in range(count):
            gradient = torch.randn(rows, columns, generator=generator)
            exact += gradient
            rounded += gradient.bfloat16()
        found[str(count)] = relative(rounded, exact)
    return found
