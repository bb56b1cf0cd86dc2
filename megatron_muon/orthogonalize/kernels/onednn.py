"""Float32 products by oneDNN on CPUs.

torch multiplies float32 matrices on x86 by MKL, which on AMD's processors reaches half of what their units can do.
Only where products may be rounded to bfloat16 does torch ask oneDNN; and oneDNN rounds only where the processor has
matrix units for that (AMX), and multiplies in float32 elsewhere. So the permission is given here, for these products
alone, on processors where it changes nothing but the order of sums; and results are held against torch's before they
are used (:mod:`megatron_muon.orthogonalize.kernels.gate`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_muon.orthogonalize.products import BlockProducts

_BLOCK_ROWS = 128
"""As for torch's products (:mod:`megatron_muon.orthogonalize.backends`), measured."""

_SMALLEST = 64
"""Products of fewer rows are torch's, which asks oneDNN for small ones in large batches, and MKL in small batches."""


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why it cannot be used there; None if nothing is known."""
    if device.type != "cpu" or dtype != torch.float32:
        return "multiplies float32 on CPUs only"
    if not hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"):
        return "needs torch 2.9 or later"
    if not hasattr(torch.cpu, "get_capabilities"):
        return "needs a torch that tells what the processor has (torch.cpu.get_capabilities)"
    has: Callable[[str], Any] = torch.cpu.get_capabilities().get
    if not all(map(has, ("avx512_bw", "avx512_vl", "avx512_dq"))):  # torch asks oneDNN only where it has these
        return "is not asked by torch on this processor"
    if has("amx_tile"):
        return "would round to bfloat16 on this processor"
    return None


class OneDnnProducts(BlockProducts):
    """Products of float32 matrices, symmetric results by blocks where these are large enough."""

    name = "oneDNN, symmetric by blocks"
    rest = f"blocks of {_BLOCK_ROWS} rows or more, fewer than {_SMALLEST} rows by torch"

    def __init__(self) -> None:
        super().__init__(_BLOCK_ROWS)

    def gram(self, x: torch.Tensor) -> torch.Tensor:
        """See :class:`~megatron_muon.orthogonalize.products.TorchProducts`."""
        return _asked(super().gram, x)

    def quadratic(self, r: torch.Tensor, b: float, c: float) -> torch.Tensor:
        """See :class:`~megatron_muon.orthogonalize.products.TorchProducts`."""
        return _asked(super().quadratic, r, b, c)

    def commuting(self, r: torch.Tensor, z: torch.Tensor, a: float, b: float = 1.0) -> torch.Tensor:
        """See :class:`~megatron_muon.orthogonalize.products.TorchProducts`."""
        return _asked(super().commuting, r, z, a, b)

    def apply(self, q: torch.Tensor, x: torch.Tensor, alpha: float) -> torch.Tensor:
        """See :class:`~megatron_muon.orthogonalize.products.TorchProducts`."""
        return _asked(super().apply, q, x, alpha)

    def multiply_add(self, x: torch.Tensor, z: torch.Tensor, a: float, b: float = 1.0) -> torch.Tensor:
        """See :class:`~megatron_muon.orthogonalize.products.TorchProducts`."""
        return _asked(super().multiply_add, x, z, a, b)


def _asked(product: Callable[..., torch.Tensor], first: torch.Tensor, *others: Any) -> torch.Tensor:
    """A product of (batch, p, .) and others, by oneDNN if p is large enough and there is something to multiply."""
    if first.size(-2) < _SMALLEST or first.device.type != "cpu":  # steps are rehearsed on ``meta``
        return product(first, *others)
    switch: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        return product(first, *others)
    finally:
        switch.fp32_precision = before
