"""The choice among iterations, and each iteration, against scalar polynomials and standard Newton-Schulz in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_muon import Muon
from megatron_muon.orthogonalize.backends import choose_products
from megatron_muon.orthogonalize.coefficients import CUSTOM, Coefficients, coefficient_types, coefficients
from megatron_muon.orthogonalize.gram import gram_iteration, prescale, segments
from megatron_muon.orthogonalize.newton_schulz import normalized, standard_iteration
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer
from megatron_muon.orthogonalize.products import BlockProducts, TorchProducts
from megatron_muon.orthogonalize.restarts import CONDITION_LIMIT, best_restarts, condition
from tests.reference import orthogonalized, polynomial, with_singular_values

TRIPLES = ((3.4, -4.7, 2.0), (2.0, -1.5, 0.5))
EVERY_SET = (*coefficient_types(), CUSTOM)
EPS = 1e-7
CPU = torch.device("cpu")
HALF_NORMAL = 2.0**-14
"""The smallest normal number of float16."""


def set_of(name: str, steps: int) -> Coefficients:
    return coefficients(name, steps, TRIPLES if name == CUSTOM else ())


def gaussian(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def standard(x: torch.Tensor, steps: Coefficients, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return standard_iteration(normalized(x, dtype, EPS), steps)


def gram(x: torch.Tensor, steps: Coefficients, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    restarts = best_restarts(steps, dtype)
    assert restarts is not None
    scale = prescale(dtype, x.size(-2))
    return gram_iteration(normalized(x, dtype, EPS, scale=scale), steps, restarts, TorchProducts(), scale)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float(torch.linalg.vector_norm(found.double() - expected) / torch.linalg.vector_norm(expected))


def tolerance(x: torch.Tensor, steps: Coefficients) -> float:
    """1e-12 in float64, more only where the polynomial is steep: at 1, the singular value of a single row, by ``cans``.

    Its slope there is 5e4, and multiplies the rounding of the norm.
    """
    s = torch.linalg.svdvals(x)
    s = (s / s.norm(dim=-1, keepdim=True)).requires_grad_()
    (slope,) = torch.autograd.grad(polynomial(s, steps).sum(), s)
    return max(1e-12, torch.finfo(torch.float64).eps * float(slope.abs().max()))


# Against the scalar polynomial and each other, in float64.

SHAPES = [(8, 20), (12, 12), (1, 8), (1, 1), (3, 300)]


@pytest.mark.parametrize("path", [standard, gram])
@pytest.mark.parametrize("steps", [1, 5, 9])
@pytest.mark.parametrize("name", EVERY_SET)
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
def test_the_class_takes_the_same_path_for_each_shape(name: str) -> None:
    """Square: standard; wide: Gram. Both against singular values."""
    iteration = Orthogonalizer(set_of(name, 5), torch.float64)
    assert iteration.method(12, 12).restarts is None
    assert iteration.method(8, 40).restarts == (2, 4)
    for p, q in [(12, 12), (8, 40), (1, 5)]:
        x = gaussian(3, p, q)
        expected = torch.stack([orthogonalized(matrix, iteration.coefficients) for matrix in x])
        assert error(iteration(x), expected) < tolerance(x, iteration.coefficients)


@pytest.mark.parametrize("name", EVERY_SET)
@pytest.mark.parametrize("shape", [(30, 6), (6, 30), (9, 9), (7, 1), (1, 7)])
def test_tall_and_wide_through_the_optimizer(name: str, shape: tuple[int, int]) -> None:
    """The optimizer turns tall matrices: minus the weight is the direction, at lr 1 without momentum."""
    param = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    param.grad = gaussian(*shape)
    custom = [",".join(map(str, triple)) for triple in TRIPLES] if name == CUSTOM else []
    Muon(
        [param], lr=1.0, momentum=0.0, weight_decay=0.0, scale_mode="none", coefficient_type=name,
        custom_coefficients=custom, fp32_matmul_prec="highest",
    ).step()  # fmt: skip
    triples = set_of(name, 5)
    assert error(-param.detach(), orthogonalized(param.grad, triples)) < tolerance(param.grad, triples)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 8, 10])
@pytest.mark.parametrize("name", EVERY_SET)
def test_gram_equals_standard(name: str, steps: int) -> None:
    triples = set_of(name, steps)
    for p, q in [(8, 20), (12, 12), (1, 8)]:
        x = gaussian(2, p, q)
        assert error(gram(x, triples), standard(x, triples)) < tolerance(x, triples)


@pytest.mark.parametrize("name", EVERY_SET)
def test_restarts_anywhere_change_nothing_but_rounding(name: str) -> None:
    """Without any, small directions lose digits in float64 too: hence not 1e-12."""
    triples, x = set_of(name, 5), gaussian(2, 8, 20)
    expected, batch = standard(x, triples), normalized(x, torch.float64, EPS)
    for count in range(5):
        for restarts in itertools.combinations(range(1, 5), count):
            assert error(gram_iteration(batch, triples, restarts, TorchProducts()), expected) < 1e-10, restarts


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
    expected = gram_iteration(batch, triples, (2,), TorchProducts())
    for scale in (2.0, 16.0):
        assert torch.equal(gram_iteration(batch * scale, triples, (2,), TorchProducts(), scale), expected)


# Restarts.

# Condition of the best choice by the table in the notes on Gram Newton-Schulz: (set, steps) -> positions, condition.
TABLE = [
    ("quintic", 5, (2,), 53),
    ("simple", 5, (3,), 63),
    ("polar_express", 5, (1,), 631),
    ("polar_express", 5, (1, 2), 69),
    ("deepseekv4", 10, (2, 4, 6), 73),
]
CHOSEN = [("quintic", 5), ("simple", 5), ("polar_express", 5), ("polar_express", 8), ("deepseekv4", 10), (CUSTOM, 4)]


@pytest.mark.parametrize(("name", "steps", "restarts", "expected"), TABLE)
def test_conditions_of_the_table(name: str, steps: int, restarts: tuple[int, ...], expected: int) -> None:
    assert round(condition(set_of(name, steps), restarts)) == expected


@pytest.mark.parametrize(
    ("name", "steps", "expected"),
    [
        ("quintic", 5, (2,)),
        ("simple", 5, (3,)),
        ("polar_express", 5, (1, 2)),
        ("deepseekv4", 10, (2, 4, 6)),
        ("cans", 5, None),
        ("aol", 5, None),
        ("quintic", 1, ()),
    ],
)
def test_choice_for_float16(name: str, steps: int, expected: tuple[int, ...] | None) -> None:
    assert best_restarts(set_of(name, steps), torch.float16) == expected


@pytest.mark.parametrize(("name", "steps"), CHOSEN)
def test_no_other_choice_is_better_and_fewer_restarts_are_not_enough(name: str, steps: int) -> None:
    triples = set_of(name, steps)
    chosen = best_restarts(triples, torch.float16)
    assert chosen is not None
    found = condition(triples, chosen)
    assert 1 <= found <= CONDITION_LIMIT
    positions = range(1, steps)
    for other in itertools.combinations(positions, len(chosen)):
        assert condition(triples, other) >= found, other
    for count in range(len(chosen)):
        for fewer in itertools.combinations(positions, count):
            assert condition(triples, fewer) > CONDITION_LIMIT, fewer


@pytest.mark.parametrize(("name", "steps"), [("cans", 5), ("aol", 5), ("quintic", 8)])
def test_sets_without_a_choice_have_none_at_all(name: str, steps: int) -> None:
    triples = set_of(name, steps)
    assert best_restarts(triples, torch.float16) is None
    for count in range(steps):
        for restarts in itertools.combinations(range(1, steps), count):
            assert condition(triples, restarts) > CONDITION_LIMIT, restarts
    assert Orthogonalizer(triples, torch.float16).method(8, 400).restarts is None


def test_a_diverging_iteration_has_no_condition() -> None:
    assert condition(((1e200, 1e200, 1e200),) * 3, ()) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_types_restart_before_every_second_step(dtype: torch.dtype) -> None:
    expected = {1: (), 2: (), 3: (2,), 4: (2,), 5: (2, 4), 6: (2, 4), 8: (2, 4, 6)}
    for name in EVERY_SET:
        assert {steps: best_restarts(set_of(name, steps), dtype) for steps in expected} == expected


@pytest.mark.parametrize("name", EVERY_SET)
def test_bfloat16_is_always_standard(name: str) -> None:
    triples = set_of(name, 5)
    assert best_restarts(triples, torch.bfloat16) is None
    iteration = Orthogonalizer(triples, torch.bfloat16)
    assert [iteration.method(8, q).restarts for q in (8, 16, 4000)] == [None] * 3


# Ranges and precision.


def gram_slice(side: int, rows: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Off-diagonal entries of the float16 Gram matrix of some rows of a Gaussian ``side`` x ``side`` matrix; exactly.

    The slice is normalized by what the norm of the whole is on average, as one rank of a divided matrix would do it.
    """
    x = normalized(
        gaussian(1, rows, side), torch.float16, EPS, scale=scale, reduce=lambda squares: squares * (side / rows)
    )
    off_diagonal = ~torch.eye(rows, dtype=torch.bool)
    exact = x.double() @ x.double().mT
    return TorchProducts().gram(x)[0][off_diagonal].double(), exact[0][off_diagonal]


