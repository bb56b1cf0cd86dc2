"""Numbers that are kept in fewer bits, read and kept again for many tensors in one launch each, as Triton kernels.

What they stand for is said by :mod:`megatron_muon.optimizers.forms`, whose own passes give the same bits: they round
and shift integers, as the interpreter of Triton does not round to bfloat16 as GPUs do.
"""

# Triton has no type stubs, is not installed everywhere, and reads annotations of its functions as its own.
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from megatron_muon.orthogonalize.kernels import current, triton_elementwise
from megatron_muon.orthogonalize.kernels.triton_elementwise import _BLOCK, _parts, _place, _start, _table

_COLUMNS = tl.constexpr(256)
"""Of a block with one scale in int8."""

_LISTS = {"remainder": (tl.int16, tl.int16, tl.int32), "int8": (tl.int8, tl.int8, tl.float32)}
"""Types by which elements are read: of the first two planes (the first, twice, of a form with two), and of numbers."""

_EACH = {"remainder": 8, "int8": 256}
"""Elements that share one of the last plane."""


@triton.jit
def _last(entry, TYPE: tl.constexpr):
    return tl.load(entry + 4).to(tl.pointer_type(TYPE))


@triton.jit
def _read_remainder(table, programs, TYPES: tl.constexpr, ALIGNED: tl.constexpr):
    entry, index, inside = _place(table, programs, ALIGNED)
    weight = tl.load(_start(entry, 0, TYPES, ALIGNED) + index, mask=inside).to(tl.int32) << 16
    remainder = tl.load(_start(entry, 1, TYPES, ALIGNED) + index, mask=inside).to(tl.int32)
    ties = tl.load(_last(entry, tl.uint8) + index // 8, mask=inside).to(tl.int32)
    bits = weight + remainder + (((ties >> (index % 8).to(tl.int32)) & 1) << 16)
    bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, weight, bits)  # of a weight that somebody has set to zero
    tl.store(_start(entry, 2, TYPES, ALIGNED) + index, bits, mask=inside)


@triton.jit
def _keep_remainder(table, programs, TYPES: tl.constexpr, ALIGNED: tl.constexpr):
    entry, index, inside = _place(table, programs, ALIGNED)
    bits = tl.load(_start(entry, 2, TYPES, ALIGNED) + index, mask=inside, other=0)
    weight = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    weight = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FFF, weight)
    tl.store(_start(entry, 0, TYPES, ALIGNED) + index, weight.to(tl.int16), mask=inside)
    tl.store(_start(entry, 1, TYPES, ALIGNED) + index, bits.to(tl.int16), mask=inside)
    is_tie = ((bits & 0x1FFFF) == 0x8000).to(tl.int32) << (index % 8).to(tl.int32)
    ties = tl.sum(tl.reshape(is_tie, (_BLOCK // 8, 8)), axis=1)
    first = tl.load(programs + 2 * tl.program_id(0) + 1) * (_BLOCK // 8)
    byte = first + tl.arange(0, _BLOCK // 8)
    tl.store(_last(entry, tl.uint8) + byte, ties.to(tl.uint8), mask=byte * 8 < tl.load(entry + 3))


@triton.jit
def _read_int8(table, programs, TYPES: tl.constexpr, ALIGNED: tl.constexpr):
    entry, index, inside = _place(table, programs, ALIGNED)
    units = tl.load(_start(entry, 0, TYPES, ALIGNED) + index, mask=inside).to(tl.float32)
    unit = tl.load(_last(entry, tl.float32) + index // _COLUMNS, mask=inside)
    tl.store(_start(entry, 2, TYPES, ALIGNED) + index, units * unit, mask=inside)


@triton.jit
def _keep_int8(table, programs, TYPES: tl.constexpr, ALIGNED: tl.constexpr):
    entry, index, inside = _place(table, programs, ALIGNED)
    value = tl.load(_start(entry, 2, TYPES, ALIGNED) + index, mask=inside, other=0.0)
    rows = tl.reshape(value, (_BLOCK // _COLUMNS, _COLUMNS))
    unit = tl.math.div_rn(tl.max(tl.abs(rows), axis=1), 127.0)
    bits = (unit.to(tl.int32, bitcast=True) + 0xFF) & -256
    is_none = tl.max((rows != rows).to(tl.int32), axis=1) != 0
    unit = tl.where(is_none, float("nan"), bits.to(tl.float32, bitcast=True))
    divisor = tl.where(unit > 0, unit, 1.0)
    units = tl.math.div_rn(rows, tl.broadcast_to(divisor[:, None], (_BLOCK // _COLUMNS, _COLUMNS)))
    units = (units + 12582912.0) - 12582912.0  # to the nearest whole number, and of two to the even one
    units = tl.reshape(units, (_BLOCK,)).to(tl.int8)
    tl.store(_start(entry, 0, TYPES, ALIGNED) + index, units, mask=inside)
    first = tl.load(programs + 2 * tl.program_id(0) + 1) * (_BLOCK // _COLUMNS)
    block = first + tl.arange(0, _BLOCK // _COLUMNS)
    tl.store(_last(entry, tl.float32) + block, unit, mask=block * _COLUMNS < tl.load(entry + 3))


_KERNELS = {"remainder": (_read_remainder, _keep_remainder), "int8": (_read_int8, _keep_int8)}


def obstacle(device: torch.device) -> str | None:
    """Why these kernels cannot be used there, or None."""
    return triton_elementwise.obstacle(device, torch.float32)


def read(form: str, parts: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor] | None:
    """The numbers of parts of weights, float32.

    Args:
        form: ``remainder`` or ``int8``.
        parts: the planes of each, see :class:`megatron_muon.optimizers.forms.Form`.

    Returns:
        None if nothing was done, for their layout.
    """
    made = [torch.empty(planes[0].shape, dtype=torch.float32, device=planes[0].device) for planes in parts]
    return made if _launch(form, 0, parts, made) else None


def keep(form: str, parts: Sequence[Sequence[torch.Tensor]], numbers: Sequence[torch.Tensor]) -> bool:
    """Keep numbers in the planes of parts of weights; False if nothing was done, for their layout."""
    if not _launch(form, 1, parts, numbers):
        return False
    torch.autograd.graph.increment_version([plane for planes in parts for plane in planes])
    return True


def _launch(form: str, number: int, parts: Sequence[Sequence[torch.Tensor]], numbers: Sequence[torch.Tensor]) -> bool:
    each, found = _EACH[form], list[int]()
    for planes, values in zip(parts, numbers, strict=True):
        first, second, last = planes[0], planes[-2], planes[-1]
        if first.size(-1) % each or first.dim() != last.dim():
            return False
        # The last plane as if it had an element for each of the others.
        strides = (*(each * stride for stride in last.stride()[:-1]), 1 if last.size(-1) == 1 else last.stride(-1))
        size, places = _parts(first.shape, (first.stride(), second.stride(), values.stride(), strides))
        if places is None:
            return False
        for *starts, start in places:
            views = zip((first, second, values), starts, strict=True)
            found += (view.data_ptr() + view.itemsize * begin for view, begin in views)
            found += (size, last.data_ptr() + last.itemsize * (start // each))
    entries, device = tuple(found), parts[0][0].device
    table, is_aligned = _table(entries, device)
    programs = table[len(entries) :]
    if programs.numel():
        kernel: Any = _KERNELS[form][number]
        with current(device):
            kernel[(programs.numel() // 2,)](
                table,
                programs,
                TYPES=_LISTS[form],
                ALIGNED=is_aligned,
                num_warps=8,
                enable_fp_fusion=False,
            )
    return True
