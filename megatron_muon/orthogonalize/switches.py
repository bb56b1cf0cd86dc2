"""torch's process-wide switches that change what matrix products compute: set for a step, and put back after it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def float32_is_exact() -> bool:
    """Whether products of float32 matrices take all their bits, on all devices."""
    if switches := _float32_switches():
        return all(each.fp32_precision in ("none", "ieee") for each in switches)
    return torch.get_float32_matmul_precision() == "highest"


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Products are in the numbers that they are given, also within ``torch.autocast``.

    As a decorator it keeps a function's arguments alive to its end.
    """
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """No autocast, float32 products in TF32 where asked for, and sums of all in float32; all switches are put back.

    Where Gram Newton-Schulz restarts (:mod:`megatron_muon.orthogonalize.restarts`) is chosen for products that are
    rounded once.

    Args:
        precision: ``high`` for TF32. With ``medium`` matrices are converted to bfloat16 by the iteration, so that
            float32 products (there are none then) may stay exact.
    """
    wanted = "high" if precision == "high" else "highest"
    switches = _float32_switches()
    if not switches:
        legacy = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(wanted)
    before = [each.fp32_precision for each in switches]
    sums = _sum_switches()
    for each in switches:
        each.fp32_precision = "tf32" if wanted == "high" else "ieee"
    try:
        for name, value in sums.items():
            setattr(torch.backends.cuda.matmul, name, (False, value[1]) if isinstance(value, tuple) else False)
        with without_autocast():
            yield
    finally:
        for name, value in sums.items():
            setattr(torch.backends.cuda.matmul, name, value)
        for each, value in zip(switches, before, strict=True):
            each.fp32_precision = "none"  # what it inherits, from ``torch.backends.fp32_precision``, it goes on to
            if each.fp32_precision != value:
                each.fp32_precision = value
        if not switches:
            torch.set_float32_matmul_precision(legacy)


def _sum_switches() -> dict[str, Any]:
    """torch's switches for 16-bit sums within products of 16 bits, with their values.

    A value is a pair where a switch also tells whether a product may be cut into partial sums (split-k).
    """
    matmul, found = torch.backends.cuda.matmul, {}
    reductions = [f"allow_{numbers}_reduced_precision_reduction" for numbers in ("fp16", "bf16")]
    for name in (*reductions, "allow_fp16_accumulation"):
        value = [getattr(matmul, each) for each in (name, f"{name}_split_k") if hasattr(matmul, each)]
        if value:
            found[name] = tuple(value) if len(value) > 1 else value[0]
    return found


def _float32_switches() -> list[Any]:
    """The objects whose ``fp32_precision`` governs matrix products; none before torch 2.9.

    Where these have been set, torch's older functions raise; where the older ones have been, these can be read.
    """
    found = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    return [each for each in found if hasattr(each, "fp32_precision")]
