"""What the engine asks of an optimizer, and what it gives it: functions on batches of matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_muon.engine.plan import MatrixSlice
from megatron_muon.routing.blocks import BlockRange

__all__ = ["Flops", "Part", "Read", "Reduce", "Solve", "Write"]


@dataclass(frozen=True)
class Part:
    """Matrices that :func:`megatron_muon.engine.execute.execute` asks for or hands out.

    Attributes:
        item: which matrices of which weight.
        piece: where they lie in this rank's shard.
    """

    item: MatrixSlice
    piece: BlockRange


Read = Callable[[list[Part], list[torch.Tensor]], None]
"""Fills the batches (each (matrices, rows, columns) on this rank) with what is to be orthogonalized."""

Reduce = Callable[[torch.Tensor], torch.Tensor]
"""Sums a tensor over the ranks that hold the other parts of the same matrices; may change it."""

Write = Callable[[list[Part], list[torch.Tensor], Reduce], None]
"""Takes the orthogonalized matrices (each (matrices, rows, columns) on this rank)."""

Solve = Callable[[list[int], list[torch.Tensor]], torch.Tensor]
"""Computes one batch of whole matrices from several of their shape (matrices, m, n): of which weights the matrices
are, by index, and one batch for each read. The result has the same shape and dtype."""

Flops = Callable[[int, int], int]
"""Operations in the products for one p x q matrix."""
