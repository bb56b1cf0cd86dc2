"""Every implementation of the products on a CUDA GPU: run with ``pytest -m gpu tests/gpu`` where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import pytest
import torch

from megatron_muon.orthogonalize import coefficients
from megatron_muon.orthogonalize.backends import _KERNELS, _checked, candidates, choose_products, report
from megatron_muon.orthogonalize.gram import gram_iteration, prescale
from megatron_muon.orthogonalize.kernels import elementwise
from megatron_muon.orthogonalize.kernels.gate import Size, Trial, examine
from megatron_muon.orthogonalize.products import TorchProducts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

KERNELS = tuple(_KERNELS)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

SIZES = (
    Size(1, 256, 256),
    Size(1, 1024, 4096),
    Size(1, 1024, 4096, tall=True),
    Size(8, 512, 1408),
    Size(2, 2048, 5632),
    Size(64, 128, 768),  # a head each: fewer rows than any kernel takes
    Size(5, 1000, 1001),
    Size(5, 1001, 1000),
    Size(3, 2040, 2056, tall=True),
    Size(1, 300, 70),
)


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)
    _checked.cache_clear()


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def products_of(backend: str, dtype: torch.dtype) -> TorchProducts:
    """The implementation, not yet checked; skips where it cannot run."""
    module_name, class_name = _KERNELS[backend]
    try:
        module = import_module(f"megatron_muon.orthogonalize.kernels.{module_name}")
    except ImportError as error:
        pytest.skip(f"{backend} is not there: {error}")
    reason = module.obstacle(device(), dtype)
    if reason is not None:
        pytest.skip(f"{backend} {reason}")
    return getattr(module, class_name)()


@pytest.mark.parametrize("float32", ["highest", "high"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", KERNELS)
def test_backend_by_name_passes_its_check(backend: str, dtype: torch.dtype, float32: str) -> None:
    expected = products_of(backend, dtype)
    torch.set_float32_matmul_precision(float32)
    products, line = choose_products(backend, torch.device("cuda"), dtype)
    assert type(products) is type(expected)
    assert "9 products checked" in line and str(device()) in line


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", KERNELS)
def test_products_of_many_sizes(backend: str, dtype: torch.dtype) -> None:
    products = products_of(backend, dtype)
    verdict = examine(products, device(), dtype, SIZES)
    assert verdict.failure is None, verdict
    assert verdict.products == 3 * len(SIZES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_takes_the_fastest(dtype: torch.dtype) -> None:
    torch.set_float32_matmul_precision("high")
    trial = Trial((4, 1024, 2048), lambda products, x: products.quadratic(products.gram(x), 2.0, 3.0))
    found = candidates("auto", device(), dtype, trial)
    line = report(found[0], found, device(), dtype, trial)
    assert [each.seconds for each in found] == sorted(each.seconds for each in found)
    assert {each.backend for each in found} == {"torch", *_KERNELS}
    usable = [each for each in found if each.products is not None]
    assert usable[0] is found[0] and all(f"{each.backend} {1e3 * each.seconds:.3g} ms" in line for each in usable)
    assert all(f"{each.backend} {each.text}" in line for each in found if each.products is None)


def standard(x: torch.Tensor, steps: tuple[tuple[float, float, float], ...], products: TorchProducts) -> torch.Tensor:
    for a, b, c in steps:
        x = products.multiply_add(x, products.quadratic(products.gram(x), b, c), a)
    return x


@pytest.mark.parametrize("shape", [(2, 512, 1408), (1, 1024, 1024), (3, 301, 515)])
@pytest.mark.parametrize("gram,dtype", [(False, torch.bfloat16), (True, torch.float16), (True, torch.float32)])
@pytest.mark.parametrize("backend", KERNELS)
def test_iteration_is_as_exact_as_with_torch(
    backend: str, gram: bool, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    products = products_of(backend, dtype)
    steps = coefficients("quintic", 5)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device())
    x = x / x.norm(dim=(-2, -1), keepdim=True)
    exact = standard(x, steps, TorchProducts())
    scale = prescale(dtype, shape[1]) if gram else 1.0
    errors = []
    for implementation in (TorchProducts(), products):
        y = (x * scale).to(dtype)
        y = gram_iteration(y, steps, (2,), implementation, scale) if gram else standard(y, steps, implementation)
        errors.append(float((y.double() - exact).norm() / exact.norm()))
    assert errors[1] < 2 * errors[0], errors


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_give_the_same_bits(dtype: torch.dtype) -> None:
    """Ranks that hold the same weight tune apart; what they choose must not show."""
    products_of("triton", dtype)
    from megatron_muon.orthogonalize.kernels.triton_symmetric import TILES, symmetric_product

    x = torch.randn(2, 700, 900, generator=torch.Generator().manual_seed(0)).to(device(), dtype)
    r = TorchProducts().gram(x)
    r = r.tril() + r.tril(-1).mT
    for operands in ((x, x.mT, None), (x.mT.contiguous().mT, x.mT, None), (r, r.mT, r)):
        results = [symmetric_product(*operands, alpha=0.7, beta=-1.3, tile=tile) for tile in TILES]
        assert all(torch.equal(results[0], result) for result in results[1:])
        assert torch.equal(results[0], results[0].mT)
        assert torch.equal(symmetric_product(*operands, alpha=0.7, beta=-1.3), results[0])


@pytest.mark.parametrize("shape", [(9, 256, 2**20), (1, 47_000, 64)], ids=["operands", "result"])
def test_offsets_beyond_32_bits(shape: tuple[int, int, int]) -> None:
    products_of("triton", torch.float16)
    from megatron_muon.orthogonalize.kernels.triton_symmetric import symmetric_product

    batch, p, k = shape
    needed = 2 * (2 * batch * p * k + 2 * batch * p * p)
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    # Small whole numbers in few places: every sum is exact in float16.
    x = torch.zeros(shape, dtype=torch.float16, device=device())
    x[..., :16] = torch.randint(-2, 3, (batch, p, 16), device=device()).half()
    x[..., -16:] = torch.randint(-2, 3, (batch, p, 16), device=device()).half()
    result = symmetric_product(x, x.mT)
    for rows in (slice(0, 128), slice(p - 128, p)):
        for index in (0, batch - 1):
            ends = torch.cat([x[index, :, :16], x[index, :, -16:]], dim=1).float()
            expected = ends[rows] @ ends.mT
            assert torch.equal(result[index, rows].float(), expected)
            assert torch.equal(result[index, :, rows].float(), expected.mT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elementwise_kernels_give_torchs_bits(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    narrow = torch.bfloat16
    text = elementwise.prepare(device(), dtype, (dtype, narrow), (dtype, narrow), [(768, 2048)] * 42)
    assert text.count(" ms for 42 x 768 x 2048)") == len({dtype, narrow}) * 2, text


def test_elementwise_kernels_wait_for_nothing() -> None:
    pytest.importorskip("triton")
    lists = [list(torch.randn(8, 256, 512, device=device())) for _ in range(3)]
    elementwise.prepare(device(), torch.float32, (torch.float32,), (torch.float32,), [(256, 512)] * 8)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert import_module("megatron_muon.orthogonalize.kernels.triton_elementwise").pack(*lists, 0.95, 0.95)
    finally:
        torch.cuda.set_sync_debug_mode("default")
