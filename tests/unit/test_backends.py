"""The choice among implementations of the products, and the numeric check that stands before each."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_muon.errors import ConfigError
from megatron_muon.orthogonalize import backends
from megatron_muon.orthogonalize.backends import BACKENDS, choose_products
from megatron_muon.orthogonalize.kernels import bulk_copyable, emerging, gate, vendor
from megatron_muon.orthogonalize.kernels.gate import LIMIT, Size, examine
from megatron_muon.orthogonalize.products import BlockProducts, TorchProducts

CPU = torch.device("cpu")
SIZES = (Size(1, 40, 56, tall=True), Size(3, 33, 35))
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    backends._candidate.cache_clear()
    yield
    backends._candidate.cache_clear()


# --- the check -------------------------------------------------------------------------------------------------------


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

    def commuting(self, r: torch.Tensor, z: torch.Tensor, a: float) -> torch.Tensor:
        return self._altered("commuting", super().commuting(r, z, a), r)


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
    product = next(gate._products(SIZES[0], CPU, dtype))
    torchs = gate._errors(product.of(TorchProducts()), product.exact)
    amount = 3 * torchs.largest * float(product.exact.abs().max())
    result = product.exact.clone()
    result[0, 5, 2] += amount
    result[0, 2, 5] -= amount
    ratio, failure = gate._compare(result.to(dtype), product.of(TorchProducts()), product.exact)
    assert ratio < LIMIT
    assert failure is not None and "not symmetric" in failure
    result[0, 2, 5] += 2 * amount
    assert gate._compare(result.to(dtype), product.of(TorchProducts()), product.exact)[1] is None


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


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts made-up implementations in the place of the real ones."""
    monkeypatch.setattr(gate, "CPU_SIZES", SIZES)
    monkeypatch.setattr(backends, "_KERNELS", {})

    def put(backend: str, products: Callable[[], TorchProducts], obstacle: str | None = None) -> None:
        module: Any = ModuleType(backend)
        module.obstacle = lambda device, dtype: obstacle
        module.Products = products
        monkeypatch.setitem(sys.modules, f"megatron_muon.orthogonalize.kernels.{backend}", module)
        backends._KERNELS[backend] = backends._Kernel(backend, "Products", "the rest by torch")

    return put


class Good(Altered):
    name = "good"

    def __init__(self) -> None:
        super().__init__(lambda result, operand: result)


def broken() -> TorchProducts:
    return Altered(too_large)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_cpu_multiplies_by_blocks(dtype: torch.dtype) -> None:
    rows = backends._CPU_BLOCK_ROWS[dtype]
    products, line = choose_products("auto", CPU, dtype)
    assert isinstance(products, BlockProducts) and products.block_rows == rows
    assert line.startswith(products.name) and f"blocks of {rows} rows" in line and "on cpu" in line


def test_torch_by_name() -> None:
    for device in (CPU, torch.device("cuda", 0)):  # torch is not checked: no GPU is needed
        products, line = choose_products("torch", device, torch.bfloat16)
        assert type(products) is TorchProducts
        assert "bfloat16" in line and "--muon-ns-backend" in line


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match=r"--muon-ns-backend cublas: choose one of auto, torch, triton, emerging"):
        choose_products("cublas", CPU, torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS[3:])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_is_not_there_is_refused_by_name(backend: str, dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=rf"--muon-ns-backend {backend}, .* on cpu: it .*Use auto or torch"):
        choose_products(backend, CPU, dtype)


def test_wrong_backend_by_name_stops_the_run(install: Callable[..., None]) -> None:
    install("triton", broken)
    with pytest.raises(
        ConfigError, match=r"--muon-ns-backend triton.*fails the numeric check: gram of 1 x 40 x 56.*x "
    ):
        choose_products("triton", CPU, torch.bfloat16)


def test_auto_passes_over_what_fails_and_says_so(install: Callable[..., None]) -> None:
    install("gram_newton_schulz", Good, "is not there")
    install("emerging", broken)
    install("triton", Good)
    products, text = backends._first_that_passes(CPU, torch.bfloat16)
    assert products.name == "good"
    assert "6 products checked: error 1.00 x torch's" in text and "the rest by torch" in text
    assert "gram_newton_schulz is not there" in text and "emerging fails the numeric check" in text


def test_auto_ends_with_torch(install: Callable[..., None]) -> None:
    install("emerging", broken)
    install("triton", lambda: Altered(not_a_number))
    products, text = backends._first_that_passes(CPU, torch.float16)
    assert type(products) is TorchProducts
    assert "emerging fails" in text and "triton fails" in text


