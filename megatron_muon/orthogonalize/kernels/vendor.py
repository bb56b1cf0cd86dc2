"""Products on the kernels of the package gram-newton-schulz: CuTe kernels for Hopper and Blackwell, from ``quack``.

Source:
    Dao-AILab, https://github.com/Dao-AILab/gram-newton-schulz (0.1.6, which pins quack-kernels 0.5.0).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch

from megatron_muon.orthogonalize.kernels import bulk_copyable, current
from megatron_muon.orthogonalize.products import TorchProducts

__all__ = ["VendorProducts", "obstacle"]

_MAJORS = (9, 10, 11, 12)
"""Compute capabilities: 9.0 is the least that gram-newton-schulz asks for, 12 the last that quack has a kernel for."""

_SMALLEST = 256
"""The size of a tile. gram-newton-schulz, too, leaves matrices with a smaller side to torch."""


class VendorProducts(TorchProducts):
    """Symmetric products by ``quack.gemm_interface.gemm_symmetric``, the others by torch.

    It takes batches of float16 or bfloat16, of dimensions that are multiples of 8 (TMA). Products that are not so, or
    with a side below 256, are torch's. One kernel serves all shapes; it is compiled at the first product.
    """

    name = "gram-newton-schulz, symmetric"

    def gram(self, x: torch.Tensor) -> torch.Tensor:
        """See :class:`~megatron_muon.orthogonalize.products.TorchProducts`."""
        if not _takes(x):
            return super().gram(x)
        with current(x.device):
            return _gemm_symmetric()(x, x.mT)

    def quadratic(self, r: torch.Tensor, b: float, c: float) -> torch.Tensor:
        """See :class:`~megatron_muon.orthogonalize.products.TorchProducts`."""
        if not _takes(r):
            return super().quadratic(r, b, c)
        with current(r.device):  # factors must be floats: anything else is taken for a tensor
            return _gemm_symmetric()(r, r, C=r, alpha=float(c), beta=float(b))

    def commuting(self, r: torch.Tensor, z: torch.Tensor, a: float) -> torch.Tensor:
        """See :class:`~megatron_muon.orthogonalize.products.TorchProducts`."""
        if not (_takes(r) and _takes(z)):
            return super().commuting(r, z, a)
        with current(r.device):
            return _gemm_symmetric()(r, z, C=r, alpha=1.0, beta=float(a))

    def symmetric_flops(self, p: int, inner: int) -> int:
        """The operations that are really needed: those of the diagonal and below, without the rest of its tiles."""
        if min(p, inner) < _SMALLEST or p % 8 or inner % 8:
            return super().symmetric_flops(p, inner)
        return p * (p + 1) * inner


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why :class:`VendorProducts` cannot be used there, or None."""
    if dtype not in (torch.float16, torch.bfloat16):
        return "multiplies float16 and bfloat16 only"
    if device.type != "cuda" or torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in _MAJORS:
        return f"is made for compute capability 9 to 12, this GPU has {major}.{minor}"
    try:
        _gemm_symmetric()
    except ImportError as error:
        return f"is not there ({error}): pip install gram-newton-schulz --no-build-isolation"
    return None


def _gemm_symmetric() -> Callable[..., torch.Tensor]:
    return import_module("quack.gemm_interface").gemm_symmetric


def _takes(x: torch.Tensor) -> bool:
    return min(x.shape[-2:]) >= _SMALLEST and x.size(-2) % 8 == 0 and bulk_copyable(x)
