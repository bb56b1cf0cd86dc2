"""Elementwise passes of a step over many matrices in one launch each, as a Triton kernel.

What is read and written is found by a table on the device: addresses, sizes and distances of rows, of any mix of
tensors. Products and sums are fused and rounded just where torch's own kernels do it, so that the bits are the same.
"""

# Triton has no type stubs, is not installed everywhere, and reads annotations of its functions as its own.
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def"

from __future__ import annotations

import ctypes
import functools
import itertools
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from megatron_muon.orthogonalize.kernels import current
from megatron_muon.orthogonalize.kernels.triton_symmetric import obstacle

__all__ = ["add", "obstacle", "pack"]

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
"""What the kernels read and write."""

_BLOCK = 4096
"""Elements of a program."""

_FIELDS = 9
"""Of an entry of the table: three addresses, three distances of rows in elements, the length of a row, the number of
elements, and the bits of a factor."""


@triton.jit
def _place(table, programs, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, FIELDS: tl.constexpr):
    """The entry of this program, its elements there, and which of these there are."""
    program = tl.program_id(0)
    entry = table + tl.load(programs + 2 * program) * FIELDS
    index = tl.load(programs + 2 * program + 1) * BLOCK + tl.arange(0, BLOCK)
    size = tl.load(entry + 7)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    return entry, index, index < size