def test_package_that_breaks_when_loaded_is_passed_over(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(device: torch.device, dtype: torch.dtype) -> str:
        raise OSError("libcute.so: version mismatch")

    install("emerging", Good)
    monkeypatch.setattr(sys.modules["megatron_muon.orthogonalize.kernels.emerging"], "obstacle", fail)
    install("triton", Good)
    products, text = backends._first_that_passes(CPU, torch.bfloat16)
    assert products.name == "good" and "emerging cannot be loaded (OSError: libcute.so: version mismatch)" in text


def test_order_is_vendor_own_emerging() -> None:
    assert list(backends._KERNELS) == ["gram_newton_schulz", "triton", "emerging"]
    assert set(BACKENDS) == {"auto", "torch", *backends._KERNELS}


def test_check_runs_once(install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    install("triton", Good)
    calls = []
    monkeypatch.setattr(backends, "examine", lambda *args: calls.append(args) or examine(*args))
    first = choose_products("triton", CPU, torch.bfloat16)
    assert choose_products("triton", CPU, torch.bfloat16)[0] is first[0]
    assert backends._first_that_passes(CPU, torch.bfloat16)[0] is first[0]
    assert len(calls) == 1
    choose_products("triton", CPU, torch.float16)
    assert len(calls) == 2


def test_exact_float32_on_gpus_is_torchs() -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    products, line = choose_products("auto", torch.device("cuda", 0), torch.float32)
    assert type(products) is TorchProducts and "TF32" in line


# --- the wiring of kernels that are not ours, with stand-ins that check what they are given --------------------------


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    return torch.device("cuda", 0)


def test_emerging_knows_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emerging, "_kernels", lambda: SimpleNamespace(HAS_TRITON_340=True))
    for capability in ((8, 0), (9, 0), (10, 0), (10, 3)):
        assert emerging.obstacle(gpu(monkeypatch, capability), torch.bfloat16) is None
    assert "8.9" in (emerging.obstacle(gpu(monkeypatch, (8, 9)), torch.bfloat16) or "")
    assert "bfloat16 only" in (emerging.obstacle(gpu(monkeypatch, (9, 0)), torch.float16) or "")
    monkeypatch.setattr(emerging, "_kernels", lambda: SimpleNamespace(HAS_TRITON_340=False))
    assert "Triton 3.4" in (emerging.obstacle(gpu(monkeypatch, (9, 0)), torch.bfloat16) or "")


def test_vendor_knows_its_gpus_and_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    interface: Any = ModuleType("quack.gemm_interface")
    interface.gemm_symmetric = None
    monkeypatch.setitem(sys.modules, "quack", ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", interface)
    for dtype in (torch.float16, torch.bfloat16):
        assert vendor.obstacle(gpu(monkeypatch, (9, 0)), dtype) is None
    assert "8.0" in (vendor.obstacle(gpu(monkeypatch, (8, 0)), torch.float16) or "")
    assert "only" in (vendor.obstacle(gpu(monkeypatch, (9, 0)), torch.float32) or "")
    monkeypatch.setitem(sys.modules, "quack", None)
    monkeypatch.delitem(sys.modules, "quack.gemm_interface")
    text = vendor.obstacle(gpu(monkeypatch, (9, 0)), torch.float16) or ""
    assert "is not there" in text and "pip install gram-newton-schulz" in text


def operands(dtype: torch.dtype, batch: int, p: int, q: int, tall: bool = False) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((batch, q, p) if tall else (batch, p, q), generator=generator).div_(q**0.5).to(dtype)
    x = x.mT if tall else x
    r = TorchProducts().gram(x.float())
    r = ((r + r.mT) / 2).to(dtype)
    return x, r, (2 * r.float() + r.float() @ r.float()).to(dtype)


def agree(products: TorchProducts, x: torch.Tensor, r: torch.Tensor, z: torch.Tensor) -> None:
    torchs = TorchProducts()
    rounding = 4 * torch.finfo(x.dtype).eps
    for own, reference in (
        (products.gram(x), torchs.gram(x)),
        (products.quadratic(r, -4.775, 2.0315), torchs.quadratic(r, -4.775, 2.0315)),
        (products.commuting(r, z, 3.4445), torchs.commuting(r, z, 3.4445)),
    ):
        assert own.shape == reference.shape and own.dtype == reference.dtype
        torch.testing.assert_close(own, reference, rtol=rounding, atol=rounding * float(reference.abs().max()))


class Syrk:
    """Stands in for ``emerging_optimizers.triton_kernels``: the same conditions, in torch."""

    def __init__(self) -> None:
        self.small = self.large = 0

    def tsyrk_ex_small_matrix(self, a: Any, c: Any, alpha: float, beta: float, *, out: torch.Tensor) -> torch.Tensor:
        self.small += 1
        assert out.is_contiguous()
        return out.copy_(self._product(a, c, alpha, beta))

    def tsyrk_ex(self, a: Any, c: Any, alpha: float, beta: float) -> torch.Tensor:
        self.large += 1
        return self._product(a, c, alpha, beta)

    def _product(self, a: torch.Tensor, c: torch.Tensor | None, alpha: float, beta: float) -> torch.Tensor:
        assert a.dtype == torch.bfloat16 and a.dim() == 2
        assert (c is None) == (beta == 0.0)
        for matrix in (a, *([] if c is None else [c])):
            dense = matrix if matrix.is_contiguous() else matrix.T
            assert dense.is_contiguous() and dense.size(1) % 8 == 0 and dense.data_ptr() % 16 == 0  # TMA
        assert a.size(0) % 8 == 0  # so does the result
        product = alpha * (a.float() @ a.float().T)
        return (product if c is None else product + beta * c.float()).to(a.dtype)


@pytest.mark.parametrize("tall", [False, True])
def test_emerging_is_given_what_it_takes(monkeypatch: pytest.MonkeyPatch, tall: bool) -> None:
    syrk = Syrk()
    monkeypatch.setattr(emerging, "_kernels", lambda: syrk)
    agree(emerging.EmergingProducts(), *operands(torch.bfloat16, 3, 256, 264, tall))
    assert (syrk.small, syrk.large) == (6, 0)
    monkeypatch.setattr(emerging, "_LARGE", 256)
    agree(emerging.EmergingProducts(), *operands(torch.bfloat16, 2, 256, 264, tall))
    assert (syrk.small, syrk.large) == (6, 4)
    for p, q in ((248, 256), (257, 256), (260, 256), (256, 260)):  # few rows; no multiples of 8
        before = syrk.large
        agree(emerging.EmergingProducts(), *operands(torch.bfloat16, 1, p, q, tall))
        taken = {(256, 260): 2 if tall else 1}.get((p, q), 0)  # columns of 256 can be copied, rows of 260 not
        assert syrk.large - before == taken, (p, q)


class Quack:
    """Stands in for ``quack.gemm_interface``: the conditions of its ``gemm_symmetric``, in torch."""

    def __init__(self) -> None:
        self.calls = 0

    def gemm_symmetric(
        self, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor | None = None, alpha: float = 1.0, beta: float = 1.0
    ) -> torch.Tensor:
        self.calls += 1
        assert isinstance(alpha, float) and isinstance(beta, float)
        out = A.new_empty((*A.shape[:2], B.size(-1)))
        for operand in (A, B, out, *([] if C is None else [C])):
            assert operand.dtype in (torch.float16, torch.bfloat16) and operand.data_ptr() % 16 == 0
            assert 1 in operand.stride()[1:]
            assert all(stride % 8 == 0 for stride in operand.stride() if stride != 1)
        product = alpha * (A.float() @ B.float())
        return out.copy_(product if C is None else product + beta * C.float())


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_vendor_is_given_what_it_takes(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tall: bool) -> None:
    quack = Quack()
    monkeypatch.setattr(vendor, "_gemm_symmetric", lambda: quack.gemm_symmetric)
    agree(vendor.VendorProducts(), *operands(dtype, 3, 256, 264, tall))
    assert quack.calls == 3
    for p, q in ((248, 256), (257, 264), (260, 264)):
        agree(vendor.VendorProducts(), *operands(dtype, 1, p, q, tall))
    assert quack.calls == 3
    vendor.VendorProducts().quadratic(operands(dtype, 1, 256, 264)[1], 2, 3)  # whole numbers, too, become floats
    assert quack.calls == 4


def test_flops_count_the_operations_that_are_needed() -> None:
    for products in (emerging.EmergingProducts(), vendor.VendorProducts()):
        assert products.symmetric_flops(512, 1024) == 512 * 513 * 1024
        assert products.symmetric_flops(128, 1024) == 2 * 128 * 128 * 1024
        assert products.symmetric_flops(500, 1024) == 2 * 500 * 500 * 1024


def test_bulk_copyable() -> None:
    x = torch.zeros(3, 32, 64, dtype=torch.bfloat16)
    assert bulk_copyable(x) and bulk_copyable(x.mT) and bulk_copyable(x[1:, :20, 8:])
    assert not bulk_copyable(x[..., 1:])  # begins between units of 16 bytes
    assert not bulk_copyable(x[..., ::2])  # no neighbours
    assert not bulk_copyable(torch.zeros(3, 32, 60, dtype=torch.bfloat16))
    assert bulk_copyable(torch.zeros(3, 32, 60))  # 4 bytes each


# --- without Triton --------------------------------------------------------------------------------------------------

WITHOUT_TRITON = """
import sys
sys.modules.update({"triton": None, "triton.language": None, "quack": None})
import torch
import megatron_muon
from megatron_muon.errors import ConfigError
from megatron_muon.orthogonalize import newton_schulz
from megatron_muon.orthogonalize.backends import choose_products

products, line = choose_products("auto", torch.device("cpu"), torch.float32)
print(line)
print(newton_schulz(torch.eye(2), ((1.5, -0.5, 0.0),)).tolist())
try:
    choose_products("triton", torch.device("cpu"), torch.float32)
except ConfigError as error:
    print(error)
"""


def test_cpu_needs_no_triton() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].startswith("torch, symmetric by blocks, float32 on cpu")
    assert "--muon-ns-backend triton" in lines[2] and "is not there" in lines[2]
