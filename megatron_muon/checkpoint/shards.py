"""State tensors as shards of global tensors, where they lie.

A slice of a flattened weight is a few boxes of it: part of a row, whole rows, part of a row. Each is described, saved
and read where it lies, so that no rank needs what others have.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_muon.checkpoint.errors import CheckpointError
from megatron_muon.errors import sizes

Sizes = tuple[int, ...]

Replica = tuple[int, int, int]
"""(pipeline, tensor, data) rank among copies."""


def cut(
    base: ShardedTensor, key: str, tensor: torch.Tensor, first: int, span: tuple[int, int], replica: Replica
) -> list[ShardedTensor]:
    """What a slice of a flattened weight has of a block of it, as boxes.

    Args:
        base: the model's description of the block.
        key: of the state.
        tensor: the slice, contiguous.
        first: the element of the flattened weight at which the block begins.
        span: the elements of the flattened weight that the slice has, [start, stop).
        replica: of the slice.

    Returns:
        views of ``tensor``, in order; none if it has nothing of the block.
    """
    start, stop = (min(max(edge - first, 0), math.prod(base.local_shape)) for edge in span)
    found, at = [], max(first - span[0], 0)
    before = base.prepend_axis_num
    for offsets, shape in boxes(start, stop, base.local_shape):
        data = tensor.view(-1)[at : at + math.prod(shape)].view(shape)
        at += data.numel()
        here = (*base.global_offset[:before], *map(sum, zip(base.global_offset[before:], offsets, strict=True)))
        found.append(
            replace(
                base,
                key=key,
                data=data,
                dtype=data.dtype,
                local_shape=shape,
                global_offset=here,
                axis_fragmentations=None,
                replica_id=replica,
            )
        )
    return found


def shaped(base: ShardedTensor, key: str, tensor: torch.Tensor, replica: Replica) -> ShardedTensor:
    """The model's description with another tensor, of the same shape or with 1 along some axes.

    Raises:
        CheckpointError: for other shapes.
    """
    if tensor.shape == base.local_shape:
        return replace(base, key=key, data=tensor, dtype=tensor.dtype, replica_id=replica)
    before = base.prepend_axis_num
    shape = tuple(tensor.shape) if tensor.numel() > 1 else (1,) * len(base.local_shape)
    fits = len(shape) == len(base.local_shape) and all(
        have in (1, want) for have, want in zip(shape, base.local_shape, strict=True)
    )
    if not fits:
        raise CheckpointError(
            f"{key}: a state of shape {sizes(tensor.shape)} has no place beside a weight of shape "
            f"{sizes(base.local_shape)}: give it the weight's shape, or 1 in place of some sizes."
        )
    cuts = base.axis_fragmentations or (1,) * len(base.global_shape)
    keeps = [have == want for have, want in zip(shape, base.local_shape, strict=True)]
    # Ranks whose shards of the weight differ only along an axis that the state has not: copies of one another.
    copy = 0
    for axis, keep in enumerate(keeps):
        if not keep:
            copy = copy * cuts[before + axis] + base.global_offset[before + axis] // base.local_shape[axis]

    def along(values: Iterable[int], single: int) -> tuple[int, ...]:
        values = tuple(values)
        rest = (value if keep else single for value, keep in zip(values[before:], keeps, strict=True))
        return (*values[:before], *rest)

    pipeline, shard, data = replica
    return ShardedTensor(
        key,
        tensor.reshape(shape),
        tensor.dtype,
        shape,
        along(base.global_shape, 1),
        along(base.global_offset, 0),
        None,
        (pipeline, shard or copy, data),
        before,
        base.allow_shape_mismatch,
    )


def placed(shard: ShardedTensor, alone: bool) -> ShardedTensor:
    """At any place of the global tensor, not on a grid; with the axes of layers and experts, or ``alone`` without."""
    before = shard.prepend_axis_num
    first = before if alone else 0
    added = before - first
    assert shard.data is not None
    return replace(
        shard,
        data=shard.data[(None,) * added],
        local_shape=(1,) * added + shard.local_shape,
        global_shape=shard.global_shape[first:],
        global_offset=shard.global_offset[first:],
        axis_fragmentations=None,
        prepend_axis_num=0,
    )


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
