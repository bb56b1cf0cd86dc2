"""The wiring of kernels that are not ours, with stand-ins that check what they are given."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_muon.orthogonalize.kernels import bulk_copyable, emerging, vendor
from megatron_muon.orthogonalize.products import TorchProducts


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
        taken = {(256, 260): 1}.get((p, q), 0)  # the quadratic, of 256 x 256
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
