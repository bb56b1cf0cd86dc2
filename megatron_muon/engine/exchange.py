"""Collectives on packed buffers, with a count of what they send.

Data that is only moved travels as bytes, so that every backend takes every dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

__all__ = ["Counters", "Exchange", "Pending"]


@dataclass
class Counters:
    """What this rank has done since they were last set to zero.

    Attributes:
        collectives: number of collective operations.
        bytes: sent to other ranks; all-gathers and all-reduces by the ring algorithm.
        flops: operations in the matrix products of Newton-Schulz, and of solvers on manifolds.
        steps: number of optimizer steps.
    """

    collectives: int = 0
    bytes: float = 0
    flops: int = 0
    steps: int = 0

    def reset(self) -> None:
        """Set all to zero."""
        self.__init__()  # type: ignore[misc]


@dataclass
class Pending:
    """A buffer that a collective is filling.

    Attributes:
        buffer: to be read after :meth:`wait`.
        work: the collective under way.
        sent: what it reads, kept until it is done.
    """

    buffer: torch.Tensor
    work: dist.Work | None
    sent: torch.Tensor = field(repr=False)

    def wait(self) -> torch.Tensor:
        """The filled buffer. On CUDA the current stream waits, not the host."""
        if self.work is not None:
            self.work.wait()
        return self.buffer


class Exchange:
    """The collectives of one group."""

    def __init__(self, group: dist.ProcessGroup, counters: Counters) -> None:
        """
        Args:
            group: of ranks that hold shards of the same weights.
            counters: to be increased.
        """
        self.group, self.counters = group, counters
        self.rank, self.size = group.rank(), group.size()

    def all_to_all(self, send: torch.Tensor, to: Sequence[int], by: Sequence[int]) -> Pending:
        """Send consecutive parts of a buffer to the ranks.

        Args:
            send: 1-D, contiguous.
            to: elements for each rank.
            by: elements from each rank.

        Returns:
            1-D, what the ranks sent, in rank order.
        """
        received = send.new_empty(sum(by))
        size = send.element_size()
        self._count((send.numel() - to[self.rank]) * size)
        work = dist.all_to_all_single(
            received.view(torch.uint8),
            send.view(torch.uint8),
            [count * size for count in by],
            [count * size for count in to],
            group=self.group,
            async_op=True,
        )
        return Pending(received, work, send)

    def all_gather(self, send: torch.Tensor) -> Pending:
        """(ranks, elements): every rank's buffer, all of one length."""
        received = send.new_empty(self.size, send.numel())
        self._count((self.size - 1) * send.numel() * send.element_size())
        work = dist.all_gather_into_tensor(
            received.view(torch.uint8).view(-1), send.view(torch.uint8), group=self.group, async_op=True
        )
        return Pending(received, work, send)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place."""
        self._count(2 * (self.size - 1) * tensor.numel() * tensor.element_size() / self.size)
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def _count(self, sent: float) -> None:
        self.counters.collectives += 1
        self.counters.bytes += sent
