"""torch's process-wide switches that change what matrix products compute: set for a step, and put back after it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

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

    The switches are those of the process. Where several of its threads, or of the callers of one, are within, products
    are as exact as the strictest of them asks for, and the last one to leave puts them back.

    Args:
        precision: ``high`` for TF32. With ``medium`` matrices are converted to bfloat16 by the iteration, so that
            float32 products (there are none then) may stay exact.
    """
    wanted = "high" if precision == "high" else "highest"
    with _LOCK:
        if not _WITHIN:
            _FOUND.append(_Found([each.fp32_precision for each in _float32_switches()], _legacy(), _sum_switches()))
        _WITHIN.append(wanted)
    try:
        with _LOCK:
            _set(_FOUND[0].sums)
        with without_autocast():
            yield
    finally:
        with _LOCK:
            _WITHIN.remove(wanted)
            if _WITHIN:
                _set(_FOUND[0].sums)
            else:
                _put_back(_FOUND.pop())


class _Found(NamedTuple):
    """What the switches were: of float32 products, by torch's older function (None: it is not used), and of sums."""

    precisions: list[str]
    legacy: str | None
    sums: dict[str, Any]


_LOCK = threading.Lock()
_WITHIN: list[str] = []
"""The precisions that are asked for now."""
_FOUND: list[_Found] = []
"""What is to be put back: one, while somebody is within."""


def _set(sums: Mapping[str, Any]) -> None:
    is_exact, switches = "highest" in _WITHIN, _float32_switches()
    if not switches:
        torch.set_float32_matmul_precision("highest" if is_exact else "high")
    for each in switches:
        each.fp32_precision = "ieee" if is_exact else "tf32"
    for name, value in sums.items():
        setattr(torch.backends.cuda.matmul, name, (False, value[1]) if isinstance(value, tuple) else False)


def _put_back(found: _Found) -> None:
    for name, value in found.sums.items():
        setattr(torch.backends.cuda.matmul, name, value)
    for each, value in zip(_float32_switches(), found.precisions, strict=True):
        each.fp32_precision = "none"  # what it inherits, from ``torch.backends.fp32_precision``, it goes on to
        if each.fp32_precision != value:
            each.fp32_precision = value
    if found.legacy is not None:
        torch.set_float32_matmul_precision(found.legacy)


def _legacy() -> str | None:
    return None if _float32_switches() else torch.get_float32_matmul_precision()


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
