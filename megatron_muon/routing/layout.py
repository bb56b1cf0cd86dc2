"""What the rows of a 2-D weight mean.

Megatron-Core fuses projections into one weight; Muon must orthogonalize each by itself. A :class:`MatrixLayout` names
the row blocks of a weight in memory order and splits and merges them. It hangs on the parameter, and everything that
needs a matrix shape (Newton-Schulz, scale factors, the report) asks it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["LAYOUT_ATTRIBUTE", "WHOLE", "MatrixLayout", "Section", "layout_of"]

LAYOUT_ATTRIBUTE = "matrix_layout"
"""Name of the attribute that carries the layout on a parameter and on its fp32 main copy."""


@dataclass(frozen=True)
class Section:
    """Consecutive rows that belong to one logical matrix.

    Attributes:
        name: of the logical matrix (``q``, ``k``, ...).
        rows: how many rows of it stand together in one period of the layout.
    """

    name: str
    rows: int


@dataclass(frozen=True)
class MatrixLayout:
    """Row blocks of a fused weight.

    The rows repeat with a period: one query group of ``linear_qkv`` holds its q rows, then its k rows, then its v
    rows, and the next group follows. A logical matrix consists of its rows of all periods, in order. The layout
    describes the logical weight; a tensor-parallel shard of whole periods has the same layout, and shards put together
    in rank order give the logical weight.

    Attributes:
        kind: what the weight is, for the report and for the option that turns the split off (``whole``, ``qkv``).
        sections: the rows of one period in memory order; empty for a weight that is one matrix.
    """

    kind: str
    sections: tuple[Section, ...] = ()

    @property
    def period(self) -> int:
        """Rows of one period (1 for a whole matrix, which any number of rows fits)."""
        return sum(section.rows for section in self.sections) or 1

    def fits(self, rows: int) -> bool:
        """Whether ``rows`` consecutive rows are whole periods."""
        return rows % self.period == 0

    def block_shapes(self, rows: int, columns: int) -> list[tuple[str, int, int]]:
        """``(name, m, n)`` of each logical matrix in ``rows`` rows."""
        if not self.sections:
            return [(self.kind, rows, columns)]
        periods = rows // self.period
        return [(section.name, section.rows * periods, columns) for section in self.sections]

    def split(self, matrix: torch.Tensor) -> list[torch.Tensor]:
        """The logical matrices of ``matrix`` (rows, columns), each (its rows, columns).

        Raises:
            ValueError: if the rows are not whole periods.
        """
        if not self.sections:
            return [matrix]
        if not self.fits(matrix.size(0)):
            raise ValueError(f"{matrix.size(0)} rows are not a multiple of the {self.period} rows of layout {self}")
        columns = matrix.size(1)
        periods = matrix.reshape(-1, self.period, columns)
        parts = periods.split([section.rows for section in self.sections], dim=1)
        return [part.reshape(-1, columns) for part in parts]

    def merge(self, blocks: list[torch.Tensor]) -> torch.Tensor:
        """The inverse of :meth:`split`."""
        if not self.sections:
            return blocks[0]
        columns = blocks[0].size(1)
        parts = [block.reshape(-1, section.rows, columns) for section, block in zip(self.sections, blocks, strict=True)]
        return torch.cat(parts, dim=1).reshape(-1, columns)


WHOLE = MatrixLayout("whole")
"""The layout of a weight that is one matrix."""


def layout_of(param: torch.Tensor, *, split_qkv: bool = True) -> MatrixLayout:
    """The layout by which Muon treats ``param``.

    Args:
        param: a weight that :func:`megatron_muon.routing.annotate` has seen; without a layout it is :data:`WHOLE`.
        split_qkv: False makes a ``qkv`` weight one matrix.
    """
    layout: MatrixLayout = getattr(param, LAYOUT_ATTRIBUTE, WHOLE)
    return WHOLE if layout.kind == "qkv" and not split_qkv else layout