def test_range_of_float16_at_8192() -> None:
    """Entries of size 1 / (8192 sqrt(8192)) = 1.3e-6 are subnormal, with steps of 6e-8; those times 16^2 are not."""
    side = 8192
    assert prescale(torch.float16, side) == 16.0
    plain, exact = gram_slice(side, 128, 1.0)
    assert (plain.abs() < HALF_NORMAL).all()
    assert error(plain, exact) > 1e-2
    scaled, exact = gram_slice(side, 128, prescale(torch.float16, side))
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
    out = Orthogonalizer(set_of("quintic", 5), torch.float16)(column @ torch.ones(1, 1, 4 * p))
    assert prescale(torch.float16, p) > 1.0
    assert torch.isfinite(out).all()
    # Singular vector times p(1): the first row holds nearly all of it.
    one = float(polynomial(torch.ones(()), set_of("quintic", 5)))
    assert float(torch.linalg.vector_norm(out[0, 0].float())) == pytest.approx(one, rel=5e-3)


SPECTRA = {
    "gaussian": None,
    "three decades": torch.logspace(0, -3, 96, dtype=torch.float64),
    "five decades": torch.logspace(0, -5, 96, dtype=torch.float64),
    "1 / i": 1 / torch.arange(1, 97, dtype=torch.float64),
    "rank 10 and noise": torch.tensor([1.0] * 10 + [1e-4] * 86, dtype=torch.float64),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("name", "steps"), CHOSEN[:5])
