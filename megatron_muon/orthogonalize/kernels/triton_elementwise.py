"""Elementwise passes of a step over many matrices in one launch each, as Triton kernels.

What is read and written is found by a table on the device: addresses and sizes of any mix of tensors. Products and sums
are fused and rounded just where torch's own kernels do it, so that the bits are the same.
"""

# Triton has no type stubs, is not installed everywhere, and reads annotations of its functions as its own.
# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def"

from __future__ import annotations

import ctypes
import functools
import itertools
import operator
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from megatron_muon.orthogonalize.kernels import current
from megatron_muon.orthogonalize.kernels.triton_symmetric import obstacle as obstacle

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

_FIELDS = tl.constexpr(5)
"""Of an entry of the table, elements that are neighbours in memory: three addresses, their number, and the bits of a
factor."""

_BLOCK = tl.constexpr(4096)
"""Elements of a program."""

_Tensors = Sequence[torch.Tensor]


@triton.jit
def _place(table, programs, ALIGNED: tl.constexpr):
    """The entry of this program, its elements there, and which of these there are."""
    program = tl.program_id(0)
    entry = table + tl.load(programs + 2 * program) * _FIELDS
    index = tl.load(programs + 2 * program + 1) * _BLOCK + tl.arange(0, _BLOCK)
    size = tl.load(entry + 3)
    return entry, index, index < (tl.multiple_of(size, 16) if ALIGNED else size)


@triton.jit
def _start(entry, NUMBER: tl.constexpr, TYPES: tl.constexpr, ALIGNED: tl.constexpr):
    """The address of a tensor's elements in an entry of the table."""
    start = tl.load(entry + NUMBER).to(tl.pointer_type(TYPES[NUMBER]))
    return tl.multiple_of(start, 16) if ALIGNED else start


