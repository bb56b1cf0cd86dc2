"""Kernels for products with a symmetric result on GPUs.

Each module has a class of products and a function ``obstacle(device, dtype)`` that tells why they cannot be used there.
What they are made of may not be installed: :mod:`megatron_muon.orthogonalize.backends` imports them when it must.
"""

from __future__ import annotations

import contextlib

import torch

__all__ = ["bulk_copyable", "current"]


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes a GPU the current one, where kernels that torch does not launch itself run."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


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
