"""What the engine asks of an optimizer, and what it gives it: functions on batches of matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megatron_muon.engine.slices import Slices

Read = Callable[[Sequence[Slices], Sequence[torch.Tensor]], None]
"""Fills batches, (matrices, rows, columns) on this rank, with what is to be orthogonalized."""

Reduce = Callable[[torch.Tensor], torch.Tensor]
"""Sums a tensor over the ranks that hold the other parts of the same matrices; may change it."""

Write = Callable[[Sequence[Slices], Sequence[torch.Tensor], Reduce], None]
"""Takes the batches of orthogonalized matrices, (matrices, rows, columns) on this rank, and may change them."""

Solve = Callable[[list[int], list[torch.Tensor]], torch.Tensor]
"""Computes one batch of whole matrices from several of their shape (matrices, m, n): of which weights the matrices
are, by index, and one batch for each read. The result has the same shape and dtype."""

Flops = Callable[[int, int], int]
"""Operations in the products for one p x q matrix."""
