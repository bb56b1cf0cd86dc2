"""Products on the kernels of the package gram-newton-schulz: CuTe kernels for Hopper and Blackwell, from ``quack``.

Source:
    Dao-AILab, https://github.com/Dao-AILab/gram-newton-schulz (0.1.6, which pins quack-kernels 0.5.0).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch

from megatron_muon.orthogonalize.kernels import KernelProducts, bulk_copyable, current

_MAJORS = (9, 10, 11, 12)
"""Compute capabilities: 9.0 is the least that gram-newton-schulz asks for, 12 the last that quack has a kernel for."""


class VendorProducts(KernelProducts):
    """Symmetric products by ``quack.gemm_interface.gemm_symmetric``, the others by torch.

    It takes batches of float16 or bfloat16, of dimensions that are multiples of 8 (TMA). Products that are not so, or
    with a side below 256 (a tile; gram-newton-schulz leaves them to torch, too), are torch's. One kernel serves all
    shapes; it is compiled at the first product.
    """

    name = "gram-newton-schulz, symmetric"
    multiple = 8
    rest = "sides below 256 or no multiples of 8 by torch"

    def takes_sizes(self, p: int, inner: int) -> bool:
        """See :class:`~megatron_muon.orthogonalize.kernels.KernelProducts`."""
        return inner >= self.smallest and super().takes_sizes(p, inner)

    def takes(self, x: torch.Tensor) -> bool:
        """See :class:`~megatron_muon.orthogonalize.kernels.KernelProducts`."""
        return super().takes(x) and bulk_copyable(x)

    def symmetric(
        self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None, *, alpha: float = 1.0, beta: float = 0.0
    ) -> torch.Tensor:
        """See :class:`~megatron_muon.orthogonalize.kernels.KernelProducts`."""
        with current(a.device):  # factors must be floats: anything else is taken for a tensor
            return _gemm_symmetric()(a, b, C=c, alpha=float(alpha), beta=float(beta))


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
