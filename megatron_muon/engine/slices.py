"""Matrices that lie side by side in a batch, and where they lie in their weights."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from megatron_muon.engine.plan import MatrixSlice
from megatron_muon.routing.blocks import BlockRange, View, plain

Tensors = list[torch.Tensor]


class _Views(NamedTuple):
    """Views of a tensor like a weight, and of a batch of its matrices and others.

    Attributes:
        shape: of the tensor.
        strides: of the tensor.
        weight: its views; None for the tensor itself.
        batch: views of the batch.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    weight: list[View | None]
    batch: list[View]


@dataclass(frozen=True)
class Slices:
    """Matrices that lie side by side in a batch: of which weights they are, and where they lie there.

    Attributes:
        items: which matrices of which weight, in the order of the batch.
        ranges: where each of these lies in this rank's shard.
    """

    items: tuple[MatrixSlice, ...]
    ranges: tuple[BlockRange, ...]

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """The index of each item's weight in the engine's plan."""
        return tuple(item.weight for item in self.items)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """The number of matrices of each item."""
        return tuple(item.count for item in self.items)

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        return tuple(itertools.accumulate(self.counts, initial=0))

    @cached_property
    def _are_whole_weights(self) -> bool:
        return not any(its.layout.sections or its.layout.stacked or its.layout.transposed for its in self.ranges)

    @cached_property
    def _turned(self) -> bool:
        return any(its.layout.is_turned for its in self.ranges)

    def _seen(self, tensors: Sequence[torch.Tensor]) -> Tensors:
        """Tensors like the weights, as their layouts see them."""
        tensors = plain(tensors)
        if not self._turned:
            return tensors
        return [its.layout.seen(tensor) for its, tensor in zip(self.ranges, tensors, strict=True)]

    @cached_property
    def _cut(self) -> dict[tuple[int, ...], list[tuple[Slices, int, int]]]:
        return {}

    @cached_property
    def _worked_out(self) -> dict[tuple[tuple[int, ...], ...], list[_Views]]:
        return {}

    def pairs(self, tensors: Sequence[torch.Tensor], batch: torch.Tensor) -> tuple[Tensors, Tensors]:
        """Views of equal shapes, but for columns, of tensors like the weights and of a batch of these matrices.

        Args:
            tensors: for each of :attr:`items` one of its weight's shape (on this rank), or with other columns.
            batch: (matrices, rows, columns), with any strides.
        """
        tensors = self._seen(tensors)
        if self._are_whole_weights:
            return tensors, list(batch.unbind(0))
        theirs, known = self._views(tensors, batch)
        offset = batch.storage_offset()
        return theirs, [batch.as_strided(size, way, offset + at) for each in known for size, way, at in each.batch]

    def views(self, tensors: Sequence[torch.Tensor], batch: torch.Tensor) -> Tensors:
        """The views of tensors like the weights that :meth:`pairs` gives, without those of a batch."""
        tensors = self._seen(tensors)
        return tensors if self._are_whole_weights else self._views(tensors, batch)[0]

    def _views(self, tensors: Tensors, batch: torch.Tensor) -> tuple[Tensors, list[_Views]]:
        """Views of tensors, and the sizes and strides of all views for tensors and a batch of these shapes."""
        key = (tensors[0].shape, tensors[0].stride(), batch.shape, batch.stride())
        if (known := self._worked_out.get(key)) is None:
            known = self._worked_out[key] = [
                _Views(tensor.shape, tensor.stride(), *its.views(tensor, batch, first))
                for its, tensor, first in zip(self.ranges, tensors, self._starts, strict=False)
            ]
        found: Tensors = []
        for tensor, (shape, strides, views, _) in zip(tensors, known, strict=True):
            if tensor.shape != shape or tensor.stride() != strides:  # the first one's are the same as before
                del self._worked_out[key]
                return self._views(tensors, batch)
            offset = tensor.storage_offset()
            for view in views:
                found.append(tensor if view is None else tensor.as_strided(view[0], view[1], offset + view[2]))
        return found, known

    def runs(self, keys: Sequence[Hashable]) -> list[tuple[Slices, int, int]]:
        """Cut where keys change: what lies side by side, with its first matrix in the batch and the one after its last.

        Args:
            keys: one of each of :attr:`items`.
        """
        if keys.count(keys[0]) == len(keys):
            return [(self, 0, self._starts[-1])]
        ends = tuple(index for index in range(1, len(keys)) if keys[index] != keys[index - 1])
        if ends not in self._cut:
            self._cut[ends] = [
                (Slices(self.items[a:b], self.ranges[a:b]), self._starts[a], self._starts[b])
                for a, b in itertools.pairwise([0, *ends, len(keys)])
            ]
        return self._cut[ends]
