"""What products must pass on a device before they are used there: a numeric check, and a trial by time.

Products that are wrong do not stop a run: they train another model. So each implementation multiplies random matrices
first, and its errors against float64 are compared with those of torch on the same matrices. Of those that are right the
fastest is used: each does an iteration over matrices as the run has them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_muon.orthogonalize.products import TorchProducts

LIMIT = 4.0
"""How many times torch's error an error may be: both sum in float32 and round once."""


_SUMS_IN_FLOAT32 = 4 * torch.finfo(torch.float32).eps
"""How much sums of some hundred terms differ with their order, relative to the largest element. Smaller errors of torch
are luck; in 16 bits they are far larger."""


@dataclass(frozen=True)
class Size:
    """Size of a batch of test matrices X, p x q; ``tall``: X lies in memory column by column, as a tall matrix does."""

    batch: int
    p: int
    q: int
    tall: bool = False


GPU_SIZES = (Size(1, 1160, 1288), Size(3, 264, 520, tall=True), Size(3, 321, 515))
"""Multiples of 8 that are no multiples of a tile, enough rows for several groups of tiles, and odd sizes."""

CPU_SIZES = (Size(1, 264, 296, tall=True), Size(3, 257, 259))
"""Sizes for CPUs, where Triton's interpreter multiplies: the same kinds, as far as it can do them in seconds."""


@dataclass(frozen=True)
class Verdict:
    """Outcome of :func:`examine`.

    Attributes:
        failure: what is wrong, or None.
        products: how many products were compared.
        error: the largest error of any of them, as a multiple of torch's, or, where torch's is smaller, of what the
            order of sums in float32 makes.
        exactly_symmetric: whether every result was symmetric bit by bit.
    """

    failure: str | None
    products: int
    error: float
    exactly_symmetric: bool

    def __str__(self) -> str:
        if self.failure is not None:
            return f"fails the numeric check: {self.failure}"
        symmetry = "exactly symmetric" if self.exactly_symmetric else "symmetric to rounding"
        return f"{self.products} products checked: error {self.error:.2f} x torch's, {symmetry}"


def examine(
    products: TorchProducts, device: torch.device, dtype: torch.dtype, sizes: tuple[Size, ...] | None = None
) -> Verdict:
    """Compare an implementation with torch; an exception in it is a failure, too.

    Waits for the device and reads back numbers: for set-up, not for a step.

    Args:
        products: the implementation.
        device: where.
        dtype: in which it multiplies; float32 is multiplied, by torch too, as torch's switches say.
        sizes: of the matrices; by default :data:`CPU_SIZES` or :data:`GPU_SIZES`.

    Raises:
        ValueError: for float64, which is what results are compared with.
    """
    if dtype == torch.float64:
        raise ValueError("examine in float64: there is nothing more exact to compare with")
    worst, count, exactly = 0.0, 0, True
    for size in sizes or (CPU_SIZES if device.type == "cpu" else GPU_SIZES):
        for name, arguments, exact in _products(size, device, dtype):
            try:
                result = _run(getattr(products, name), arguments, exact)
                ratio, failure = _compare(result, getattr(TorchProducts(), name)(*arguments), exact)
            except Exception as error:
                failure = f"{type(error).__name__}: {str(error).strip().partition('\n')[0]}"
            if failure is not None:
                where = f"{name} of {size.batch} x {size.p} x {size.q}"
                return Verdict(f"{where}: {failure}", count, worst, exactly)
            worst, count = max(worst, ratio), count + 1
            exactly = exactly and torch.equal(result, result.mT)
    return Verdict(None, count, worst, exactly)


def _run(product: Callable[..., torch.Tensor], arguments: tuple[Any, ...], exact: torch.Tensor) -> torch.Tensor:
    # One that writes nothing would otherwise return what lay in memory: perhaps an earlier, right result.
    poison = torch.full_like(exact, float("nan"), dtype=arguments[0].dtype)
    del poison
    result = product(*arguments)
    if result.is_cuda:
        torch.cuda.synchronize(result.device)  # so that an error is met here
    return result


