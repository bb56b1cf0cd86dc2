"""The layout of this rank's part of a fused DTensor, some of whose rows are no matrix."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from megatron_muon.routing.blocks import runs_of
from megatron_muon.routing.layout import MatrixLayout


@dataclass(frozen=True)
class ShardLayout(MatrixLayout):
    """The whole weight's layout, which knows the rows of one shard. It may cut through sections.

    Attributes:
        first_row: of the shard in the whole weight.
    """

    first_row: int = 0

    @classmethod
    def of(cls, layout: MatrixLayout, first_row: int) -> ShardLayout:
        """
        Args:
            layout: of the whole weight.
            first_row: of the shard.
        """
        own = {field.name: getattr(layout, field.name) for field in dataclasses.fields(MatrixLayout)}
        return cls(**own, first_row=first_row)

    def rows_by_rule(self, weight: torch.Tensor, rule: str) -> list[torch.Tensor]:
        """Views of all rows of the shard that follow ``rule``, in memory order: one at least, if it has no rows."""
        found = []
        for number, sections in enumerate(self.indices):
            if self.sections[sections[0]].rule == rule:
                found += runs_of(self, number, self.first_row, weight.size(-2))
        return [weight[..., start:stop, :] for start, stop, _ in sorted(found)] or [weight[..., :0, :]]
