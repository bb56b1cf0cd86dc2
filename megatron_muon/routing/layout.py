"""What the rows of a weight mean.

Megatron-Core fuses projections into one weight; Muon must orthogonalize each by itself. A :class:`MatrixLayout` names
the row sections of a weight in memory order, with a rule for each. It hangs on the parameter, and everything that needs
a matrix shape (Newton-Schulz, scale factors, the report, the plan) asks it. Where the matrices lie in the weight's
memory follows from it in :mod:`megatron_muon.routing.blocks`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_muon.choices import AUTO_STEPS, BALLS, STIEFEL, Budget

__all__ = [
    "BALLS",
    "COLUMN_NORM",
    "LAYOUT_ATTRIBUTE",
    "MSIGN",
    "ORTHOGONALIZE",
    "ROW_NORM",
    "SCALAR",
    "SIGN",
    "STIEFEL",
    "TABLE",
    "WHOLE",
    "Block",
    "Budget",
    "MatrixLayout",
    "Section",
    "layout_of",
]

LAYOUT_ATTRIBUTE = "matrix_layout"
"""Name of the attribute that carries the layout on a parameter and on its fp32 main copy."""

ORTHOGONALIZE = "orthogonalize"
SCALAR = "scalar"

MSIGN = "msign"

TABLE = "embedding"
"""Kind of a weight whose rows are looked up."""

SIGN, ROW_NORM, COLUMN_NORM = BALLS
"""Directions that need no orthogonalization: see :mod:`megatron_muon.optimizers.balls`."""


@dataclass(frozen=True)
class Section:
    """Consecutive rows that belong to one logical block.

    Attributes:
        name: of the block (``q``, ``k``, ...). Sections of one name, in one period or in several, make one block.
        rows: how many consecutive rows it has.
        rule: :data:`ORTHOGONALIZE`, or :data:`SCALAR` for rows that follow the scalar optimizer's rule.
        matrix_rows: 0 if the rows of the block, of all periods, are one matrix; otherwise each ``matrix_rows``
            consecutive rows are a matrix of their own (one attention head).
    """

    name: str
    rows: int
    rule: str = ORTHOGONALIZE
    matrix_rows: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1 or self.matrix_rows < 0 or (self.matrix_rows and self.rows % self.matrix_rows):
            raise ValueError(f"section {self.name!r}: {self.rows} rows in matrices of {self.matrix_rows} rows")
        if self.rule not in (ORTHOGONALIZE, SCALAR):
            raise ValueError(f"section {self.name!r}: rule {self.rule!r}, choose {ORTHOGONALIZE} or {SCALAR}")


@dataclass(frozen=True)
class Block:
    """The matrices of one name in a whole weight, all of one shape.

    Attributes:
        name: of the section.
        rule: :data:`ORTHOGONALIZE` or :data:`SCALAR`.
        count: how many matrices: heads, experts, or 1.
        rows: m of each.
        columns: n of each.
    """

    name: str
    rule: str
    count: int
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        """Elements in all its matrices."""
        return self.count * self.rows * self.columns


@dataclass(frozen=True)
class MatrixLayout:
    """Row sections of a fused weight.

    The rows repeat with a period. One query group of ``linear_qkv`` holds its q rows, then its k rows, then its v
    rows, and the next group follows. One tensor-parallel rank of SwiGLU's ``linear_fc1`` holds gate rows, then up rows,
    and the next rank follows. The layout describes the shards put together in rank order; a block consists of its rows
    of all periods, in order. So a shard of whole periods has the same layout as the weight, and splitting before or
    after the shards are gathered gives the same matrices.

    Attributes:
        kind: what the weight is, for messages and the report (``whole``, ``qkv``, ``glu``, ...).
        sections: the rows of one period in memory order; empty for a weight that is one matrix.
        stacked: whether the weight is 3-D: (experts, rows, columns), each expert with this layout.
        direction: how the update of a matrix is found: :data:`MSIGN`, orthogonalized; one of :data:`BALLS`; or
            :data:`STIEFEL`, which keeps its singular values at 1.
        budget: what the orthogonalization takes; None: the optimizer's own number of steps and coefficients.
        transposed: whether the memory has (inputs, outputs), or (experts, inputs, outputs), where others have (outputs,
            inputs): GPT-2's ``Conv1D``. Rows, of sections too, are outputs all the same.
        turns: number of matrices whose columns take turns in a 2-D weight, which is then treated as the stack of them:
            column c is the matrix c % turns'. 0: none do.
    """

    kind: str
    sections: tuple[Section, ...] = ()
    stacked: bool = False
    direction: str = MSIGN
    budget: Budget | None = None
    transposed: bool = False
    turns: int = 0

    def __post_init__(self) -> None:
        if self.turns and (self.transposed or not self.stacked):
            raise ValueError(f"a layout of {self.turns} matrices in turns is stacked, and not transposed")

    @property
    def period(self) -> int:
        """Rows of one period (1 for a whole matrix, which any number of rows fits)."""
        return sum(section.rows for section in self.sections) or 1

    @functools.cached_property
    def has_scalar_rows(self) -> bool:
        """Whether some rows follow the scalar optimizer's rule."""
        return any(section.rule == SCALAR for section in self.sections)

    @property
    def has_matrices(self) -> bool:
        """Whether some rows belong to matrices: all of them may follow the scalar optimizer's rule."""
        return not self.sections or any(section.rule == ORTHOGONALIZE for section in self.sections)

    @property
    def dims(self) -> int:
        """Number of dimensions of a weight of this layout."""
        return 3 if self.stacked and not self.turns else 2

    @property
    def is_turned(self) -> bool:
        """Whether a weight's own dimensions are not those of its matrices: see :meth:`seen`."""
        return self.transposed or self.turns > 0

    def seen(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the weight's shape, or of :meth:`row_shape`, as (rows, columns) or (experts, rows, columns)."""
        if self.turns:
            return tensor.unflatten(-1, (tensor.size(-1) // self.turns, self.turns)).movedim(-1, 0)
        return tensor.mT if self.transposed else tensor

    def seen_shape(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """The shape of :meth:`seen` of a weight of ``shape``."""
        *experts, rows, columns = shape
        if self.turns:
            return self.turns, rows, columns // self.turns
        return (*experts, columns, rows) if self.transposed else tuple(shape)

    def row_shape(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """The shape, beside a weight of ``shape``, of state with one number for each row: :meth:`seen`, one column."""
        if self.transposed:
            return (*shape[:-2], 1, shape[-1])
        return (*shape[:-1], self.turns or 1)

    def ball_factor(self, columns: int, radius: float) -> float:
        """Factor on the direction of a weight in a ball, see :mod:`megatron_muon.optimizers.balls`.

        Args:
            columns: n of the matrix.
            radius: ``--muon-ball-radius``.
        """
        summed = self.kind != TABLE and self.direction != COLUMN_NORM
        return radius / columns if summed else radius

    def settled(self, steps: Mapping[str, int]) -> MatrixLayout:
        """The layout with the number of steps that is measured, where it is known.

        Args:
            steps: by the names of classes, see :class:`megatron_muon.choices.Budget`.
        """
        if self.budget is None or not self.budget.measured:
            return self
        budget = dataclasses.replace(self.budget, steps=steps.get(self.budget.measured, AUTO_STEPS))
        return self if budget == self.budget else dataclasses.replace(self, budget=budget)

    def fits(self, rows: int) -> bool:
        """Whether ``rows`` consecutive rows are whole periods."""
        return rows % self.period == 0

    def blocks(self, shape: torch.Size | tuple[int, ...]) -> list[Block]:
        """The blocks of a whole weight of shape (rows, columns), or (experts, rows, columns) if stacked (see
        :meth:`seen`).

        Raises:
            ValueError: if the rows are not whole periods.
        """
        *experts, rows, columns = self.seen_shape(shape)
        stack = experts[0] if self.stacked else 1
        if not self.sections:
            return [Block(self.kind, ORTHOGONALIZE, stack, rows, columns)]
        self._check_fit(rows)
        found = []
        for sections in ([self.sections[index] for index in indices] for indices in self.indices):
            first, total = sections[0], sum(section.rows for section in sections) * (rows // self.period)
            m = first.matrix_rows or total
            count = stack * total // m if m else stack  # of a weight without rows
            found.append(Block(first.name, first.rule, count, m, columns))
        return found

    def matrix_rows(self, block: int) -> int:
        """``matrix_rows`` of a block, numbered as in :meth:`blocks`; 0 for a weight that is one matrix."""
        return self.sections[self.indices[block][0]].matrix_rows if self.sections else 0

    def rows_by_rule(self, weight: torch.Tensor, rule: str) -> list[torch.Tensor]:
        """Views of all rows of ``weight`` (or of a shard of whole periods) that follow ``rule``, in memory order.

        Raises:
            ValueError: if the rows are not whole periods.
        """
        weight = self.seen(weight)
        if not self.sections:
            return [weight] if rule == ORTHOGONALIZE else []
        if all(section.rule == rule for section in self.sections):
            return [weight]
        self._check_fit(weight.size(-2))
        periods = weight.unflatten(-2, (-1, self.period))
        return [periods[..., start:stop, :] for start, stop, its_rule in _runs(self.sections) if its_rule == rule]

    @property
    def indices(self) -> list[list[int]]:
        """The sections of each block, in the order of first appearance."""
        return _indices(self.sections)

    def _check_fit(self, rows: int) -> None:
        if not self.fits(rows):
            raise ValueError(
                f"{rows} rows are not a multiple of the {self.period} rows of the {self.kind} layout "
                f"({', '.join(f'{section.name} {section.rows}' for section in self.sections)})"
            )

    def stack(self) -> MatrixLayout:
        """The layout of a 3-D stack of experts that each have this one."""
        return dataclasses.replace(self, stacked=True)


@functools.cache
def _indices(sections: tuple[Section, ...]) -> list[list[int]]:
    found: dict[str, list[int]] = {}
    for index, section in enumerate(sections):
        found.setdefault(section.name, []).append(index)
    for indices in found.values():
        if len({(sections[index].rule, sections[index].matrix_rows) for index in indices}) > 1:
            raise ValueError(f"sections of the name {sections[indices[0]].name!r} must have one rule and matrix_rows")
    return list(found.values())


@functools.cache
def _runs(sections: tuple[Section, ...]) -> list[tuple[int, int, str]]:
    """(start, stop, rule) of the longest runs of sections under one rule, in one period."""
    runs: list[tuple[int, int, str]] = []
    start = 0
    for section in sections:
        stop = start + section.rows
        if runs and runs[-1][2] == section.rule:
            runs[-1] = (runs[-1][0], stop, section.rule)
        else:
            runs.append((start, stop, section.rule))
        start = stop
    return runs


WHOLE = MatrixLayout("whole")
"""The layout of a weight that is one matrix."""


def layout_of(param: torch.Tensor) -> MatrixLayout:
    """The layout by which Muon treats ``param``; :data:`WHOLE` for one that :func:`annotate` has not seen."""
    layout: MatrixLayout = getattr(param, LAYOUT_ATTRIBUTE, WHOLE)
    return layout
