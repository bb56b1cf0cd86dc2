"""How tensor parallelism divides a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_muon.engine.plan import Piece


@dataclass(frozen=True)
class Shard:
    """How a weight is divided.

    Attributes:
        dim: the divided dimension of its matrices, -2 (rows) or -1 (columns, or both); 0 if ranks have copies of all.
        group: the (dense or expert) tensor-parallel group, or the ranks of a mesh; without ``pieces`` they hold equal
            shards in rank order.
        pieces: what each rank has.
    """

    dim: int
    group: dist.ProcessGroup
    pieces: tuple[Piece, ...] = ()

    @property
    def size(self) -> int:
        """Number of ranks that have one."""
        return self.group.size()

    @property
    def piece(self) -> Piece | None:
        """What this rank has, where that is not told by its number."""
        return self.pieces[self.group.rank()] if self.pieces else None

    @property
    def is_grid(self) -> bool:
        """Whether both rows and columns are divided."""
        return len({each.rows for each in self.pieces}) > 1 and len({each.columns for each in self.pieces}) > 1

    def whole_shape(self, local: Sequence[int]) -> tuple[int, ...]:
        """Shape of the whole weight whose shard has shape ``local``."""
        shape = list(local)
        shape[self.dim] *= self.size
        return tuple(shape)


def shard_of(
    param: torch.Tensor, tp_group: dist.ProcessGroup | None, expert_tp_group: dist.ProcessGroup | None
) -> Shard | None:
    """The shard that ``param`` is, or None for a weight that every rank holds whole.

    ``partition_dim`` counts only where ``tensor_model_parallel`` is True: TransformerEngine sets ``partition_dim`` on
    its duplicated weights as well, and gathering replicas would orthogonalize a matrix that does not exist. It counts
    the dimensions of one matrix, also for a stack of experts.
    """
    dim = getattr(param, "partition_dim", -1)
    if not getattr(param, "tensor_model_parallel", False) or dim not in (0, 1):
        return None
    group = expert_tp_group if getattr(param, "expert_tp", False) else tp_group
    if group is None or group.size() == 1:
        return None
    return Shard(dim - 2, group)
