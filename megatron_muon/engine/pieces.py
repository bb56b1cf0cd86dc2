"""Where the matrices of a weight lie in its memory.

A piece is the part of some matrices of one block that lies on one rank, in a form in which it can be copied between the
weight and a batch of matrices without rearranging either: a list of views of the weight, and the views of the batch
that correspond to them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import torch

from megatron_muon.routing.layout import MatrixLayout, Section

__all__ = ["Piece", "block_rows_before", "units_of"]


@dataclass(frozen=True)
class Piece:
    """Part of one block of a weight's shard.

    Matrices are counted in units: an expert of a stack; for matrices of ``matrix_rows`` rows a period of the layout, or
    one matrix where shards cut through periods; otherwise there is one unit.

    Attributes:
        layout: of the weight.
        block: index of the block.
        start: first unit.
        stop: after the last unit.
        first_row: number of the shard's first row in the whole weight.
    """

    layout: MatrixLayout
    block: int
    start: int
    stop: int
    first_row: int

    def pairs(self, weight: torch.Tensor, batch: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Views of equal shapes of a shard and of the batch that holds its matrices.

        Args:
            weight: (rows, columns), or (experts, rows, columns): the shard.
            batch: (matrices of this piece, rows of each on this rank, columns).
        """
        layout = self.layout
        experts = plain(weight)[self.start : self.stop] if layout.stacked else weight.unsqueeze(0)
        if not layout.sections:
            return [(experts, batch)]
        if self.first_row % layout.period or not layout.fits(weight.size(-2)):
            return self._ranges(experts, batch)
        return self._periods(experts, batch)

    def _periods(self, experts: torch.Tensor, batch: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The shard holds whole periods: (experts, periods, rows of a section, columns) are views."""
        sections, m = _sections(self.layout, self.block)
        periods = experts.unflatten(-2, (-1, self.layout.period))
        if m and not self.layout.stacked:
            periods = periods[:, self.start : self.stop]
        each = sum(section.rows for _, section in sections)
        if m:
            slots = batch.unflatten(0, (periods.size(0), periods.size(1), each // m))
        else:
            slots = batch.unflatten(-2, (periods.size(1), each))
        found, offset = [], 0
        for first, section in sections:
            view = periods[..., first : first + section.rows, :]
            if m:
                count = section.rows // m
                found.append((view.unflatten(-2, (count, m)), slots[:, :, offset : offset + count]))
                offset += count
            else:
                found.append((view, slots[..., offset : offset + section.rows, :]))
                offset += section.rows
        return found

    def _ranges(self, experts: torch.Tensor, batch: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The shard cuts through periods: its rows of the block, one run of them after the other."""
        _, m = _sections(self.layout, self.block)
        rows = experts.size(-2)
        low, high = (self.start * m, self.stop * m) if m and not self.layout.stacked else (0, 1 << 62)
        found, offset = [], 0
        for start, stop, number in _runs(self.layout, self.block, self.first_row, rows):
            begin, end = max(number, low), min(number + stop - start, high)
            if begin < end:
                view = experts[:, start + begin - number : start + end - number]
                found.append((view, batch[:, offset : offset + end - begin]))
                offset += end - begin
        return found


def plain(weight: torch.Tensor) -> torch.Tensor:
    """The memory of a weight: TransformerEngine's ``GroupedTensor`` of experts forbids all views but the flat one."""
    return weight.detach().view(-1).view(weight.shape) if weight.is_contiguous() else weight


@cache
def _sections(layout: MatrixLayout, block: int) -> tuple[list[tuple[int, Section]], int]:
    """The sections of a block with their first rows in the period, and their ``matrix_rows``."""
    starts = itertools.accumulate((section.rows for section in layout.sections), initial=0)
    named: dict[str, list[tuple[int, Section]]] = {}
    for start, section in zip(starts, layout.sections, strict=False):
        named.setdefault(section.name, []).append((start, section))
    sections = list(named.values())[block]
    return sections, sections[0][1].matrix_rows


def block_rows_before(layout: MatrixLayout, block: int, row: int) -> int:
    """How many rows of a block lie before ``row`` of the whole weight."""
    if not layout.sections:
        return row
    sections, _ = _sections(layout, block)
    periods, rest = divmod(row, layout.period)
    each = sum(section.rows for _, section in sections)
    return periods * each + sum(min(max(rest - start, 0), section.rows) for start, section in sections)


@cache
def _runs(layout: MatrixLayout, block: int, first_row: int, rows: int) -> list[tuple[int, int, int]]:
    """(first local row, row after the last, number of the first among the block's rows) of each run on a shard."""
    sections, _ = _sections(layout, block)
    found = []
    for period in range(first_row // layout.period, -(-(first_row + rows) // layout.period)):
        for start, section in sections:
            begin = period * layout.period + start
            low, high = max(begin, first_row), min(begin + section.rows, first_row + rows)
            if low < high:
                found.append((low - first_row, high - first_row, block_rows_before(layout, block, low)))
    return found


def units_of(layout: MatrixLayout, block: int, shape: tuple[int, ...], broken: bool) -> int:
    """Number of units of a block of a weight of ``shape``; see :class:`Piece`.

    Args:
        layout: of the weight.
        block: index of the block.
        shape: of the whole weight, or of a shard of whole periods.
        broken: whether shards cut through periods.
    """
    if layout.stacked:
        return shape[0]
    if not layout.sections or not _sections(layout, block)[1]:
        return 1
    return layout.blocks(shape)[block].count if broken else shape[-2] // layout.period
