"""What can be wrong with a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist

__all__ = ["CheckpointError", "raise_together"]

SHOWN = 12


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used as asked; the message says why and what to do."""


def raise_together(problems: Iterable[str], title: str, way_out: str = "") -> None:
    """Compare the problems of all ranks, and raise the same error on all of them.

    All ranks must call this.

    Args:
        problems: of this rank, one line each.
        title: first line of the message.
        way_out: last line.

    Raises:
        CheckpointError: if any rank has a problem.
    """
    everywhere: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, list(problems))
    found = sorted({problem for each in everywhere for problem in each})
    if found:
        more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        lines = [title, *(f"  {problem}" for problem in [*found[:SHOWN], *more]), way_out]
        raise CheckpointError("\n".join(filter(None, lines)))
