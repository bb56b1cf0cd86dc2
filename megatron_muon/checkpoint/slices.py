"""Weights of which each rank of a group has a slice of the flattened elements.

A slice is a few boxes of the weight: part of a row, whole rows, part of a row. Each is described, saved and read where
it lies, so that no rank needs what others have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from megatron_muon.checkpoint.held import Held

__all__ = ["boxes", "mean_squares"]

Sizes = tuple[int, ...]

_PIECE = 1 << 22
"""Elements that are squared at once, in float64."""


def boxes(start: int, stop: int, shape: Sizes) -> Iterator[tuple[Sizes, Sizes]]:
    """The elements [start, stop) of a flattened tensor, as (offsets, sizes) of boxes in it, in order."""
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if start % row:
        number, end = start // row, min(stop, first * row)
        for offsets, sizes in boxes(start - number * row, end - number * row, shape[1:]):
            yield (number, *offsets), (1, *sizes)
        yield from boxes(end, stop, shape)
        return
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    for offsets, sizes in boxes(0, stop - last * row, shape[1:]):
        yield (last, *offsets), (1, *sizes)


def mean_squares(held: Sequence[Held], tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """The mean square of a state, over all slices of a weight.

    One all-reduce of a number for each weight in slices in each group: all ranks of a group must call this with the
    weights in the same order, and nothing may fail on one of them between their last exchange and this.

    Args:
        held: the weights of this rank, those of which it has no element among them.
        tensors: one for each: the state, whole or the slice; None counts nothing.

    Returns:
        float64 scalars on the weights' devices.
    """
    sums = [torch.zeros((), dtype=torch.float64, device=each.param.device) for each in held]
    for total, tensor in zip(sums, tensors, strict=True):
        for piece in () if tensor is None else tensor.reshape(-1).split(_PIECE):
            total += piece.double().square().sum()
    groups: dict[dist.ProcessGroup, list[int]] = {}
    for place, each in enumerate(held):
        if each.slices is not None:
            groups.setdefault(each.slices.group, []).append(place)
    for group, places in groups.items():
        totals = torch.stack([sums[place] for place in places])
        dist.all_reduce(totals, group=group)
        for place, total in zip(places, totals, strict=True):
            sums[place] = total
    return [
        total / (each.param if tensor is None or each.slices else tensor).numel()
        for each, tensor, total in zip(held, tensors, sums, strict=True)
    ]