@triton.jit(do_not_specialize=["from_grad", "from_momentum"])
def _pack_kernel(
    table,
    programs,
    updating,
    mixing,
    from_grad,
    from_momentum,
    TYPES: tl.constexpr,
    UPDATES: tl.constexpr,
    MIXES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    entry, index, inside = _place(table, programs, ALIGNED)
    momenta = _start(entry, 0, TYPES, ALIGNED) + index
    value = tl.load(momenta, mask=inside)
    if UPDATES or MIXES:
        grad = tl.load(_start(entry, 1, TYPES, ALIGNED) + index, mask=inside).to(TYPES[0]).to(tl.float32)
    if UPDATES:
        old = value.to(tl.float32)
        value = tl.fma(grad - old, updating, tl.where(from_grad != 0, grad, old)).to(TYPES[0])
        tl.store(momenta, value, mask=inside)
    if MIXES:
        new = value.to(tl.float32)
        value = tl.fma(new - grad, mixing, tl.where(from_momentum != 0, new, grad)).to(TYPES[0])
    tl.store(_start(entry, 2, TYPES, ALIGNED) + index, value.to(TYPES[2]), mask=inside)


@triton.jit(do_not_specialize=["rate_bits"])
def _add_kernel(table, programs, rate_bits: tl.int64, kept, TYPES: tl.constexpr, ALIGNED: tl.constexpr):
    entry, index, inside = _place(table, programs, ALIGNED)
    # As Python multiplies learning rate and factor: in 64 bits, rounded once.
    factor = tl.load(entry + 4).to(tl.float64, bitcast=True)
    rate = (rate_bits.to(tl.float64, bitcast=True) * factor).to(tl.float32)
    weights = _start(entry, 0, TYPES, ALIGNED) + index
    weight = tl.load(weights, mask=inside).to(tl.float32)
    update = tl.load(_start(entry, 1, TYPES, ALIGNED) + index, mask=inside).to(tl.float32)
    if weights.dtype.element_ty == tl.float32:
        weight = tl.fma(update, rate, weight * kept)
    else:
        weight = tl.fma(weight, kept, update * rate)
    tl.store(weights, weight.to(TYPES[0]), mask=inside)


def pack(momenta: _Tensors, grads: _Tensors, slots: _Tensors, momentum: float | None, nesterov: float) -> bool:
    """See :func:`megatron_muon.orthogonalize.kernels.elementwise.pack`; False if nothing was done, for their layout."""
    updating, from_grad = _lerp(0.0 if momentum is None else 1.0 - momentum)
    mixing, from_momentum = _lerp(nesterov)
    options = {"UPDATES": momentum is not None, "MIXES": nesterov != 1.0}
    numbers = (updating, mixing, from_grad, from_momentum)
    return _launch(_pack_kernel, (momenta, grads, slots), itertools.repeat(0.0), numbers, options)


def add(weights: _Tensors, updates: _Tensors, factors: Sequence[float], lr: float, kept: float | None) -> bool:
    """See :func:`megatron_muon.orthogonalize.kernels.elementwise.add`; False if nothing was done, for their layout."""
    # Minus: the sign is a bit, so that Triton never takes the bits for a number of 32.
    numbers = (_bits(-float(lr)), 1.0 if kept is None else float(kept))
    return _launch(_add_kernel, (weights, updates, updates), factors, numbers, {})


def _launch(
    kernel: Any,
    tensors: tuple[_Tensors, ...],
    factors: Iterable[float],
    numbers: tuple[float, ...],
    options: dict[str, bool],
) -> bool:
    """Run a kernel over tensors, those at one place of one shape; the first of them change.

    Returns:
        False if elements of a row are no neighbours: then nothing was done.
    """
    found: list[int] = []
    for factor, *views in zip(factors, *tensors, strict=False):
        size, parts = _parts(views[0].shape, tuple(view.stride() for view in views))
        if parts is None:
            return False
        for starts in parts:
            found += (view.data_ptr() + view.itemsize * start for view, start in zip(views, starts, strict=True))
            found += (size, _bits(factor))
    entries, device = tuple(found), tensors[0][0].device
    table, is_aligned = _table(entries, device)
    programs = table[len(entries) :]
    if programs.numel():
        with current(device):
            kernel[(programs.numel() // 2,)](
                table,
                programs,
                *numbers,
                **options,
                TYPES=tuple(_TYPES[some[0].dtype] for some in tensors),
                ALIGNED=is_aligned,
                num_warps=8,
                enable_fp_fusion=False,  # what torch fuses is written out
            )
        torch.autograd.graph.increment_version(tensors[0])
    return True


@functools.lru_cache(maxsize=4096)
def _parts(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> tuple[int, list[list[int]] | None]:
    """How many elements are neighbours in all of some tensors, and where each such part starts in each; or None."""
    dims: list[tuple[int, tuple[int, ...]]] = [(1, (-1,) * len(strides))]
    for size, *steps in zip(shape, *strides, strict=True):
        if dims[-1][1] == tuple(size * step for step in steps):  # the two are one, as they lie
            dims[-1] = dims[-1][0] * size, tuple(steps)
        elif size != 1:
            dims.append((size, tuple(steps)))
    size, neighbours = dims.pop()
    if set(neighbours) != {1}:
        return 0, None
    sizes, distances = [size for size, _ in dims], list(zip(*(steps for _, steps in dims), strict=True))
    places = itertools.product(*map(range, sizes))
    return size, [[sum(map(operator.mul, place, each)) for each in distances] for place in places]


@functools.lru_cache(maxsize=512)
def _table(entries: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, bool]:
    """On the device: the entries, and then for each program the entry and which block of it. Waits for nothing.

    With it, whether 16 elements at a time can be read and written.
    """
    found = torch.tensor(entries, dtype=torch.int64).view(-1, _FIELDS.value)
    blocks = (found[:, 3] + _BLOCK.value - 1) // _BLOCK.value
    numbers = torch.repeat_interleave(torch.arange(len(blocks)), blocks)
    first = blocks.cumsum(0) - blocks
    programs = torch.stack([numbers, torch.arange(len(numbers)) - first[numbers]], dim=1)
    table, is_aligned = torch.cat([found.view(-1), programs.view(-1)]), not bool((found[:, :4] % 16).any())
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table, is_aligned


def _lerp(weight: float) -> tuple[float, bool]:
    """``lerp(a, b, weight)`` of torch is ``coefficient * (b - a)`` and, in one rounding, a, or b for large weights."""
    narrow = ctypes.c_float(weight).value
    return (narrow, False) if abs(narrow) < 0.5 else (narrow - 1.0, True)


def _bits(number: float) -> int:
    """The bits of a float64: what Triton passes to a kernel as a float is a float32."""
    return int(struct.unpack("q", struct.pack("d", number))[0])
