"""The class: which iteration it takes for which shape, batches, operations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_muon import Muon
from megatron_muon.orthogonalize.backends import choose_products
from megatron_muon.orthogonalize.coefficients import CUSTOM, Iteration
from megatron_muon.orthogonalize.newton_schulz import newton_schulz
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer
from megatron_muon.orthogonalize.products import BlockProducts, TorchProducts
from megatron_muon.orthogonalize.restarts import best_restarts
from tests.iterations import CPU, EVERY_SET, TRIPLES, error, gaussian, set_of, standard, tolerance
from tests.pairwise import pairwise
from tests.reference import orthogonalized, polynomial, with_singular_values


@pytest.mark.parametrize("name", EVERY_SET)
def test_the_class_takes_the_same_path_for_each_shape(name: str) -> None:
    """Square: standard; wide and tall: Gram. Both against singular values."""
    iteration = Orthogonalizer(Iteration(set_of(name, 5)), torch.float64)
    assert iteration.method(12, 12).restarts is None
    assert iteration.method(8, 40).restarts == iteration.method(40, 8).restarts == iteration.restarts
    for m, n in [(12, 12), (8, 40), (40, 8), (1, 5), (5, 1)]:
        x = gaussian(3, m, n)
        expected = torch.stack([orthogonalized(matrix, iteration.coefficients) for matrix in x])
        assert error(iteration(x), expected) < tolerance(x, iteration.coefficients)


@pytest.mark.parametrize("name", EVERY_SET)
@pytest.mark.parametrize("shape", [(30, 6), (6, 30), (9, 9), (7, 1), (1, 7)])
def test_tall_and_wide_through_the_optimizer(name: str, shape: tuple[int, int]) -> None:
    """Minus the weight is the direction, at lr 1 without momentum."""
    param = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    param.grad = gaussian(*shape)
    custom = [",".join(map(str, triple)) for triple in TRIPLES] if name == CUSTOM else []
    Muon(
        [param], lr=1.0, momentum=0.0, weight_decay=0.0, scale_mode="none", coefficient_type=name,
        custom_coefficients=custom, fp32_matmul_prec="highest",
    ).step()  # fmt: skip
    triples = set_of(name, 5)
    assert error(-param.detach(), orthogonalized(param.grad, triples)) < tolerance(param.grad, triples)


SPECTRA = {
    "gaussian": None,
    "three decades": torch.logspace(0, -3, 96, dtype=torch.float64),
    "five decades": torch.logspace(0, -5, 96, dtype=torch.float64),
    "1 / i": 1 / torch.arange(1, 97, dtype=torch.float64),
    "rank 10 and noise": torch.tensor([1.0] * 10 + [1e-4] * 86, dtype=torch.float64),
}
SETS = [("quintic", 5), ("simple", 5), ("polar_express", 5), ("polar_express", 8), ("deepseekv4", 10), ("cubic5", 5)]
SETS += [("aol", 4), ("quintic", 8)]


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("name", "steps"), SETS)
def test_float16_gram_errs_less_than_bfloat16(name: str, steps: int, spectrum: str) -> None:
    triples, s = set_of(name, steps), SPECTRA[spectrum]
    x = gaussian(96, 384) if s is None else with_singular_values(s, 96, 384)
    exact = orthogonalized(x, triples)[None]
    half, brain = (Orthogonalizer(Iteration(triples), dtype) for dtype in (torch.float16, torch.bfloat16))
    assert half.method(96, 384).restarts is not None
    assert error(half(x[None].float()), exact) < error(brain(x[None].float()), exact)


UPSTREAM_SHAPES = [(64, 64), (128, 256), (256, 128), (300, 40), (1, 50), (50, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 5])
def test_errs_no_more_than_upstream(dtype: torch.dtype, batch: int) -> None:
    """Against the exact polynomial, of the same matrices. float16 is compared with upstream's bfloat16: it has none."""
    from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz as upstream

    triples = set_of("quintic", 5)
    products, _ = choose_products("auto", CPU, dtype)
    for m, n in UPSTREAM_SHAPES:
        x = gaussian(batch, m, n, dtype=torch.float32)
        exact = newton_schulz(x.double(), Iteration(triples))
        try:
            torch.set_float32_matmul_precision("highest" if dtype == torch.float32 else "medium")
            theirs = upstream(x, 5, "quintic")
        finally:
            torch.set_float32_matmul_precision("highest")
        found = Orthogonalizer(Iteration(triples), dtype, products=products)(x)
        assert error(found, exact) <= 1.1 * error(theirs, exact) + torch.finfo(dtype).eps, (m, n)


