"""Whether a device multiplies bfloat16 matrices as fast as float32 ones: processors without 16-bit units do not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from megatron_muon.orthogonalize.kernels.gate import times

_SLOWER = 2.0
"""How many times the time in float32 is slow in bfloat16. With AVX2 alone it is 5 to 90 times."""

_LEAST, _MOST = 128, (256, 512)
"""Bounds of the rows and columns that are timed: smaller products measure calls, larger ones take seconds without
16-bit units."""


def slow_bfloat16(device: torch.device, p: int, q: int) -> str:
    """Why bfloat16 products are slow on a device, in words for a report; empty where they are not.

    What the device says of itself decides, so that a run that starts again on it finds the same: CUDA's from compute
    capability 8.0 on, and processors with AVX512-BF16 or AMX, have 16-bit units; with AVX2 alone torch multiplies
    bfloat16 one by one. Others are timed, once in a process for a shape, which waits for the device.

    Args:
        device: where matrices are orthogonalized.
        p: rows of those that most of the time goes to; p x p matrices are iterated.
        q: their columns, at least p.
    """
    if device.type == "cuda":
        if torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0):
            return ""
    elif device.type != "cpu":
        return ""
    elif (known := _of_processor()) is not None:
        return known
    rows, columns = (min(max(size, _LEAST), most) for size, most in zip((p, q), _MOST, strict=True))
    return _timed(device, rows, columns)


@cache
def _of_processor() -> str | None:
    """What is known of this one; None if torch does not say enough."""
    capabilities: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    its = capabilities()
    if its.get("architecture") != "x86_64" or its.get("avx_ne_convert"):
        return None
    if its.get("avx512_bf16") or its.get("amx_bf16"):
        return ""
    if its.get("avx512_bw") and its.get("avx512_vl") and its.get("avx512_dq"):
        return None  # oneDNN multiplies bfloat16 as float32
    return _told("torch multiplies bfloat16 one by one on a processor without AVX-512")


@cache
def _timed(device: torch.device, rows: int, columns: int) -> str:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(device)  # not the models' generator
    narrow = x.bfloat16()
    # The least of all: other processes on the same cores delay products of several threads most, which float32's are.
    wide_time, narrow_time = min(times(lambda: x @ x.mT, device)), min(times(lambda: narrow @ narrow.mT, device))
    if narrow_time <= _SLOWER * wide_time:
        return ""
    return _told(
        f"a product of {rows} x {columns} takes {1e3 * narrow_time:.3g} ms in bfloat16 on {device}, "
        f"{1e3 * wide_time:.3g} ms in float32"
    )


def _told(why: str) -> str:
    logging.getLogger(__name__).info("Newton-Schulz is in float32: %s", why)
    return why
