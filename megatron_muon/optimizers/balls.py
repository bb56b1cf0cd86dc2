"""Directions of norm balls: what Scion (arXiv 2502.07529) gives weights that are no hidden matrices.

The steepest direction within the unit ball of a norm needs no orthogonalization if the norm is one of entries, rows or
columns. For a matrix u of momentum, all with RMS 1 where nothing is zero:

* ``sign``: the sign of each entry (the largest entry is bounded);
* ``row_norm``: each row divided by its RMS (an output layer's logits, or the rows that an embedding looks up);
* ``col_norm``: each column divided by its RMS.

A weight that multiplies inputs of n features is moved by 1/n of that, so that its outputs change by at most the radius
(for columns: by the radius, each); rows of a table are looked up, not summed, and move by the radius itself.
"""

from __future__ import annotations

import torch

from megatron_muon.optimizers.matrices import Matrices, signs_
from megatron_muon.orthogonalize.newton_schulz import EPS
from megatron_muon.routing.layout import COLUMN_NORM, ROW_NORM


def ball_directions(matrices: Matrices, direction: str) -> list[torch.Tensor]:
    """The direction of each update, from its momentum.

    Args:
        matrices: the updates; their own ``direction`` means nothing.
        direction: one of :data:`megatron_muon.routing.layout.BALLS`.

    Returns:
        (matrices, rows on this rank, columns on this rank) for each. Zeros stay zeros.
    """
    # One batch for each, changed in place: a table is a single item of a chunk, however large it is.
    mixes = [update.mix() for update in matrices.updates]
    if direction not in (ROW_NORM, COLUMN_NORM):
        return [signs_(mix) for mix in mixes]
    if direction == ROW_NORM:
        sums, counts = matrices.row_squares(mixes, wide=True), [update.columns for update in matrices.updates]
    else:
        sums, counts = matrices.column_squares(mixes), [update.rows for update in matrices.updates]
    return [_divided(mix, total / count) for mix, total, count in zip(mixes, sums, counts, strict=True)]


def _divided(mix: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
    is_there = mean_square >= EPS**2  # a row of zeros has no direction
    return mix.mul_(torch.where(is_there, mean_square.rsqrt(), torch.zeros_like(mean_square)).to(mix.dtype))