@triton.jit
def _elements(entry, index, NUMBER: tl.constexpr, TYPE: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to elements of a tensor of an entry."""
    start = tl.load(entry + NUMBER).to(tl.pointer_type(TYPE))
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    if ROWS:
        length = tl.load(entry + 6)
        index += index // length * (tl.load(entry + 3 + NUMBER) - length)
    return start + index


@triton.jit(do_not_specialize=["from_grad", "from_momentum"])
def _pack_kernel(
    table,
    programs,
    updating,
    mixing,
    from_grad,
    from_momentum,
    MOMENTUM: tl.constexpr,
    GRAD: tl.constexpr,
    SLOT: tl.constexpr,
    UPDATES: tl.constexpr,
    MIXES: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    FIELDS: tl.constexpr,
):
    entry, index, inside = _place(table, programs, ALIGNED, BLOCK, FIELDS)
    momenta = _elements(entry, index, 0, MOMENTUM, ROWS, ALIGNED)
    value = tl.load(momenta, mask=inside)
    if UPDATES or MIXES:
        grad = tl.load(_elements(entry, index, 1, GRAD, ROWS, ALIGNED), mask=inside).to(MOMENTUM).to(tl.float32)
    if UPDATES:
        old = value.to(tl.float32)
        value = tl.fma(grad - old, updating, tl.where(from_grad != 0, grad, old)).to(MOMENTUM)
        tl.store(momenta, value, mask=inside)
    if MIXES:
        new = value.to(tl.float32)
        value = tl.fma(new - grad, mixing, tl.where(from_momentum != 0, new, grad)).to(MOMENTUM)
    tl.store(_elements(entry, index, 2, SLOT, ROWS, ALIGNED), value.to(SLOT), mask=inside)


@triton.jit(do_not_specialize=["rate_bits"])
def _add_kernel(
    table,
    programs,
    rate_bits: tl.int64,
    kept,
    WEIGHT: tl.constexpr,
    UPDATE: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    FIELDS: tl.constexpr,
):
    entry, index, inside = _place(table, programs, ALIGNED, BLOCK, FIELDS)
    # As Python multiplies learning rate and factor: in 64 bits, rounded once.
    factor = tl.load(entry + 8).to(tl.float64, bitcast=True)
    rate = (rate_bits.to(tl.float64, bitcast=True) * factor).to(tl.float32)
    weights = _elements(entry, index, 0, WEIGHT, ROWS, ALIGNED)
    weight = tl.load(weights, mask=inside).to(tl.float32)
    update = tl.load(_elements(entry, index, 1, UPDATE, ROWS, ALIGNED), mask=inside).to(tl.float32)
    if weights.dtype.element_ty == tl.float32:
        weight = tl.fma(update, rate, weight * kept)
    else:
        weight = tl.fma(weight, kept, update * rate)
    tl.store(weights, weight.to(WEIGHT), mask=inside)


def pack(
    momenta: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    slots: Sequence[torch.Tensor],
    momentum: float | None,
    nesterov: float,
) -> bool:
    """See :func:`megatron_muon.orthogonalize.kernels.elementwise.pack`; False if nothing was done, for their layout."""
    entries = _entries((momenta, grads, slots))
    if entries is None:
        return False
    updating, from_grad = _lerp(0.0 if momentum is None else 1.0 - momentum)
    mixing, from_momentum = _lerp(nesterov)
    types = {"MOMENTUM": momenta[0], "GRAD": grads[0], "SLOT": slots[0]}
    options = {"UPDATES": momentum is not None, "MIXES": nesterov != 1.0}
    _launch(_pack_kernel, entries, types, (updating, mixing, from_grad, from_momentum), options)
    if momentum is not None:
        torch.autograd.graph.increment_version(momenta)
    return True


def add(
    weights: Sequence[torch.Tensor],
    updates: Sequence[torch.Tensor],
    factors: Sequence[float],
    lr: float,
    kept: float | None,
) -> bool:
    """See :func:`megatron_muon.orthogonalize.kernels.elementwise.add`; False if nothing was done, for their layout."""
    entries = _entries((weights, updates), factors)
    if entries is None:
        return False
    # Minus: the sign is a bit, so that Triton never takes the bits for a number of 32.
    numbers = (_bits(-float(lr)), 1.0 if kept is None else float(kept))
    _launch(_add_kernel, entries, {"WEIGHT": weights[0], "UPDATE": updates[0]}, numbers, {})
    torch.autograd.graph.increment_version(weights)
    return True


def _launch(
    kernel: Any,
    entries: tuple[int, ...],
    types: dict[str, torch.Tensor],
    numbers: tuple[float, ...],
    options: dict[str, bool],
) -> None:
    device = next(iter(types.values())).device
    table = _table(entries, device)
    programs = table[len(entries) :]
    addresses = (address for number in range(3) for address in entries[number::_FIELDS])
    has_rows = entries[6::_FIELDS] != entries[7::_FIELDS]
    if programs.numel():
        with current(device):
            kernel[(programs.numel() // 2,)](
                table,
                programs,
                *numbers,
                **{name: _TYPES[tensor.dtype] for name, tensor in types.items()},
                **options,
                ROWS=has_rows,
                ALIGNED=not has_rows and all(address % 16 == 0 for address in addresses),
                BLOCK=_BLOCK,
                FIELDS=_FIELDS,
                num_warps=8,
                enable_fp_fusion=False,  # what torch fuses is written out
            )


def _entries(tensors: Sequence[Sequence[torch.Tensor]], factors: Sequence[float] = ()) -> tuple[int, ...] | None:
    """The table of some tensors, those at one place of one shape; None if elements of a row are no neighbours."""
    found: list[int] = []
    for number, views in enumerate(zip(*tensors, strict=True)):
        bits = _bits(factors[number]) if factors else 0
        for offsets, strides, length, size in _parts(views):
            if strides is None:
                return None
            addresses = [view.data_ptr() + offset for view, offset in zip(views, offsets, strict=True)]
            unused = [0] * (3 - len(views))
            found += (*addresses, *unused, *strides, *unused, length, size, bits)
    return tuple(found)


def _parts(
    views: tuple[torch.Tensor, ...],
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...] | None, int, int]]:
    """What of tensors of one shape has rows at one distance: offsets in bytes, distances, length of a row, elements."""
    none = (0,) * len(views)
    if all(view.is_contiguous() for view in views):
        size = views[0].numel()
        yield none, (size,) * len(views), size, size
        return
    dims: list[tuple[int, tuple[int, ...]]] = []
    for size, *strides in zip(views[0].shape, *(view.stride() for view in views), strict=True):
        if dims and dims[-1][1] == tuple(size * stride for stride in strides):
            dims[-1] = dims[-1][0] * size, tuple(strides)
        elif size != 1:
            dims.append((size, tuple(strides)))
    length, neighbours = dims.pop()
    rows, distances = dims.pop() if dims else (1, (length,) * len(views))
    for place in itertools.product(*(range(size) for size, _ in dims)):
        offsets = tuple(
            sum(step * strides[number] for step, (_, strides) in zip(place, dims, strict=True)) * view.itemsize
            for number, view in enumerate(views)
        )
        yield offsets, distances if set(neighbours) == {1} else None, length, rows * length


def _lerp(weight: float) -> tuple[float, bool]:
    """``lerp(a, b, weight)`` of torch is ``coefficient * (b - a)`` and, in one rounding, a, or b for large weights."""
    narrow = ctypes.c_float(weight).value
    return (narrow, False) if abs(narrow) < 0.5 else (narrow - 1.0, True)


def _bits(number: float) -> int:
    """Of a float64, for what Triton passes floats to a kernel as: float32."""
    return int(struct.unpack("q", struct.pack("d", number))[0])


@functools.lru_cache(maxsize=512)
def _table(entries: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """On the device: the entries, and then for each program the entry and which block of it. Waits for nothing."""
    found = torch.tensor(entries, dtype=torch.int64)
    blocks = (found[7::_FIELDS] + _BLOCK - 1) // _BLOCK
    numbers = torch.repeat_interleave(torch.arange(len(blocks)), blocks)
    first = blocks.cumsum(0) - blocks
    programs = torch.stack([numbers, torch.arange(len(numbers)) - first[numbers]], dim=1)
    table = torch.cat([found, programs.view(-1)])
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
