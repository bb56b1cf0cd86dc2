"""How context parallelism divides a sequence, and how its parts are put together again."""

from __future__ import annotations

import torch
import torch.distributed as dist


def balanced_positions(length: int, rank: int, ranks: int, device: torch.device | None = None) -> torch.Tensor:
    """Where the ``length`` tokens of a rank stand in the sequence: (length,) int64.

    Megatron-Core cuts it into 2 x ranks pieces and gives each rank two, from both ends inwards, so that causal masks
    leave all the same work.
    """
    piece = torch.arange(length // 2, device=device)
    return torch.cat([piece + rank * (length // 2), piece + (2 * ranks - 1 - rank) * (length // 2)])


def gathered(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(tokens of a rank, ...) of each rank -> (tokens, ...) in the order of the sequence, on all."""
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    places = [balanced_positions(part.size(0), rank, group.size(), part.device) for rank in range(group.size())]
    return torch.cat(parts)[torch.cat(places).argsort()]
