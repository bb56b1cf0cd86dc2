"""Orthogonalization of weights that tensor parallelism divides.

The update must be that of the whole logical matrix. Two modes give it: ``duplicated`` gathers the matrix and repeats
the iteration on every rank of the group; ``distributed`` leaves the shards where they are and sums Gram matrices.
``blockwise`` treats each shard as a matrix of its own: no communication, but another update, which changes with the
tensor-parallel size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_muon.orthogonalize.newton_schulz import Reduce
from megatron_muon.routing.layout import MatrixLayout

__all__ = ["MODES", "Direction", "Shard", "check_mode", "shard_of", "update_direction"]

MODES = ("duplicated", "distributed", "blockwise")


@dataclass(frozen=True)
class Shard:
    """How a weight is divided.

    Attributes:
        dim: the divided dimension, 0 or 1.
        group: the (dense or expert) tensor-parallel group; its ranks hold equal shards in rank order.
    """

    dim: int
    group: dist.ProcessGroup

    @property
    def size(self) -> int:
        """Number of shards."""
        return self.group.size()

    def whole_shape(self, local: torch.Size) -> tuple[int, int]:
        """Shape of the whole weight whose shard has shape ``local``."""
        m, n = local
        return (m * self.size, n) if self.dim == 0 else (m, n * self.size)


class Direction(Protocol):
    """Turns a matrix (or this rank's shard of one) into its scaled orthogonalized direction."""

    def __call__(
        self, x: torch.Tensor, m: int, n: int, *, shard_dim: int | None = None, reduce: Reduce | None = None
    ) -> torch.Tensor:
        """``m`` and ``n`` are the whole matrix's; ``shard_dim`` and ``reduce`` are given if ``x`` is a shard."""


def shard_of(
    param: torch.Tensor, tp_group: dist.ProcessGroup | None, expert_tp_group: dist.ProcessGroup | None
) -> Shard | None:
    """The shard that ``param`` is, or None for a weight that every rank holds whole.

    ``partition_dim`` counts only where ``tensor_model_parallel`` is True: TransformerEngine sets ``partition_dim`` on
    its duplicated weights as well, and gathering replicas would orthogonalize a matrix that does not exist.
    """
    dim = getattr(param, "partition_dim", -1)
    if not getattr(param, "tensor_model_parallel", False) or dim not in (0, 1):
        return None
    group = expert_tp_group if getattr(param, "expert_tp", False) else tp_group
    if group is None or group.size() == 1:
        return None
    return Shard(dim, group)


def check_mode(mode: str, layout: MatrixLayout, shard: Shard | None, local: torch.Size) -> None:
    """Refuse what ``mode`` cannot do exactly.

    Raises:
        ValueError: if a fused weight must be split but a shard holds broken periods (tensor parallelism larger than
            the number of query groups), which only ``duplicated`` can put together.
    """
    if shard is None or mode == "duplicated" or shard.dim == 1 or layout.fits(local[0]):
        return
    raise ValueError(
        f"--muon-tp-mode {mode}: a {layout.kind} weight with {local[0]} rows on each of {shard.size} tensor-parallel "
        f"ranks does not hold whole query groups ({layout.period} rows each). Use --muon-tp-mode duplicated, or "
        f"--muon-no-split-qkv to treat it as one matrix."
    )


def update_direction(
    u: torch.Tensor, layout: MatrixLayout, shard: Shard | None, mode: str, direction: Direction
) -> torch.Tensor:
    """The update direction of one weight.

    Args:
        u: (rows, columns), this rank's shard of the momentum.
        layout: the logical matrices in its rows.
        shard: how it is divided; None if it is whole.
        mode: one of :data:`MODES`.
        direction: applied to each logical matrix.

    Returns:
        (rows, columns), this rank's shard of the direction.
    """
    if shard is None or mode == "blockwise":
        return _each_block(u, layout, direction)
    if mode == "duplicated":
        whole = _each_block(_gather(u, shard), layout, direction)
        return whole.tensor_split(shard.size, dim=shard.dim)[shard.group.rank()]
    if mode == "distributed":
        return _each_shard(u, layout, shard, direction)
    raise ValueError(f"mode {mode!r}: choose one of {', '.join(MODES)}")


def _each_block(matrix: torch.Tensor, layout: MatrixLayout, direction: Direction) -> torch.Tensor:
    return layout.merge([direction(block, *block.shape) for block in layout.split(matrix)])


def _each_shard(u: torch.Tensor, layout: MatrixLayout, shard: Shard, direction: Direction) -> torch.Tensor:
    def all_reduce(partial: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(partial, group=shard.group)
        return partial

    def one(block: torch.Tensor) -> torch.Tensor:
        return direction(block, *shard.whole_shape(block.shape), shard_dim=shard.dim, reduce=all_reduce)

    return layout.merge([one(block) for block in layout.split(u)])


def _gather(u: torch.Tensor, shard: Shard) -> torch.Tensor:
    """The whole matrix, on every rank of the group."""
    stacked = u.new_empty((shard.size, *u.shape))
    dist.all_gather_into_tensor(stacked.flatten(0, 1), u.contiguous(), group=shard.group)
    return stacked.flatten(0, 1) if shard.dim == 0 else torch.cat(stacked.unbind(), dim=1)
