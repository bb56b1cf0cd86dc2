"""Products on emerging-optimizers' Triton kernel for ``X X^T`` (``emerging_optimizers.triton_kernels.syrk``)."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import torch

from megatron_muon.orthogonalize.kernels import KernelProducts, bulk_copyable, current
from megatron_muon.orthogonalize.products import TorchProducts

_CAPABILITIES = ((8, 0), (9, 0), (10, 0), (10, 3))
"""GPUs that emerging-optimizers uses its kernel on; on others it does not vouch for the results."""

_LARGE = 5000
"""From this size on the kernel with rectangular tiles is used. Below, it would compile and time 180 ways to cut each
new shape, where the one with square tiles has 24."""


class EmergingProducts(KernelProducts):
    """Gram matrices and quadratics by emerging-optimizers, the rest by torch: its kernel multiplies by a transpose.

    It takes one matrix at a time, bfloat16, of dimensions that are multiples of 8 (TMA). Products that are not so, or
    with fewer than 256 rows, are torch's. It is compiled and tuned for each new shape.
    """

    name = "emerging-optimizers, symmetric"
    multiple = 8
    rest = "fewer than 256 rows or no multiples of 8 by torch"

    def takes(self, x: torch.Tensor) -> bool:
        """See :class:`~megatron_muon.orthogonalize.kernels.KernelProducts`."""
        dense = x[0].is_contiguous() or x[0].mT.is_contiguous()
        return super().takes(x) and dense and bulk_copyable(x)

    def symmetric(
        self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None, *, alpha: float = 1.0, beta: float = 0.0
    ) -> torch.Tensor:
        """See :class:`~megatron_muon.orthogonalize.kernels.KernelProducts`; ``b`` is the transpose of ``a``."""
        kernels, (batch, p, _) = _kernels(), a.shape
        out = a.new_empty((batch, p, p))
        small: Callable[..., torch.Tensor] = kernels.tsyrk_ex_small_matrix
        with current(a.device):
            for index in range(batch):
                addend = None if c is None else c[index]
                if p < _LARGE:
                    small(a[index], addend, float(alpha), float(beta), out=out[index])
                else:
                    out[index] = kernels.tsyrk_ex(a[index], addend, float(alpha), float(beta))
        return out

    def commuting(self, r: torch.Tensor, z: torch.Tensor, a: float, b: float = 1.0) -> torch.Tensor:
        """Multiply by torch, because Z is not the transpose of R."""
        return TorchProducts.commuting(self, r, z, a, b)


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
