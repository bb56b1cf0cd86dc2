"""Which implementation of the matrix products is used on a device, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch

from megatron_muon.choices import NS_BACKENDS
from megatron_muon.errors import ConfigError
from megatron_muon.orthogonalize.kernels.gate import examine
from megatron_muon.orthogonalize.products import BlockProducts, TorchProducts
from megatron_muon.orthogonalize.switches import float32_is_exact

__all__ = ["choose_products"]

_FLAG = "--muon-ns-backend"

_CPU_BLOCK_ROWS = {torch.float32: 64, torch.float64: 64, torch.bfloat16: 256, torch.float16: 256}
"""From as many rows on, blocks run at the full rate of a CPU's matrix products (measured)."""


@dataclass(frozen=True)
class _Kernel:
    """An implementation.

    Attributes:
        module: its module in :mod:`megatron_muon.orthogonalize.kernels`.
        products: its class there.
        rest: which symmetric products it leaves to torch, for the report.
    """

    module: str
    products: str
    rest: str


_KERNELS = {
    "gram_newton_schulz": _Kernel("vendor", "VendorProducts", "sides below 256 or no multiples of 8 by torch"),
    "triton": _Kernel("triton_symmetric", "TritonProducts", "fewer than 256 rows by torch"),
    "emerging": _Kernel("emerging", "EmergingProducts", "fewer than 256 rows or no multiples of 8 by torch"),
}
"""By the name of the backend, the preferred first: made for the device; for any device; and last emerging-optimizers',
which tries up to 180 configurations for each new shape."""


@dataclass(frozen=True)
class _Candidate:
    """A backend on a device: its products, or None, and what there is to say of it."""

    products: TorchProducts | None
    text: str


def choose_products(backend: str, device: torch.device, dtype: torch.dtype) -> tuple[TorchProducts, str]:
    """The implementation to use, checked on the device.

    Kernels other than torch's must first pass :func:`megatron_muon.orthogonalize.kernels.gate.examine` there. That
    takes seconds (kernels are compiled) and waits for the device, so call this at set-up; it is done once for each
    backend, device and dtype. The choice depends on the machine: ranks that hold the same weight must agree on the
    name of the products (``TorchProducts.name``), or their copies drift apart.

    Args:
        backend: one of :data:`megatron_muon.choices.NS_BACKENDS`. ``auto`` takes the first of gram_newton_schulz,
            triton, emerging and torch that can be used, on CPUs torch by blocks.
        device: where it will multiply.
        dtype: in which. For float32, call this under the :func:`matmul_precision` of the step: what is best
            depends on whether products may be TF32.

    Returns:
        The products, and one line for the report: what was chosen, with the numbers of the check, and why those that
        would come first were not.

    Raises:
        ConfigError: for an unknown backend, and for one that is asked for by name and is not there, does not support
            the device or dtype, or fails the check.
    """
    if backend not in NS_BACKENDS:
        raise ConfigError(f"{_FLAG} {backend}: choose one of {', '.join(NS_BACKENDS)}.")
    device = _numbered(device)
    where = f"{_name(dtype)} on {device}"
    if backend == "torch":
        return TorchProducts(), f"torch, {where}, as {_FLAG} says"
    if backend == "auto":
        products, text = _preferred(device, dtype)
        return products, f"{products.name}, {where}{text}"
    found = _candidate(backend, device, dtype, float32_is_exact())
    if found.products is None:
        raise ConfigError(f"{_FLAG} {backend}, {where}: it {found.text}. Use auto or torch.")
    return found.products, f"{found.products.name}, {where}, as {_FLAG} says ({found.text})"


def _preferred(device: torch.device, dtype: torch.dtype) -> tuple[TorchProducts, str]:
    """What ``auto`` stands for, and why."""
    if device.type == "cpu":
        return BlockProducts(_CPU_BLOCK_ROWS[dtype]), f" (blocks of {_CPU_BLOCK_ROWS[dtype]} rows or more)"
    if dtype == torch.float32 and float32_is_exact():
        # Exact float32 has no tensor cores; without them, Triton's products are no match for torch's.
        return TorchProducts(), " (symmetric kernels are for 16 bits and TF32)"
    return _first_that_passes(device, dtype)


def _first_that_passes(device: torch.device, dtype: torch.dtype) -> tuple[TorchProducts, str]:
    reasons: list[str] = []
    for backend in _KERNELS:
        found = _candidate(backend, device, dtype, float32_is_exact())
        if found.products is not None:
            return found.products, "".join([f" ({found.text})", *reasons])
        reasons.append(f"; {backend} {found.text}")
    return TorchProducts(), "".join(reasons)


@cache
def _candidate(backend: str, device: torch.device, dtype: torch.dtype, is_exact: bool) -> _Candidate:
    """Load a backend and check it. ``is_exact``, of float32 products, is here a part of the key."""
    del is_exact
    kernel = _KERNELS[backend]
    try:
        module = import_module(f"megatron_muon.orthogonalize.kernels.{kernel.module}")
        obstacle: Callable[[torch.device, torch.dtype], str | None] = module.obstacle
        reason = obstacle(device, dtype)
    except ImportError as error:
        reason = f"is not there ({error})"
    except Exception as error:  # packages that meet a wrong version or driver fail in ways of their own
        reason = f"cannot be loaded ({type(error).__name__}: {error})"
    if reason is not None:
        return _Candidate(None, reason)
    products: TorchProducts = getattr(module, kernel.products)()
    verdict = examine(products, device, dtype)
    if verdict.failure is not None:
        return _Candidate(None, str(verdict))
    return _Candidate(products, f"{verdict}; {kernel.rest}")


def _numbered(device: torch.device) -> torch.device:
    """``cuda`` as the device that it means now: the check is remembered for one device."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