def _compare(result: torch.Tensor, torchs: torch.Tensor, exact: torch.Tensor) -> tuple[float, str | None]:
    """The larger error as a multiple of torch's, and what is wrong."""
    if result.shape != torchs.shape or result.dtype != torchs.dtype:
        return 0.0, f"the result is {tuple(result.shape)} {result.dtype}, not {tuple(torchs.shape)} {torchs.dtype}"
    if not bool(torch.isfinite(result).all()):
        return 0.0, "the result is not finite"
    (norm, largest, asymmetry), (torchs_norm, torchs_largest, _) = _errors(result, exact), _errors(torchs, exact)
    least = _SUMS_IN_FLOAT32
    ratio = max(norm / max(torchs_norm, least), largest / max(torchs_largest, least))
    if not ratio <= LIMIT:
        return ratio, f"error {ratio:.3g} x torch's, at most {LIMIT:g} x is rounding"
    # Two elements that are both as near to the exact value as torch's differ by no more than twice its error.
    if not asymmetry <= 2 * max(torchs_largest, least):
        return ratio, f"not symmetric: elements across the diagonal differ by {asymmetry:.2e} of the largest"
    return ratio, None


def _errors(result: torch.Tensor, exact: torch.Tensor) -> tuple[float, float, float]:
    """Against the exact value: Frobenius norm, largest element, and largest difference across the diagonal."""
    wide, size = result.double(), float(exact.abs().max())
    difference = wide - exact
    across = float((wide - wide.mT).abs().max()) / size
    return float(difference.norm() / exact.norm()), float(difference.abs().max()) / size, across


def _products(
    size: Size, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, tuple[Any, ...], torch.Tensor]]:
    """The three products with symmetric results, of matrices such as the iteration meets, with their exact values."""
    generator = torch.Generator().manual_seed(size.p)  # not the generator that initializes models
    shape = (size.batch, size.q, size.p) if size.tall else (size.batch, size.p, size.q)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) / size.q**0.5
    x = x.to(device, dtype)
    x = x.mT if size.tall else x
    gram = x.double() @ x.double().mT
    yield "gram", (x,), gram

    b, c = -4.775, 2.0315
    r = _symmetric_part(gram.to(dtype).double()).to(dtype)
    exact_z = b * r.double() + c * (r.double() @ r.double())
    yield "quadratic", (r, b, c), exact_z

    a = 3.4445
    z = _symmetric_part(exact_z).to(dtype)
    # Rounding keeps R and Z from commuting exactly: no half of the product is more right than the other.
    yield "commuting", (r, z, a, b), _symmetric_part(a * r.double() + b * (r.double() @ z.double()))


def _symmetric_part(x: torch.Tensor) -> torch.Tensor:
    return (x + x.mT) / 2


@dataclass(frozen=True)
class Trial:
    """What implementations are timed by.

    Attributes:
        shape: (batch, rows, columns) of matrices that the run will have, those that most of its time goes to.
        iterate: what it will do with them, by an implementation.
    """

    shape: tuple[int, int, int]
    iterate: Callable[[TorchProducts, torch.Tensor], object]

    def seconds(self, products: TorchProducts, device: torch.device, dtype: torch.dtype) -> float:
        """The time of one iteration over a batch of random matrices."""
        generator = torch.Generator(device).manual_seed(0)  # not the generator that initializes models
        x = torch.randn(self.shape, generator=generator, dtype=torch.float32, device=device).to(dtype)
        return seconds(lambda: self.iterate(products, x), device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long work takes on a device: the median of :func:`times`."""
    return statistics.median(times(work, device))


def times(work: Callable[[], object], device: torch.device) -> list[float]:
    """How long work takes on a device in seconds, once it is compiled and warm, five times.

    Waits for the device: for set-up, not for a step.
    """
    found = []
    for _ in range(7):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.device(device):
                start.record()
                work()
                end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            work()
            found.append(time.perf_counter() - begin)
    return found[2:]