BENCH_SHAPES = [(512, 512), (512, 1408), (128, 512), (128, 256)]


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(("p", "q"), BENCH_SHAPES)
def test_float32_errs_like_standard(p: int, q: int, backend: str) -> None:
    """By the same kernels. oneDNN's sums are longer than those of torch's products: they err up to twice as much."""
    triples, x = set_of("quintic", 5), gaussian(1, p, q, dtype=torch.float32)
    exact = standard(x.double(), triples)
    products, _ = choose_products(backend, CPU, torch.float32)
    chosen = Orthogonalizer(Iteration(triples), torch.float32, products=products)
    alike = newton_schulz(x, Iteration(triples), products=products)
    assert error(chosen(x), exact) <= 1.2 * error(alike, exact)
    assert error(alike, exact) <= 2.0 * error(standard(x, triples, torch.float32), exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(6, 6), (4, 24), (1, 9)])
def test_zero_matrices_give_zeros_and_leave_the_others_alone(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    iteration = Orthogonalizer(Iteration(set_of("quintic", 5)), dtype)
    x = gaussian(3, *shape, dtype=torch.float32)
    expected = iteration(x)
    x[1] = 0
    found = iteration(x)
    assert torch.equal(found[1], torch.zeros(shape, dtype=dtype))
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert torch.equal(iteration(torch.zeros(2, *shape)), torch.zeros(2, *shape, dtype=dtype))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)],
)
def test_one_row(dtype: torch.dtype, tolerance: float) -> None:
    """The row, divided by its norm, times p(1). Some roundings of each step; the slope of this set at 1 is 1.3."""
    triples, x = set_of("quintic", 5), gaussian(4, 1, 50)
    expected = torch.nn.functional.normalize(x, dim=-1) * polynomial(torch.ones((), dtype=torch.float64), triples)
    found = Orthogonalizer(Iteration(triples), dtype)(x if dtype == torch.float64 else x.float())
    assert found.shape == x.shape and found.dtype == dtype
    assert error(found, expected) < tolerance


@pytest.mark.parametrize("name", EVERY_SET)
def test_bfloat16_is_always_standard(name: str) -> None:
    triples = set_of(name, 5)
    assert best_restarts(triples, torch.bfloat16) is None
    iteration = Orthogonalizer(Iteration(triples), torch.bfloat16)
    assert [iteration.method(8, q).restarts for q in (8, 16, 4000)] == [None] * 3


# Batches and operations.


