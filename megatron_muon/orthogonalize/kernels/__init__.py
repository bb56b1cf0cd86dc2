"""Kernels: products with a symmetric result (for GPUs, and float32 on CPUs), and elementwise passes.

Each module of products has a class, and a function ``obstacle(device, dtype)`` that tells why it cannot be used there.
The packages that they need may not be installed: :mod:`megatron_muon.orthogonalize.backends` imports them on demand.
None of them sorts, or adds up in an order that changes from run to run (no atomic operations): their results are
deterministic.
"""

from __future__ import annotations

import contextlib

import torch

from megatron_muon.orthogonalize.products import TorchProducts


class KernelProducts(TorchProducts):
    """Symmetric products by a kernel where it takes the operands, all other products by torch.

    Products with fewer than ``smallest`` rows are torch's: with so few tiles there is next to no half to save, and a
    launch costs more than the product.

    Attributes:
        multiple: what sizes must be multiples of.
        rest: which symmetric products are left to torch, for the report.
    """

    compiles = True
    multiple = 1
    rest = "fewer than 256 rows by torch"

    def __init__(self, smallest: int = 256) -> None:
        """
        Args:
            smallest: the fewest rows that the kernel is used for.
        """
        self.smallest = smallest

    def takes_sizes(self, p: int, inner: int) -> bool:
        """Whether the kernel multiplies matrices of p x ``inner`` and ``inner`` x p."""
        return p >= self.smallest and p % self.multiple == 0 and inner % self.multiple == 0

    def takes(self, x: torch.Tensor) -> bool:
        """Whether the kernel multiplies a batch (batch, p, inner) as it lies in memory."""
        return self.takes_sizes(x.size(-2), x.size(-1))

    def symmetric(
        self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None, *, alpha: float = 1.0, beta: float = 0.0
    ) -> torch.Tensor:
        """``alpha A B + beta C``, known to be symmetric, of operands that are taken; all (batch, ., .).

        ``b`` lies in memory as the transpose of ``a`` does: that is what tensor cores take in every dtype.
        """
        raise NotImplementedError

    def gram(self, x: torch.Tensor) -> torch.Tensor:
        """See :class:`~megatron_muon.orthogonalize.products.TorchProducts`."""
        return self.symmetric(x, x.mT) if self.takes(x) else super().gram(x)

    def quadratic(self, r: torch.Tensor, b: float, c: float) -> torch.Tensor:
        """See :class:`~megatron_muon.orthogonalize.products.TorchProducts`."""
        return self.symmetric(r, r.mT, r, alpha=c, beta=b) if self.takes(r) else super().quadratic(r, b, c)

    def commuting(self, r: torch.Tensor, z: torch.Tensor, a: float, b: float = 1.0) -> torch.Tensor:
        """See :class:`~megatron_muon.orthogonalize.products.TorchProducts`."""
        if not (self.takes(r) and self.takes(z)):
            return super().commuting(r, z, a, b)
        return self.symmetric(r, z.mT, r, alpha=b, beta=a)  # Z is symmetric

    def symmetric_flops(self, p: int, inner: int) -> int:
        """The operations that are really needed: those of the diagonal and below, without the rest of its tiles."""
        return p * (p + 1) * inner if self.takes_sizes(p, inner) else super().symmetric_flops(p, inner)


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes a GPU the current one, where kernels that torch does not launch itself run."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on a device now becomes part of a CUDA graph, and does not run."""
    return device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def bulk_copyable(x: torch.Tensor) -> bool:
    """Whether the copy engine of a GPU (TMA) can read the matrices of a batch.

    Args:
        x: (batch, rows, columns).

    Returns:
        True if elements of a row or of a column are neighbours in memory, and everything else is in units of 16 bytes.
    """
    unit = 16 // x.element_size()
    far = [stride for stride in x.stride() if stride != 1]
    neighbours = 1 in x.stride()[1:]
    return neighbours and x.data_ptr() % 16 == 0 and all(stride % unit == 0 for stride in far)
