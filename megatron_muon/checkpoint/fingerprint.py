"""Numbers by which tensors are recognised: cheap, the same at every layout, bit for bit.

A fingerprint is two sums modulo 2**64 that add up over the shards of a tensor: ``order << 64 | plain``.

``plain`` is the sum of the elements' bits as integers. It sees a flipped bit, and a shard that is missing or doubled,
but not elements that change places. ``order`` does: it is the sum of the elements' bits, mixed, times a weight of the
element's place in the global tensor, the product over the axes of a random odd number for each index. Without the
mixing, signs and exponents would differ in the first bits, of which a sum modulo 2**64 sees least.

Checkpoints of form 1 have ``plain`` alone; ``order`` of a tensor with elements is 0 by chance only.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence

import torch

_MODULUS = 1 << 64

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_ODD = (0x9E3779B97F4A7C15 - _MODULUS, 0xBF58476D1CE4E5B9 - _MODULUS)
"""The odd multipliers of the splitmix64 generator of random numbers."""

_PIECE = {"cpu": 1 << 17}
_PIECE_OF_OTHERS = 1 << 22
"""Elements that are summed at once, which takes 16 bytes for each: on a CPU, what its cache holds."""


def fingerprints(tensors: Iterable[torch.Tensor], offsets: Iterable[Sequence[int]] | None = None) -> list[int]:
    """One number in [0, 2**128) for each tensor.

    Waits for each device once.

    Args:
        tensors: of any shape and strides, and of dtypes of up to 8 bytes.
        offsets: of the first element of each in its global tensor; zeros if left out.
    """
    starts = itertools.repeat(()) if offsets is None else offsets
    sums = [_sums(tensor, start or (0,) * tensor.dim()) for tensor, start in zip(tensors, starts, strict=False)]
    places: dict[torch.device, list[int]] = defaultdict(list)
    for place, value in enumerate(sums):
        places[value.device].append(place)
    found = [0] * len(sums)
    for mine in places.values():
        numbers = torch.stack([sums[place] for place in mine]).tolist()
        for place, (plain, order) in zip(mine, numbers, strict=True):
            found[place] = _joined(plain, order)
    return found


def added[Key: Hashable](shares: Iterable[tuple[Key, int]]) -> dict[Key, int]:
    """The numbers of each whole, in order of the keys, from those of its shards."""
    totals: dict[Key, int] = defaultdict(int)
    for key, value in shares:
        total = totals[key]
        totals[key] = _joined(total + value, (total >> 64) + (value >> 64))
    return dict(sorted(totals.items()))


def fits(saved: int | None, found: int) -> bool:
    """Whether what was found is what was saved, as far as that is known: not at all if None, ``plain`` in form 1."""
    return saved in (None, found, found % _MODULUS)


def _joined(plain: int, order: int) -> int:
    return order % _MODULUS << 64 | plain % _MODULUS


def _sums(tensor: torch.Tensor, start: Sequence[int]) -> torch.Tensor:
    """``plain`` and ``order``, as signed integers."""
    *heights, width = tensor.shape or (1,)
    *tops, left = start or (0,)
    bits = tensor.detach().view(_INTEGERS[tensor.element_size()])
    piece = _PIECE.get(tensor.device.type, _PIECE_OF_OTHERS)
    plain, order = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    if tensor.numel() == 0:
        return torch.stack((plain, order))
    for columns in bits.reshape(-1, width).split(piece, dim=1):
        of_columns = _weights(torch.arange(left, left + columns.shape[1], device=tensor.device), len(tops))
        left += columns.shape[1]
        first = 0
        for block in columns.split(max(1, piece // columns.shape[1])):
            values = block.to(torch.int64, copy=True)
            plain += values.sum()
            _mix(values)
            values += 1  # or zeros that are missing would be missed
            values *= of_columns
            order += (values.sum(dim=1) * _weights_of_rows(first, len(block), heights, tops, tensor.device)).sum()
            first += len(block)
    return torch.stack((plain, order))


def _weights_of_rows(
    first: int, number: int, heights: Sequence[int], tops: Sequence[int], device: torch.device
) -> torch.Tensor:
    """Of some rows of a tensor, all axes but the last flattened."""
    rows = torch.arange(first, first + number, device=device)
    found = torch.ones_like(rows)
    for axis in reversed(range(len(heights))):
        found *= _weights(rows % heights[axis] + tops[axis], axis)
        rows = rows // heights[axis]
    return found


def _weights(indices: torch.Tensor, axis: int) -> torch.Tensor:
    """A random odd number for each index along an axis, in place."""
    indices += (axis + 1) << 40
    for _ in range(3):
        _mix(indices)
    return indices.bitwise_or_(1)


def _mix(values: torch.Tensor) -> None:
    """Let the first bits and the last bits depend on each other, in place."""
    for factor in _ODD:
        values *= factor
        values += values >> 32
