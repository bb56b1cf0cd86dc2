"""Float32 products by oneDNN on CPUs: exact, and nothing but their own switch is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_muon import ConfigError
from megatron_muon.orthogonalize.backends import choose_products
from megatron_muon.orthogonalize.kernels.gate import examine
from megatron_muon.orthogonalize.kernels.onednn import OneDnnProducts, obstacle
from megatron_muon.orthogonalize.products import BlockProducts, TorchProducts
from megatron_muon.orthogonalize.switches import matmul_precision

CPU = torch.device("cpu")

there = pytest.mark.skipif(obstacle(CPU, torch.float32) is not None, reason="oneDNN is not asked on this processor")


def _symmetric(batch: int, p: int, seed: int) -> torch.Tensor:
    x = torch.randn(batch, p, 2 * p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x @ x.mT / (2 * p)).float()


@there
@pytest.mark.parametrize(("batch", "p", "q"), [(9, 64, 72), (1, 96, 160), (3, 65, 67), (1, 520, 600), (2, 1, 7)])
@pytest.mark.parametrize("tall", [False, True])
def test_products_have_all_bits_of_float32(batch: int, p: int, q: int, tall: bool) -> None:
    """Against float64, in both orders in memory: bfloat16 would err by 1e-3."""
    products, a, b, c = OneDnnProducts(), 3.4445, -4.775, 2.0315
    x = torch.randn(batch, q, p, generator=torch.Generator().manual_seed(1)).mT / q**0.5
    x = x if tall else x.contiguous()
    r = _symmetric(batch, p, 2)
    z = 0.3 * r + 0.1 * r @ r
    (xx, rr, zz), results = (each.double() for each in (x, r, z)), []
    results.append((products.gram(x), xx @ xx.mT))
    results.append((products.quadratic(r, b, c), b * rr + c * rr @ rr))
    results.append((products.commuting(r, z, a), a * rr + rr @ zz))
    results.append((products.commuting(r, z, 0.0, c), c * rr @ zz))
    results.append((products.apply(r, x, 0.5), 0.5 * rr @ xx))
    results.append((products.multiply_add(x, z, a, c), a * xx + c * zz @ xx))
    for number, (result, exact) in enumerate(results):
        # As torch's own tests of float32 products: sums of some hundred terms, each rounded once.
        assert (result.double() - exact).norm() <= 1e-6 * exact.norm(), number
    for result in (results[4][0], results[5][0]):
        assert (result.stride(-1) == 1) is (x.stride(-1) == 1), "in the memory order of X"


@there
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_switch_is_put_back(precision: str) -> None:
    switch: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with matmul_precision(precision):
        before = switch.fp32_precision
        OneDnnProducts().gram(torch.ones(2, 64, 4))
        assert switch.fp32_precision == before
        with pytest.raises(RuntimeError):
            OneDnnProducts().commuting(torch.ones(2, 64, 64), torch.ones(2, 4, 4), 0.0)
        assert switch.fp32_precision == before


@there
def test_auto_takes_it_for_float32_alone() -> None:
    products, line = choose_products("auto", CPU, torch.float32)
    assert isinstance(products, OneDnnProducts) and line.startswith(
        "oneDNN, symmetric by blocks, float32 on cpu (6 pro"
    )
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert type(choose_products("auto", CPU, dtype)[0]) is BlockProducts
    with pytest.raises(ConfigError, match=r"--muon-ns-backend onednn, bfloat16 on cpu: it multiplies float32 on CPUs"):
        choose_products("onednn", CPU, torch.bfloat16)


@there
@pytest.mark.parametrize(("p", "q"), [(8, 12), (64, 64), (64, 4), (65, 67), (128, 256)])
def test_bits_do_not_depend_on_the_batch(p: int, q: int) -> None:
    """An owner has fewer matrices in a batch than a rank that has all: copies of weights would drift apart."""
    x, z = torch.randn(6, p, q, generator=torch.Generator().manual_seed(3)), _symmetric(6, p, 4)
    products = OneDnnProducts()
    for some in (x[:1].clone(), x[:4].clone()):
        assert torch.equal(products.gram(some), products.gram(x)[: len(some)])
        part = products.multiply_add(some, z[: len(some)].clone(), 3.4445)
        assert torch.equal(part, products.multiply_add(x, z, 3.4445)[: len(some)])


def test_other_devices_are_refused() -> None:
    assert obstacle(torch.device("cuda", 0), torch.float32) == "multiplies float32 on CPUs only"


class Rounding(TorchProducts):
    """What oneDNN would do on a processor whose matrix units take bfloat16."""

    name = "rounding"

    def gram(self, x: torch.Tensor) -> torch.Tensor:
        return super().gram(x.bfloat16().float())


def test_a_processor_that_rounds_fails_the_check() -> None:
    verdict = examine(Rounding(), CPU, torch.float32)
    assert verdict.failure is not None and "x torch's, at most 4 x is rounding" in verdict.failure
