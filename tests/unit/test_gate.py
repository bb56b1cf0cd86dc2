"""The numeric check that stands before each implementation of the products."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_muon.orthogonalize.kernels import gate
from megatron_muon.orthogonalize.kernels.gate import LIMIT, Size, examine
from megatron_muon.orthogonalize.products import BlockProducts, TorchProducts

CPU = torch.device("cpu")
SIZES = (Size(1, 40, 56, tall=True), Size(3, 33, 35))
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Altered(TorchProducts):
    """torch's products, each result passed through a function of (result, operand)."""

    name = "altered"

    def __init__(self, alter: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], only: str = "") -> None:
        self.alter = alter
        self.only = only

    def _altered(self, kind: str, result: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
        return self.alter(result, operand) if self.only in ("", kind) else result

    def gram(self, x: torch.Tensor) -> torch.Tensor:
        return self._altered("gram", super().gram(x), x)

    def quadratic(self, r: torch.Tensor, b: float, c: float) -> torch.Tensor:
        return self._altered("quadratic", super().quadratic(r, b, c), r)

    def commuting(self, r: torch.Tensor, z: torch.Tensor, a: float, b: float = 1.0) -> torch.Tensor:
        return self._altered("commuting", super().commuting(r, z, a, b), r)


def not_a_number(result: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    result[-1, -1, 0] = float("nan")
    return result


def infinite(result: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    result[0, 0, 0] = float("inf")
    return result


def one_element(result: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    result[-1, -1, -2] += 0.2
    result[-1, -2, -1] += 0.2
    return result


def too_large(result: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    return result * 1.05


def not_mirrored(result: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    return result.tril()


def last_row_left_out(result: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    result[:, -1] = 0
    return result


def first_of_the_batch(result: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    return result[:1].expand_as(result)


def one_step_short(result: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    last = operand[..., -1:]
    return result - last @ last.mT


def wide(result: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    return result.double()


def flat(result: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    return result.flatten(0, 1)


def raises(result: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel image\nand so on")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "alter,says",
    [
        (not_a_number, "not finite"),
        (infinite, "not finite"),
        (one_element, "x torch's"),
        (too_large, "x torch's"),
        (not_mirrored, "x torch's"),
        (last_row_left_out, "x torch's"),
        (first_of_the_batch, "x torch's"),
        (one_step_short, "x torch's"),
        (wide, "float64"),
        (flat, "the result is"),
        (raises, "RuntimeError: no kernel image"),
    ],
)
def test_wrong_products_are_caught(alter: Callable[..., torch.Tensor], says: str, dtype: torch.dtype) -> None:
    verdict = examine(Altered(alter), CPU, dtype, SIZES)
    assert verdict.failure is not None and says in verdict.failure, verdict
    assert "\n" not in str(verdict)


@pytest.mark.parametrize("kind", ["gram", "quadratic", "commuting"])
def test_each_product_is_checked(kind: str) -> None:
    verdict = examine(Altered(too_large, only=kind), CPU, torch.bfloat16, SIZES)
    assert verdict.failure is not None and verdict.failure.startswith(f"{kind} of 1 x 40 x 56")


@pytest.mark.parametrize("place,caught", [((1, 40, 56), "1 x 40 x 56"), ((3, 33, 35), "3 x 33 x 35")])
def test_each_size_is_checked(place: tuple[int, int, int], caught: str) -> None:
    def alter(result: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
        return result * (1.05 if tuple(operand.shape) == place else 1.0)

    verdict = examine(Altered(alter), CPU, torch.bfloat16, SIZES)
    assert verdict.failure is not None and caught in verdict.failure


def test_asymmetry_is_caught_where_the_error_alone_is_not() -> None:
    """Three of torch's errors up on one side of the diagonal, three down on the other: within the limit of four."""
    dtype = torch.float16
    _, (x,), exact = next(gate._products(SIZES[0], CPU, dtype))
    torchs = TorchProducts().gram(x)
    _, largest, _ = gate._errors(torchs, exact)
    amount = 3 * largest * float(exact.abs().max())
    result = exact.clone()
    result[0, 5, 2] += amount
    result[0, 2, 5] -= amount
    ratio, failure = gate._compare(result.to(dtype), torchs, exact)
    assert ratio < LIMIT
    assert failure is not None and "not symmetric" in failure
    result[0, 2, 5] += 2 * amount
    assert gate._compare(result.to(dtype), torchs, exact)[1] is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_right_products_pass(dtype: torch.dtype) -> None:
    for products in (TorchProducts(), BlockProducts(8)):
        for sizes in (SIZES, gate.CPU_SIZES):
            verdict = examine(products, CPU, dtype, sizes)
            assert verdict.failure is None and verdict.products == 6 and 0 < verdict.error < 2, verdict
    assert examine(TorchProducts(), CPU, dtype, SIZES).error == 1.0


def test_exact_symmetry_is_reported() -> None:
    mirrored = Altered(lambda result, operand: result.tril() + result.tril(-1).mT)
    assert "exactly symmetric" in str(examine(mirrored, CPU, torch.float32, SIZES))
    assert "symmetric to rounding" in str(examine(TorchProducts(), CPU, torch.float32, SIZES))


def test_check_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    examine(TorchProducts(), CPU, torch.float32, SIZES)
    assert torch.equal(torch.rand(2), expected)


def test_float64_has_nothing_to_be_checked_with() -> None:
    with pytest.raises(ValueError, match="float64"):
        examine(TorchProducts(), CPU, torch.float64, SIZES)