@pytest.mark.parametrize(
    ("size", "dtype", "products"),
    pairwise(
        [(16, 16), (24, 40), (1, 9), (8, 100)], [torch.float64, torch.float32], [TorchProducts(), BlockProducts(8)]
    ),
)
def test_a_batch_is_each_matrix_by_itself(size: tuple[int, int], dtype: torch.dtype, products: TorchProducts) -> None:
    """Bitwise where the library multiplies batches like single matrices, which it does not promise."""
    iteration = Orthogonalizer(Iteration(set_of("quintic", 5)), dtype, products=products)
    x = gaussian(5, *size, dtype=dtype)
    each = torch.cat([iteration(matrix[None]) for matrix in x])
    torch.testing.assert_close(iteration(x), each, rtol=0, atol=1e-13 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_batch_of_16_bits_differs_by_less_than_it_errs(dtype: torch.dtype) -> None:
    iteration = Orthogonalizer(Iteration(set_of("quintic", 5)), dtype, products=BlockProducts(8))
    x = gaussian(5, 24, 40, dtype=torch.float32)
    together = iteration(x).double()
    each = torch.cat([iteration(matrix[None]) for matrix in x])
    exact = standard(x.double(), iteration.coefficients)
    assert error(each, together) < 0.1 * error(each, exact)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Batches of three 16 x 40 float32 matrices at most; the sizes of those that were computed."""
    sizes: list[int] = []
    iterated = Orthogonalizer._iterated

    def counting(self: Orthogonalizer, given: list[torch.Tensor], overwrite: bool) -> torch.Tensor:
        sizes.append(given[-1].size(0))
        return iterated(self, given, overwrite)

    monkeypatch.setattr(Orthogonalizer, "batch_bytes", {"cpu": 3 * 16 * 40 * 4})
    monkeypatch.setattr(Orthogonalizer, "_iterated", counting)
    yield sizes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_parts_of_a_batch_give_the_same(small_batches: list[int], dtype: torch.dtype) -> None:
    iteration = Orthogonalizer(Iteration(set_of("quintic", 5)), dtype)
    x = gaussian(8, 16, 40, dtype=torch.promote_types(dtype, torch.float32))
    found = iteration(x)
    expected = {torch.float64: [1] * 8, torch.float32: [3, 3, 2], torch.bfloat16: [6, 2], torch.float16: [6, 2]}
    assert small_batches == expected[dtype]
    assert found.dtype == dtype and found.is_contiguous()
    given = [x.clone()]
    assert torch.equal(iteration.use_up(given), found) and not given
    whole = torch.cat([iteration(matrix[None]) for matrix in x])
    assert error(found, whole.double()) < {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, 1e-3)


def test_a_matrix_larger_than_the_bound_is_a_batch(small_batches: list[int]) -> None:
    Orthogonalizer(Iteration(set_of("quintic", 5)), torch.float32)(gaussian(2, 60, 80, dtype=torch.float32))
    assert small_batches == [1, 1]


def test_the_argument_is_not_changed() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        iteration, x = Orthogonalizer(Iteration(set_of("quintic", 5)), dtype), gaussian(2, 6, 30, dtype=dtype)
        before = x.clone()
        iteration(x)
        assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("steps", "dtype", "products"),
    pairwise(
        [("quintic", 5), ("polar_express", 5), ("simple", 1), ("cans", 4)],
        [torch.float32, torch.bfloat16, torch.float16],
        [TorchProducts(), BlockProducts(8)],
    ),
)
def test_operations_are_those_that_torch_counts(
    steps: tuple[str, int], dtype: torch.dtype, products: TorchProducts
) -> None:
    iteration = Orthogonalizer(Iteration(set_of(*steps)), dtype, products=products)
    for p, q in [(16, 16), (20, 33), (16, 200), (1, 7), (37, 37)]:
        for m, n in ((p, q), (q, p)):
            with FlopCounterMode(display=False) as counter:
                iteration(gaussian(3, m, n, dtype=torch.float32))
            assert counter.get_total_flops() == 3 * iteration.flops(p, q) == 3 * iteration.flops(m, n), (m, n)


@pytest.mark.parametrize("products", [TorchProducts(), BlockProducts(8)], ids=lambda products: products.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_tall_matrix_is_its_transpose_in_its_own_memory_order(dtype: torch.dtype, products: TorchProducts) -> None:
    """Of the products, too, those as large as the matrix lie as it does. Sums have another order: roundings, times
    the slope of the polynomial, which is 3.4^5 at the smallest singular values and about 1 at most."""
    iteration, orders = Orthogonalizer(Iteration(set_of("quintic", 5)), dtype, products=products), []

    class Noting(type(products)):  # type: ignore[misc]
        def gram(self, x: torch.Tensor) -> torch.Tensor:
            orders.append(x.mT.is_contiguous())
            return super().gram(x)

    iteration.products = Noting(*([8] if isinstance(products, BlockProducts) else []))
    for p, q in [(24, 40), (8, 100), (20, 21)]:
        wide = gaussian(3, p, q, dtype=torch.promote_types(dtype, torch.float32))
        found = iteration(wide.mT.contiguous())
        assert orders and all(orders) and found.is_contiguous()
        expected = iteration(wide)
        assert error(found.mT, expected.double()) < 64 * torch.finfo(dtype).eps
        tall, there = newton_schulz(wide.mT, iteration.iteration), newton_schulz(wide, iteration.iteration)
        assert error(tall.mT, there.double()) < 64 * torch.finfo(wide.dtype).eps
        orders.clear()


@pytest.mark.parametrize("products", [TorchProducts(), BlockProducts(8)], ids=lambda products: products.name)
def test_the_cheaper_iteration_is_taken(products: TorchProducts) -> None:
    iteration = Orthogonalizer(Iteration(set_of("quintic", 5)), torch.float32, products=products)
    for p, q in itertools.product([1, 8, 32, 48], [48, 64, 100, 400]):
        flops = (iteration.gram_flops(p, q), iteration.standard_flops(p, q))
        assert iteration.flops(p, q) == min(flops)
        assert (iteration.method(p, q).restarts is not None) == (flops[0] < flops[1])


def test_blocks_do_part_of_the_work() -> None:
    """Of the symmetric products 5/8, where four blocks have enough rows."""
    for rows, share in [(64, 1.0), (17, 1.0), (16, 5 / 8), (8, 5 / 8)]:
        assert BlockProducts(rows).symmetric_flops(64, 100) == share * TorchProducts().symmetric_flops(64, 100)


def test_names_for_reports() -> None:
    quintic, bf16 = Iteration(set_of("quintic", 5)), torch.bfloat16
    assert str(Orthogonalizer(quintic, torch.float16).method(8, 80)) == "Gram Newton-Schulz, float16, restarts 2"
    assert str(Orthogonalizer(quintic, bf16).method(8, 80)) == "standard Newton-Schulz, bfloat16"
    once = Orthogonalizer(Iteration(quintic.coefficients[:2]), torch.float32)
    assert once.method(8, 80).restarts == ()
    assert str(once.method(8, 80)) == "Gram Newton-Schulz, float32, restarts none"
