"""The logical matrices of a weight as tensors of their own, and a weight from them: for measurements and tests.

The step copies them to batches and back (:mod:`megatron_muon.engine.slices`), by the same geometry.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_muon.routing.blocks import BlockRange, View, plain, units_of
from megatron_muon.routing.layout import MatrixLayout


def pairs(matrices: BlockRange, weight: torch.Tensor, batch: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Views of equal shapes of a shard and of the batch that holds its matrices.

    Args:
        matrices: which of the shard's matrices.
        weight: (rows, columns), or (experts, rows, columns): the shard, with any strides.
        batch: (matrices, rows of each on this rank, columns), with any strides.
    """
    (weight,) = plain([weight])
    views = zip(*matrices.views(weight, batch, 0), strict=True)
    return [(weight if its is None else _view(weight, its), _view(batch, other)) for its, other in views]


def _view(tensor: torch.Tensor, view: View) -> torch.Tensor:
    return tensor.as_strided(view.size, view.strides, tensor.storage_offset() + view.start)


def split(layout: MatrixLayout, weight: torch.Tensor) -> list[torch.Tensor]:
    """The blocks of a weight, or of a shard of whole periods, in the order of :meth:`MatrixLayout.blocks`.

    Args:
        layout: of the weight.
        weight: (rows, columns), or (experts, rows, columns) if stacked.

    Returns:
        For each block (rows of the block, columns), with leading dimensions for the experts of a stack and for the
        heads of a section with ``matrix_rows``. Views where the strides allow it.

    Raises:
        ValueError: if the rows are not whole periods.
    """
    found = []
    for number, block in enumerate(layout.blocks(weight.shape)):
        heads = (-1,) if layout.matrix_rows(number) else ()
        shape = (*weight.shape[:-2], *heads, block.rows, block.columns)
        batch = weight.new_empty(block.count, block.rows, block.columns)
        views = pairs(_all(layout, number, weight.shape), weight, batch)
        if len(views) == 1:
            found.append(views[0][0].reshape(shape))
            continue
        for rows, its in views:
            its.copy_(rows)
        found.append(batch.view(shape))
    return found


def merge(layout: MatrixLayout, blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """The inverse of :func:`split`, as a new tensor."""
    rows = sum(block[0].numel() if layout.stacked else block.numel() for block in blocks) // blocks[0].size(-1)
    weight = blocks[0].new_empty((*blocks[0].shape[: int(layout.stacked)], rows, blocks[0].size(-1)))
    for number, (block, shape) in enumerate(zip(blocks, layout.blocks(weight.shape), strict=True)):
        batch = block.reshape(shape.count, shape.rows, shape.columns)
        for target, source in pairs(_all(layout, number, weight.shape), weight, batch):
            target.copy_(source)
    return weight


def _all(layout: MatrixLayout, block: int, shape: tuple[int, ...]) -> BlockRange:
    return BlockRange(layout, block, 0, units_of(layout, block, shape, False))
