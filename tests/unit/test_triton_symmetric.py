"""The Triton kernels without a GPU: run by Triton's interpreter.

Triton decides when it is imported whether it interprets, so the functions below run in processes of their own.
"""

from __future__ import annotations

import mmap
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_muon import Muon
from megatron_muon.orthogonalize import iteration
from megatron_muon.orthogonalize.gram import gram_iteration, prescale
from megatron_muon.orthogonalize.products import TorchProducts
from megatron_muon.routing.layout import LAYOUT_ATTRIBUTE, WHOLE, MatrixLayout, Section
from tests.pool import RankPool

triton = pytest.importorskip("triton", reason="Triton is not installed: there is no kernel to test")
import triton.language as tl  # noqa: E402

from megatron_muon.optimizers import codecs  # noqa: E402
from megatron_muon.optimizers.forms import KERNELS  # noqa: E402
from megatron_muon.optimizers.storage import master_of, momentum_of  # noqa: E402
from megatron_muon.orthogonalize.kernels import elementwise, triton_codecs, triton_elementwise, triton_symmetric  # noqa: E402
from megatron_muon.orthogonalize.kernels.triton_symmetric import (  # noqa: E402
    Tile,
    TritonProducts,
    symmetric_product,
)

TIMEOUT_S = 120


class Process:
    """A process with environment variables of its own, started when first needed."""

    def __init__(self, **environment: str) -> None:
        self.environment = {"OMP_NUM_THREADS": "1", **environment}
        self.pool = RankPool(forked=False)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            return self.pool.run(function, 1, *args, timeout=TIMEOUT_S)[0]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Process]:
    process = Process(TRITON_INTERPRET="1")
    assert process.run(is_interpreted)
    yield process
    process.pool.close()


def is_interpreted() -> bool:
    return triton_symmetric.INTERPRETED


