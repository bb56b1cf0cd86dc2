"""Where the matrices of a weight lie in its memory, and the same matrices in a batch.

The rows of a block (:meth:`megatron_muon.routing.layout.MatrixLayout.blocks`) repeat with the layout's period. A
:class:`BlockRange` is some of its matrices, as far as they lie in one rank's shard, and describes views of equal shape
of the shard and of a batch of these matrices, so that both can be copied, or added, without rearranging either. Sizes
and strides are worked out once; the views are made each time: views that are kept would hold memory that frameworks
free or move between steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from megatron_muon.routing.layout import MatrixLayout, Section


class _Steps(NamedTuple):
    """How a view goes through a tensor: in its first dimension of three (0 for tensors of two), and in rows.

    Attributes:
        start: where it begins.
        steps: from one entry to the next, for each dimension of the view but the columns.
    """

    start: tuple[int, int]
    steps: tuple[tuple[int, int], ...]

    def strided(self, strides: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """Strides of the view, by those of the tensor, and how far from the tensor's first element it begins."""
        *outer, row, column = strides
        first = outer[0] if outer else 0
        own = tuple(across * first + down * row for across, down in self.steps)
        return (*own, column), self.start[0] * first + self.start[1] * row


class _Region(NamedTuple):
    """Rows that go through both tensors evenly.

    Attributes:
        sizes: of the views, but for the columns.
        weight: in the shard: experts and rows.
        batch: in the batch: matrices and rows.
    """

    sizes: tuple[int, ...]
    weight: _Steps
    batch: _Steps


class View(NamedTuple):
    """Arguments of ``torch.as_strided``, with the offset from the tensor's first element."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class BlockRange:
    """Some matrices of one block, as far as they lie in a shard of the weight.

    Matrices are counted in units: an expert of a stack; for matrices of ``matrix_rows`` rows a period of the layout, or
    one matrix where shards cut through periods; otherwise there is one unit.

    Attributes:
        layout: of the weight.
        block: index of the block.
        start: first unit.
        stop: after the last unit.
        first_row: number of the shard's first row in the whole weight.
        broken: whether shards cut through periods: of ranks with different shards one may have whole ones.
    """

    layout: MatrixLayout
    block: int
    start: int
    stop: int
    first_row: int = 0
    broken: bool = False

    def views(self, weight: torch.Tensor, batch: torch.Tensor, first: int) -> tuple[list[View | None], list[View]]:
        """Sizes and strides of views of the shard (None: the shard itself) and of a batch; alike but for columns.

        Args:
            weight: (rows, columns), or (experts, rows, columns): the shard as the layout sees it, or a tensor with
                other columns, with any strides.
            batch: (matrices, rows of each on this rank, columns), with any strides, and with other matrices too.
            first: number of this range's first matrix in the batch.
        """
        experts = self.stop - self.start if self.layout.stacked else 1
        theirs: list[View | None] = []
        mine: list[View] = []
        for sizes, way, other in self._regions(experts, weight.size(-2)):
            view = View((*sizes, weight.size(-1)), *way.strided(weight.stride()))
            theirs.append(None if view == (weight.shape, weight.stride(), 0) else view)
            strides, start = other.strided(batch.stride())
            mine.append(View((*sizes, batch.size(-1)), strides, start + first * batch.stride(0)))
        return theirs, mine

    def _regions(self, experts: int, rows: int) -> Iterator[_Region]:
        """The regions of this range in a shard that has ``experts`` of the range, and ``rows`` of each."""
        layout = self.layout
        if not layout.sections:
            found: Iterator[_Region] = iter([_Region((experts, rows), _across(self.start), _across(0))])
        elif self.broken or self.first_row % layout.period or not layout.fits(rows):
            found = self._broken(experts, rows)
        else:
            found = self._periods(experts, rows // layout.period)
        for sizes, *both in found:
            kept = [index for index, size in enumerate(sizes) if size != 1 or index == len(sizes) - 1]
            yield _Region(
                tuple(sizes[index] for index in kept),
                *(_Steps(way.start, tuple(way.steps[index] for index in kept)) for way in both),
            )

    def _periods(self, experts: int, periods: int) -> Iterator[_Region]:
        """The regions in a shard of whole periods."""
        layout, (sections, m) = self.layout, _sections(self.layout, self.block)
        first_expert, first_period = (self.start, 0) if layout.stacked else (0, self.start if m else 0)
        if m and not layout.stacked:
            periods = self.stop - self.start
        each = sum(section.rows for _, section in sections)
        before = 0
        for first, section in sections:
            start = (first_expert, first_period * layout.period + first)
            sizes: tuple[int, ...]
            if m:
                sizes = (experts, periods, section.rows // m, m)
                weight = _Steps(start, ((1, 0), (0, layout.period), (0, m), (0, 1)))
                batch = _Steps((before // m, 0), ((periods * each // m, 0), (each // m, 0), (1, 0), (0, 1)))
            else:
                sizes = (experts, periods, section.rows)
                weight = _Steps(start, ((1, 0), (0, layout.period), (0, 1)))
                batch = _Steps((0, before), ((1, 0), (0, each), (0, 1)))
            yield _Region(sizes, weight, batch)
            before += section.rows

    def _broken(self, experts: int, rows: int) -> Iterator[_Region]:
        """The regions in a shard that cuts through periods: its rows of the block, one run of them after the other."""
        layout, (_, m) = self.layout, _sections(self.layout, self.block)
        low, high = (self.start * m, self.stop * m) if m and not layout.stacked else (0, 1 << 62)
        first_expert = self.start if layout.stacked else 0
        before = 0
        for start, stop, number in runs_of(layout, self.block, self.first_row, rows):
            begin, end = max(number, low), min(number + stop - start, high)
            if begin < end:
                weight = _across(first_expert, start + begin - number)
                yield _Region((experts, end - begin), weight, _across(0, before))
                before += end - begin


def _across(first: int, row: int = 0) -> _Steps:
    """The steps through all experts (or matrices) from number ``first`` on, and through all rows from ``row`` on."""
    return _Steps((first, row), ((1, 0), (0, 1)))


def plain(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The memory of weights: TransformerEngine's ``GroupedTensor`` of experts forbids all views but the flat one."""
    return [
        weight if type(weight) in _PLAIN or not weight.is_contiguous() else weight.detach().view(-1).view(weight.shape)
        for weight in weights
    ]


