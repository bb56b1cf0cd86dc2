"""Products on emerging-optimizers' Triton kernel for ``X X^T`` (``emerging_optimizers.triton_kernels.syrk``)."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import torch

from megatron_muon.orthogonalize.kernels import bulk_copyable, current
from megatron_muon.orthogonalize.products import TorchProducts

__all__ = ["EmergingProducts", "obstacle"]

_CAPABILITIES = ((8, 0), (9, 0), (10, 0), (10, 3))
"""GPUs that emerging-optimizers uses its kernel on; on others it does not vouch for the results."""

_SMALLEST = 256
"""Fewer rows are torch's: a handful of tiles is no work to save."""

_LARGE = 5000
"""From this size on the kernel with rectangular tiles is used. Below, it would compile and time 180 ways to cut each
new shape, where the one with square tiles has 24."""


class EmergingProducts(TorchProducts):
    """Gram matrices and quadratics by emerging-optimizers, the rest by torch: its kernel multiplies by a transpose.

    It takes one matrix at a time, bfloat16, of dimensions that are multiples of 8 (TMA). Products that are not so, or
    with fewer than 256 rows, are torch's. It is compiled and tuned for each new shape, at the first product.
    """

    name = "emerging-optimizers, symmetric"

    def gram(self, x: torch.Tensor) -> torch.Tensor:
        """See :class:`~megatron_muon.orthogonalize.products.TorchProducts`."""
        if not _takes(x):
            return super().gram(x)
        return _syrk(x, None, 1.0, 0.0)

    def quadratic(self, r: torch.Tensor, b: float, c: float) -> torch.Tensor:
        """See :class:`~megatron_muon.orthogonalize.products.TorchProducts`."""
        if not _takes(r):
            return super().quadratic(r, b, c)
        return _syrk(r, r, float(c), float(b))

    def symmetric_flops(self, p: int, inner: int) -> int:
        """The operations that are really needed: those of the diagonal and below, without the rest of its tiles."""
        if p < _SMALLEST or p % 8 or inner % 8:
            return super().symmetric_flops(p, inner)
        return p * (p + 1) * inner


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why :class:`EmergingProducts` cannot be used there, or None."""
    if dtype != torch.bfloat16:
        return "multiplies bfloat16 only"
    if device.type != "cuda" or torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability not in _CAPABILITIES:
        known = ", ".join(f"{major}.{minor}" for major, minor in _CAPABILITIES)
        return f"is made for compute capability {known}, this GPU has {capability[0]}.{capability[1]}"
    if not _kernels().HAS_TRITON_340:
        return "needs Triton 3.4"
    return None


def _kernels() -> ModuleType:
    return import_module("emerging_optimizers.triton_kernels")


def _takes(x: torch.Tensor) -> bool:
    p = x.size(-2)
    dense = x[0].is_contiguous() or x[0].mT.is_contiguous()
    return p >= _SMALLEST and p % 8 == 0 and dense and bulk_copyable(x)


def _syrk(x: torch.Tensor, add: torch.Tensor | None, alpha: float, beta: float) -> torch.Tensor:
    """``alpha X X^T + beta C`` for each matrix of a batch."""
    kernels = _kernels()
    batch, p = x.shape[:2]
    out = x.new_empty((batch, p, p))
    small: Callable[..., torch.Tensor] = kernels.tsyrk_ex_small_matrix
    with current(x.device):
        for index in range(batch):
            c = None if add is None else add[index]
            if p < _LARGE:
                small(x[index], c, alpha, beta, out=out[index])
            else:
                out[index] = kernels.tsyrk_ex(x[index], c, alpha, beta)
    return out