# --- values ----------------------------------------------------------------------------------------------------------


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Of -1, 0 and 1: all sums below are exact in every dtype, so that results must be equal."""
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).float()


def check_exact(x: torch.Tensor, c: torch.Tensor | None, tile: Tile | None) -> None:
    alpha, beta = 2.0, -3.0
    expected = alpha * x.double() @ x.double().mT
    if c is not None:
        expected += beta * c.double()
    result = symmetric_product(x, x.mT, c, alpha=alpha, beta=beta if c is not None else 0.0, tile=tile)
    assert result.dtype == x.dtype and result.is_contiguous()
    assert torch.equal(result.double(), expected), (x.dtype, x.shape, x.stride(), tile)


def sizes_and_tiles(dtype: torch.dtype) -> None:
    for size in (16, 32, 64):
        for batch, p, k in ((1, 1, 1), (2, 5, 3), (1, 64, 64), (3, 65, 33), (1, 160, 70), (2, 63, 130), (1, 20, 0)):
            x = integers(batch, p, k, seed=p).to(dtype)
            c = integers(batch, p, p, seed=k).to(dtype)
            check_exact(x, None, Tile(size, 4, 2))
            check_exact(x, c.tril() + c.tril(-1).mT, Tile(size, 4, 2))
    check_exact(integers(1, 150, 20).to(dtype), None, Tile(16, 4, 2))  # 10 rows of tiles: groups of 8 and 2
    check_exact(integers(1, 70, 20).to(dtype), None, None)  # what the interpreter takes by itself


@pytest.mark.parametrize(
    "dtype", [torch.float16, *(pytest.param(each, marks=pytest.mark.slow) for each in (torch.bfloat16, torch.float32))]
)
def test_every_size_and_tile(interpreter: Process, dtype: torch.dtype) -> None:
    interpreter.run(sizes_and_tiles, dtype)


def layouts() -> None:
    tile = Tile(16, 4, 2)
    half = torch.float16
    everything = integers(3, 80, 100).to(half)
    c = integers(3, 40, 40, seed=1).to(half)
    c = c + c.mT
    for x in (
        everything[:, :40, :50],  # rows apart
        everything[:, ::2, 1::2],  # and columns
        integers(3, 50, 40).to(half).mT,  # of a tall matrix
        integers(50, 40, 3).to(half).permute(2, 1, 0),  # the batch innermost
        integers(1, 40, 50).to(half).expand(3, -1, -1),  # one matrix three times
    ):
        check_exact(x, c, tile)
        check_exact(x, c[:1].expand(3, -1, -1), tile)
        check_exact(x[1:], c.permute(0, 2, 1)[1:], tile)
    r = integers(2, 40, 40).to(half)
    r = r + r.mT
    z = torch.eye(40, dtype=half).expand(2, -1, -1) * 3
    assert torch.equal(symmetric_product(r, z, r, beta=2.0, tile=tile), 5 * r)  # B as it lies, not transposed


def test_any_layout_in_memory(interpreter: Process) -> None:
    interpreter.run(layouts)


def result_is_symmetric() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 70, 90, generator=generator)
    assert torch.equal(symmetric_product(x, x.mT), symmetric_product(x, x.mT).mT)
    # The lower half decides, within the tiles on the diagonal too.
    y = torch.randn(2, 90, 70, generator=generator)
    lower = (x @ y).tril()
    result = symmetric_product(x, y, tile=Tile(16, 4, 2))
    torch.testing.assert_close(result, lower + lower.tril(-1).mT, rtol=0, atol=1e-4)
    assert torch.equal(result, result.mT)


def test_result_is_exactly_symmetric(interpreter: Process) -> None:
    interpreter.run(result_is_symmetric)


# --- the walk over the tiles -----------------------------------------------------------------------------------------


@triton.jit
def _walk(out_ptr, tile_rows, GROUP: tl.constexpr):
    index = tl.program_id(0)
    row, column = triton_symmetric._tile_of(index, tile_rows, GROUP)
    tl.store(out_ptr + 2 * index, row)
    tl.store(out_ptr + 2 * index + 1, column)


@triton.jit
def _decode(index_ptr, out_ptr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    row, column = triton_symmetric._triangle(tl.load(index_ptr + place))
    tl.store(out_ptr + 2 * place, row)
    tl.store(out_ptr + 2 * place + 1, column)


def walks() -> None:
    for tile_rows in (1, 2, 7, 8, 9, 19):
        count = tile_rows * (tile_rows + 1) // 2
        out = torch.full((count, 2), -1, dtype=torch.int32)
        _walk[(count,)](out, tile_rows, GROUP=8)
        assert sorted(map(tuple, out.tolist())) == [
            (row, column) for row in range(tile_rows) for column in range(row + 1)
        ]
    # The first and the last of rows so long that float32 cannot tell their neighbours apart.
    rows = torch.tensor([0, 1, 2, 100, 2047, 2048, 4095, 10001, 20000, 30000, 40001, 44444, 45000, 45678, 46000, 46001])
    index = torch.cat([rows * (rows + 1) // 2, rows * (rows + 1) // 2 + rows]).int()
    out = torch.zeros(32, 2, dtype=torch.int32)
    _decode[(1,)](index, out, SIZE=32)
    assert out.tolist() == [[row, 0] for row in rows.tolist()] + [[row, row] for row in rows.tolist()]


def test_each_tile_is_met_once(interpreter: Process) -> None:
    interpreter.run(walks)


# --- large offsets ---------------------------------------------------------------------------------------------------


def sparse(elements: int) -> torch.Tensor:
    """float16 zeros in address space alone: only the pages that are written take memory."""
    no_reserve = 0x4000  # MAP_NORESERVE of Linux
    pages = mmap.mmap(-1, 2 * elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(pages, dtype=torch.float16)


def far_apart() -> None:
    p, k = 40, 70
    x = integers(3, p, k).half()
    c = integers(3, p, p, seed=1).half()
    c = c + c.mT
    third = 2**30 + 16  # of a batch: two of these are beyond 32 bits
    for far_x, far_c in (
        ((third, k, 1), (p * p, p, 1)),  # the batch
        ((k, 2**26, 1), (p * p, p, 1)),  # rows: 40 of them
        ((p, 1, 2**26), (p * p, p, 1)),  # columns: 70, and a step over 64 of them
        ((p * k, k, 1), (third, 1, p)),
        ((p * k, k, 1), (p, 2**26, 1)),
    ):
        spread = []
        for values, strides in ((x, far_x), (c, far_c)):
            extent = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True))
            spread.append(sparse(extent).as_strided(values.shape, strides))
            spread[-1].copy_(values)
        check_exact(*spread, Tile(16, 4, 2))


@pytest.mark.skipif(sys.platform != "linux", reason="reserves address space without memory, as Linux can")
def test_offsets_beyond_32_bits(interpreter: Process) -> None:
    interpreter.run(far_apart)


# --- products and iterations -----------------------------------------------------------------------------------------


def error(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def iterations(name: str, gram: bool, dtype: torch.dtype) -> dict[str, float]:
    """Errors of both implementations of the products after the whole iteration."""
    steps = iteration(name, 5)
    restarts = {"quintic": (2,), "polar_express": (1, 2)}[name]
    scale = prescale(dtype, 96) if gram else 1.0
    x = torch.randn(2, 96, 160, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x / x.norm(dim=(-2, -1), keepdim=True)

    def standard(y: torch.Tensor, products: TorchProducts) -> torch.Tensor:
        for a, b, c in steps.coefficients:
            y = products.multiply_add(y, products.quadratic(products.gram(y), b, c), a)
        return y

    exact = standard(x, TorchProducts())
    errors = {}
    for products in (TorchProducts(), TritonProducts(smallest=1)):
        y = (x * scale).to(dtype)
        y = gram_iteration(y, steps, restarts, products, scale) if gram else standard(y, products)
        assert y.dtype == dtype
        errors[products.name] = error(y, exact)
    return errors


@pytest.mark.parametrize(
    "name,gram,dtype,limit",
    [
        pytest.param(name, *case, marks=() if number % 2 == (name == "polar_express") else pytest.mark.slow)
        for name in ("quintic", "polar_express")
        for number, case in enumerate(
            [
                (False, torch.bfloat16, 8e-2),
                (False, torch.float32, 1e-5),
                (True, torch.float16, 3e-2),
                (True, torch.float32, 1e-5),
            ]
        )
    ],
)
def test_iteration_is_as_exact_as_with_torch(
    interpreter: Process, name: str, gram: bool, dtype: torch.dtype, limit: float
) -> None:
    """As many roundings at the same places; which way each goes differs, and the iteration amplifies it."""
    errors = interpreter.run(iterations, name, gram, dtype)
    torchs, tritons = errors.values()
    assert tritons < 2 * torchs
    assert torchs < limit


def small_ones() -> None:
    products, torchs = TritonProducts(), TorchProducts()
    calls = []
    original = triton_symmetric.symmetric_product
    triton_symmetric.symmetric_product = lambda *args, **kwargs: (
        calls.append(args[0].shape) or original(*args, **kwargs)
    )
    try:
        for p in (255, 256):
            x = torch.randn(1, p, 40, generator=torch.Generator().manual_seed(0))
            r = torchs.gram(x)
            r = (r + r.mT) / 2
            results = [
                (implementation.gram(x), implementation.quadratic(r, 2.0, 3.0), implementation.commuting(r, r, 2.0))
                for implementation in (products, torchs)
            ]
            for own, reference in zip(*results, strict=True):
                torch.testing.assert_close(own, reference, rtol=1e-4, atol=1e-2)
            assert len(calls) == (0 if p == 255 else 3)
    finally:
        triton_symmetric.symmetric_product = original


def test_products_of_few_rows_are_torchs(interpreter: Process) -> None:
    interpreter.run(small_ones)
    assert TritonProducts().symmetric_flops(255, 300) == 2 * 255 * 255 * 300
    assert TritonProducts().symmetric_flops(256, 300) == 256 * 257 * 300


def test_bad_input_is_refused() -> None:
    """Before anything is launched: also without a GPU and without the interpreter."""
    x = torch.ones(2, 4, 6)
    with pytest.raises(TypeError, match="float64"):
        symmetric_product(x.double(), x.double().mT)
    with pytest.raises(ValueError, match="do not fit"):
        symmetric_product(x, x)
    with pytest.raises(ValueError, match="do not fit"):
        symmetric_product(x, x.mT, torch.ones(2, 4, 5))
    with pytest.raises(TypeError, match="float16"):
        symmetric_product(x, x.half().mT)


def test_obstacles_with_interpreter(interpreter: Process) -> None:
    assert interpreter.run(triton_symmetric.obstacle, torch.device("cpu"), torch.float16) is None
    assert "unset TRITON_INTERPRET" in interpreter.run(
        triton_symmetric.obstacle, torch.device("cuda", 0), torch.float16
    )


def chosen_by_name(dtype: torch.dtype) -> str:
    from megatron_muon.orthogonalize.backends import choose_products

    products, line = choose_products("triton", torch.device("cpu"), dtype)
    assert isinstance(products, TritonProducts)
    return line


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16])
def test_backend_by_name_passes_its_check(interpreter: Process, dtype: torch.dtype) -> None:
    line = interpreter.run(chosen_by_name, dtype)
    assert f"{str(dtype).removeprefix('torch.')} on cpu" in line
    assert "6 products checked" in line and "exactly symmetric" in line


# --- elementwise passes ----------------------------------------------------------------------------------------------


def elementwise_bits() -> None:
    """As ``prepare`` finds out on a GPU. bfloat16 is left out: the interpreter does not round to it."""
    cpu, wide, half = torch.device("cpu"), torch.float32, torch.float16
    for name, *types in (
        *(("pack", *each) for each in ((wide, wide, wide), (wide, wide, half), (half, half, half))),
        *(("add", *each) for each in ((wide, wide), (wide, half), (half, wide), (half, half))),
    ):
        text = elementwise._tried(name, cpu, tuple(types), (2, 40, 50))
        assert re.search(r" by torch \(Triton \S+ ms, torch \S+ ms for 2 x 40 x 50\)", text), text  # right; slow here


def fused_weights() -> list[list[torch.Tensor]]:
    """Momentum, gradients and slots: views of several dimensions, of which the others lie between; and nothing."""
    generator = torch.Generator().manual_seed(0)
    momentum, grad, batch = (torch.randn(6, 200, 40, generator=generator).unflatten(1, (4, 50)) for _ in range(3))
    lists = [[x[:, :, :20], x[:, :, 20:]] for x in (momentum, grad)] + [[batch[:, :, 30:], batch[:, :, :30]]]
    return [[*some, torch.empty(0, 40)] for some in lists]


def elementwise_views() -> None:
    own, torchs = fused_weights(), fused_weights()
    momentum, grad, slots = torchs
    elementwise.pack(momentum, grad, slots, 0.95, 0.9)
    elementwise.add(momentum, slots, (0.3, 0.7, 1.0), 0.02, 0.99)
    assert triton_elementwise._table.cache_info().misses == 0, "a kernel that is not yet known to be right was used"

    types = (torch.float32,) * 3
    elementwise._taken.update({(torch.device("cpu"), "pack", types), (torch.device("cpu"), "add", types[:2])})
    versions = [tensor._version for tensor in own[0]]
    elementwise.pack(*own, 0.95, 0.9)
    elementwise.add(own[0], own[2], (0.3, 0.7, 1.0), 0.02, 0.99)
    assert all(torch.equal(*pair) for some in zip(own, torchs, strict=True) for pair in zip(*some, strict=True))
    assert all(tensor._version > version for tensor, version in zip(own[0], versions, strict=True))
    assert triton_elementwise._table.cache_info().misses == 2

    elementwise.pack(*own, 0.8, 1.0)
    elementwise.add(own[0], own[2], (0.3, 0.7, 1.0), 0.01, None)
    elementwise.pack(own[0], [grad.half() for grad in own[1]], own[2], 0.8, 1.0)  # of a type that was not tried
    elementwise.pack(*([x.mT for x in some] for some in own), 0.8, 1.0)  # columns that are no neighbours
    assert triton_elementwise._table.cache_info().misses == 2, "addresses are the same: so is their table"


def weights_after_steps() -> tuple[list[torch.Tensor], list[bool]]:
    """Weights after two steps with Nesterov momentum; and of each call of a kernel, whether it took the tensors."""
    generator, calls = torch.Generator().manual_seed(0), []
    layouts = (WHOLE, WHOLE, WHOLE.stack(), MatrixLayout("qkv", (Section("q", 16), Section("k", 8), Section("v", 8))))
    shapes = ((24, 40), (40, 24), (4, 24, 16), (64, 24))
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for param, layout in zip(params, layouts, strict=True):
        setattr(param, LAYOUT_ATTRIBUTE, layout)
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1, "lr": 0.02}]
    optimizer = Muon(groups, lr=0.01, nesterov=True, fp32_matmul_prec="highest")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("pack", "add"):
            plain = getattr(triton_elementwise, name)
            patch.setattr(triton_elementwise, name, lambda *args, plain=plain: calls.append(plain(*args)) or calls[-1])
        for _ in range(2):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator)
            optimizer.step()
    return [param.detach() for param in params], calls


def elementwise_step() -> None:
    elementwise._taken.clear()
    torchs, calls = weights_after_steps()
    assert not calls
    types = (torch.float32,) * 3
    elementwise._taken.update({(torch.device("cpu"), "pack", types), (torch.device("cpu"), "add", types[:2])})
    own, calls = weights_after_steps()
    assert all(calls) and len(calls) >= 6
    assert all(map(torch.equal, own, torchs))


def elementwise_tails() -> None:
    """Aligned tensors of sizes around those of a block and of 16 elements: what lies behind them stays as it is.

    torch takes whole buffers: at the end of a tensor it rounds in another way on CPUs.
    """
    elementwise._taken.clear()
    sizes = (2, 15, 16, 17, 4080, 4095, 4096, 4097, 8192 + 16)
    for rows, columns in (shape for size in sizes for shape in ((1, size), (size, 1))):
        size, generator = rows * columns, torch.Generator().manual_seed(0)
        before = [torch.randn(size + 128 - size % 64, generator=generator) for _ in range(3)]
        own, torchs = ([buffer.clone() for buffer in before] for _ in range(2))
        views = [[buffer[:size].view(rows, columns)] for buffer in own]
        assert triton_elementwise.pack(*views, 0.95, 0.95)
        assert triton_elementwise.add(views[0], views[2], (0.3,), 0.02, 0.99)
        elementwise.pack(*([buffer] for buffer in torchs), 0.95, 0.95)
        elementwise.add(torchs[:1], torchs[2:], (0.3,), 0.02, 0.99)
        for mine, theirs, old in zip(own, torchs, before, strict=True):
            assert torch.equal(mine, torch.cat([theirs[:size], old[size:]])), (rows, columns)


def test_elementwise_kernels_give_torchs_bits(interpreter: Process) -> None:
    interpreter.run(elementwise_views)
    interpreter.run(elementwise_tails)
    interpreter.run(elementwise_bits)
    interpreter.run(elementwise_step)


def masters_and_momenta() -> list[torch.Tensor]:
    """After two steps of weights of several layouts: of one, rows are of a length that kernels leave to torch."""
    generator = torch.Generator().manual_seed(0)
    layouts = (WHOLE, WHOLE, MatrixLayout("qkv", (Section("q", 2), Section("k", 1), Section("v", 1))))
    params = [
        torch.nn.Parameter(torch.randn(shape, generator=generator).bfloat16())
        for shape in ((6, 256), (9, 10), (8, 512))
    ]
    for param, layout in zip(params, layouts, strict=True):
        setattr(param, LAYOUT_ATTRIBUTE, layout)
    optimizer = Muon(params, lr=0.01, nesterov=True, master="remainder", momentum_dtype="int8")
    for _ in range(2):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).bfloat16()
        optimizer.step()
    kept = [each for param, state in optimizer.state.items() for each in (master_of(param, state), momentum_of(state))]
    return [plane for each in kept for plane in each.planes]


def codec_bits() -> None:
    cpu = torch.device("cpu")
    for name in ("remainder", "int8"):
        text = codecs._tried(name, cpu)
        assert re.fullmatch(name + r" by torch \(Triton \S+ ms, torch \S+ ms\)", text), text  # right; slow here
    torchs = masters_and_momenta()
    counts = {"read": 0, "keep": 0}
    with pytest.MonkeyPatch.context() as patch:
        for name, plain in (("read", triton_codecs.read), ("keep", triton_codecs.keep)):

            def counted(*args: Any, name: str = name, plain: Callable[..., Any] = plain) -> Any:
                found = plain(*args)
                counts[name] += found is not None and found is not False
                return found

            patch.setattr(triton_codecs, name, counted)
        for name in ("remainder", "int8"):
            patch.setitem(KERNELS, (name, cpu), triton_codecs)
        own = masters_and_momenta()
    assert all(counts.values()) and all(map(torch.equal, own, torchs))


def test_kernels_of_other_forms_give_torchs_bits(interpreter: Process) -> None:
    interpreter.run(codec_bits)


def test_kernel_is_not_imported_by_the_package() -> None:
    """It is optional: only a backend that is asked for imports it."""
    package = Path(triton_symmetric.__file__).parents[2]
    importers = [
        path.relative_to(package)
        for path in package.rglob("*.py")
        if re.search(r"^\s*(from|import) .*\btriton\b", path.read_text(), re.MULTILINE)
    ]
    assert sorted(importers) == [
        Path(f"orthogonalize/kernels/triton_{name}.py") for name in ("codecs", "elementwise", "symmetric", "tuning")
    ]