_PLAIN = (torch.Tensor, torch.nn.Parameter)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_quantized(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a class that stands for numbers which other tensors in it, of 8 bits or less, encode."""
    return type(tensor).dequantize is not torch.Tensor.dequantize or getattr(tensor, "quantizer", None) is not None


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether a tensor is torch's ``DTensor``, of which each rank has a part; told without its seconds of imports."""
    return any(cls.__name__ == "DTensor" for cls in type(tensor).__mro__)


def no_numbers_of_its_own(weight: torch.Tensor) -> str:
    """Why a weight cannot be updated in its own memory, to follow "is"; empty if it can."""
    if is_quantized(weight):
        return f"quantized ({type(weight).__name__}), and its updates would be lost in rounding"
    if is_dtensor(weight):
        return "a DTensor, of which each rank has rows that are no matrices"
    if weight.layout != torch.strided:
        return f"sparse ({weight.layout}), and Muon updates dense ones"
    if any(stride == 0 and size > 1 for stride, size in zip(weight.stride(), weight.shape, strict=True)):
        return "a view that repeats its numbers (expand), which a step cannot write to"
    return "" if weight.dtype in DTYPES else f"of {weight.dtype}, and Muon updates real numbers of 16 bits and more"


@cache
def _sections(layout: MatrixLayout, block: int) -> tuple[list[tuple[int, Section]], int]:
    """The sections of a block with their first rows in the period, and their ``matrix_rows``."""
    starts = list(itertools.accumulate((section.rows for section in layout.sections), initial=0))
    sections = [(starts[index], layout.sections[index]) for index in layout.indices[block]]
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
def runs_of(layout: MatrixLayout, block: int, first_row: int, rows: int) -> list[tuple[int, int, int]]:
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
    """Number of units of a block of a weight of ``shape``; see :class:`BlockRange`.

    Args:
        layout: of the weight.
        block: index of the block.
        shape: of the whole weight, or of a shard of whole periods.
        broken: whether shards cut through periods.
    """
    shape = layout.seen_shape(shape)
    if layout.stacked:
        return shape[0]
    if not layout.matrix_rows(block):
        return 1
    return layout.blocks(shape)[block].count if broken else shape[-2] // layout.period