def test_float16_gram_errs_less_than_bfloat16(name: str, steps: int, spectrum: str) -> None:
    triples, s = set_of(name, steps), SPECTRA[spectrum]
    x = gaussian(96, 384) if s is None else with_singular_values(s, 96, 384)
    exact = orthogonalized(x, triples)[None]
    half, brain = (Orthogonalizer(triples, dtype) for dtype in (torch.float16, torch.bfloat16))
    assert half.method(96, 384).restarts is not None
    assert error(half(x[None].float()), exact) < error(brain(x[None].float()), exact)


BENCH_SHAPES = [(512, 512), (512, 1408), (128, 512), (128, 256)]


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(("p", "q"), BENCH_SHAPES)
def test_float32_errs_like_standard(p: int, q: int, backend: str) -> None:
    triples, x = set_of("quintic", 5), gaussian(1, p, q, dtype=torch.float32)
    exact = standard(x.double(), triples)
    products, _ = choose_products(backend, CPU, torch.float32)
    chosen = Orthogonalizer(triples, torch.float32, products=products)
    assert error(chosen(x), exact) <= 1.2 * error(standard(x, triples, torch.float32), exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(6, 6), (4, 24), (1, 9)])
def test_zero_matrices_give_zeros_and_leave_the_others_alone(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    iteration = Orthogonalizer(set_of("quintic", 5), dtype)
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
    found = Orthogonalizer(triples, dtype)(x if dtype == torch.float64 else x.float())
    assert found.shape == x.shape and found.dtype == dtype
    assert error(found, expected) < tolerance


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


# Batches and operations.


@pytest.mark.parametrize("products", [TorchProducts(), BlockProducts(8)], ids=lambda products: products.name)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("p", "q"), [(16, 16), (24, 40), (1, 9), (8, 100)])
def test_a_batch_is_each_matrix_by_itself(
    p: int, q: int, dtype: torch.dtype, tolerance: float, products: TorchProducts
) -> None:
    """Bitwise where the library multiplies batches like single matrices, which it does not promise."""
    iteration = Orthogonalizer(set_of("quintic", 5), dtype, products=products)
    x = gaussian(5, p, q, dtype=dtype)
    each = torch.cat([iteration(matrix[None]) for matrix in x])
    torch.testing.assert_close(iteration(x), each, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_batch_of_16_bits_differs_by_less_than_it_errs(dtype: torch.dtype) -> None:
    iteration = Orthogonalizer(set_of("quintic", 5), dtype, products=BlockProducts(8))
    x = gaussian(5, 24, 40, dtype=torch.float32)
    together = iteration(x).double()
    each = torch.cat([iteration(matrix[None]) for matrix in x])
    exact = standard(x.double(), iteration.coefficients)
    assert error(each, together) < 0.1 * error(each, exact)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Batches of three 16 x 40 float32 matrices at most; the sizes of those that were computed."""
    sizes: list[int] = []
    iterate = Orthogonalizer._iterate

    def counting(self: Orthogonalizer, x: torch.Tensor) -> torch.Tensor:
        sizes.append(x.size(0))
        return iterate(self, x)

    monkeypatch.setattr(Orthogonalizer, "batch_bytes", {"cpu": 3 * 16 * 40 * 4})
    monkeypatch.setattr(Orthogonalizer, "_iterate", counting)
    yield sizes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_parts_of_a_batch_give_the_same(small_batches: list[int], dtype: torch.dtype) -> None:
    iteration = Orthogonalizer(set_of("quintic", 5), dtype)
    x = gaussian(8, 16, 40, dtype=torch.promote_types(dtype, torch.float32))
    found = iteration(x)
    expected = {torch.float64: [1] * 8, torch.float32: [3, 3, 2], torch.bfloat16: [6, 2], torch.float16: [6, 2]}
    assert small_batches == expected[dtype]
    assert found.dtype == dtype and found.is_contiguous()
    whole = torch.cat([iteration(matrix[None]) for matrix in x])
    assert error(found, whole.double()) < {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, 1e-3)


def test_a_matrix_larger_than_the_bound_is_a_batch(small_batches: list[int]) -> None:
    Orthogonalizer(set_of("quintic", 5), torch.float32)(gaussian(2, 60, 80, dtype=torch.float32))
    assert small_batches == [1, 1]


def test_the_argument_is_not_changed() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        iteration, x = Orthogonalizer(set_of("quintic", 5), dtype), gaussian(2, 6, 30, dtype=dtype)
        before = x.clone()
        iteration(x)
        assert torch.equal(x, before)


@pytest.mark.parametrize("products", [TorchProducts(), BlockProducts(8)], ids=lambda products: products.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "steps"), [("quintic", 5), ("polar_express", 5), ("simple", 1), ("cans", 4)])
def test_operations_are_those_that_torch_counts(
    name: str, steps: int, dtype: torch.dtype, products: TorchProducts
) -> None:
    iteration = Orthogonalizer(set_of(name, steps), dtype, products=products)
    for p, q in [(16, 16), (20, 33), (16, 200), (1, 7), (37, 37)]:
        with FlopCounterMode(display=False) as counter:
            iteration(gaussian(3, p, q, dtype=torch.float32))
        assert counter.get_total_flops() == 3 * iteration.flops(p, q), (p, q)


@pytest.mark.parametrize("products", [TorchProducts(), BlockProducts(8)], ids=lambda products: products.name)
def test_the_cheaper_iteration_is_taken(products: TorchProducts) -> None:
    iteration = Orthogonalizer(set_of("quintic", 5), torch.float32, products=products)
    for p, q in itertools.product([1, 8, 32, 48], [48, 64, 100, 400]):
        flops = (iteration.gram_flops(p, q), iteration.standard_flops(p, q))
        assert iteration.flops(p, q) == min(flops)
        assert (iteration.method(p, q).restarts is not None) == (flops[0] < flops[1])


def test_blocks_do_part_of_the_work() -> None:
    """Of the symmetric products 5/8, where four blocks have enough rows."""
    for rows, share in [(64, 1.0), (17, 1.0), (16, 5 / 8), (8, 5 / 8)]:
        assert BlockProducts(rows).symmetric_flops(64, 100) == share * TorchProducts().symmetric_flops(64, 100)


def test_names_for_reports() -> None:
    quintic, bf16 = set_of("quintic", 5), torch.bfloat16
    assert str(Orthogonalizer(quintic, torch.float16).method(8, 80)) == "Gram Newton-Schulz, float16, restarts 2"
    assert str(Orthogonalizer(quintic, bf16).method(8, 80)) == "standard Newton-Schulz, bfloat16"
    once = Orthogonalizer(quintic[:2], torch.float32)
    assert once.method(8, 80).restarts == ()
    assert str(once.method(8, 80)) == "Gram Newton-Schulz, float32, restarts none"
