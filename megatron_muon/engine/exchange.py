"""Collectives on packed buffers, with a count of what they send.

Data that is only moved travels as bytes, so that every backend takes every dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon.engine.clock import EXCHANGE
from megatron_muon.engine.packing import Shapes, even_part, numel
from megatron_muon.engine.place import Place


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
        buffer: given away by :meth:`wait`, which is to be called once.
        work: the collective under way.
        sent: what it reads, kept until it is done.
        place: is told of the wait.
        phase: in which this rank waits.
        group: whose ranks it waits for.
    """

    buffer: torch.Tensor | None
    work: dist.Work | None
    sent: torch.Tensor | None = field(repr=False)
    place: Place = field(repr=False)
    phase: str
    group: dist.ProcessGroup

    def wait(self) -> torch.Tensor:
        """The filled buffer. On CUDA the current stream waits, not the host."""
        with self.place.at(self.phase, (self.group, None)):
            if self.work is not None:
                self.work.wait()
        assert self.buffer is not None, "read before"
        buffer = self.buffer
        self.buffer = self.work = self.sent = None
        return buffer


class Exchange:
    """The collectives of one group."""

    def __init__(
        self, group: dist.ProcessGroup, counters: Counters, sends: bool = True, place: Place | None = None
    ) -> None:
        """
        Args:
            group: of ranks that hold shards of the same weights.
            counters: to be increased.
            sends: False to rehearse: nothing is sent, and what is received has no meaning.
            place: is told of waits.
        """
        self.group, self.counters, self.sends = group, counters, sends
        self.rank, self.size = group.rank(), group.size()
        self.place = place or Place()

    def all_to_all(
        self, send: torch.Tensor, to: Sequence[Shapes], by: Sequence[Shapes], phase: str = EXCHANGE
    ) -> Pending:
        """Send consecutive parts of a buffer to the ranks.

        Args:
            send: 1-D, contiguous.
            to: shapes of the tensors in it for each rank.
            by: shapes of the tensors from each rank.
            phase: in which this rank will wait for it.

        Returns:
            1-D, what the ranks sent, in rank order: see :func:`megatron_muon.engine.packing.cut`.
        """
        size = send.element_size()
        given, taken = ([size * sum(map(numel, shapes)) for shapes in each] for each in (to, by))
        received = send.new_empty(sum(taken) // size)
        self.count(send.numel() * size - given[self.rank])
        bytes_ = received.view(torch.uint8), send.view(torch.uint8)
        work = self._start(dist.all_to_all_single, *bytes_, taken, given)
        return Pending(received, work, send, self.place, phase, self.group)

    def all_gather(self, send: torch.Tensor, phase: str = EXCHANGE) -> Pending:
        """(ranks, elements): every rank's buffer, all of one length; ``phase`` as of :meth:`all_to_all`."""
        received = send.new_empty(self.size, send.numel())
        self.count((self.size - 1) * send.numel() * send.element_size())
        bytes_ = received.view(torch.uint8).view(-1), send.view(torch.uint8)
        work = self._start(dist.all_gather_into_tensor, *bytes_)
        return Pending(received, work, send, self.place, phase, self.group)

    def all_reduce(self, tensor: torch.Tensor) -> Pending:
        """The sum over the ranks, in place."""
        self.count(2 * (self.size - 1) * tensor.numel() * tensor.element_size() / self.size)
        return Pending(tensor, self._start(dist.all_reduce, tensor), None, self.place, EXCHANGE, self.group)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place; waits for it."""
        return self.all_reduce(tensor).wait()

    def _start(self, collective: Callable[..., dist.Work | None], *args: Any) -> dist.Work | None:
        return collective(*args, group=self.group, async_op=True) if self.sends else None

    def count(self, sent: float) -> None:
        """Count one more collective, in which this rank sends ``sent`` bytes."""
        self.counters.collectives += 1
        self.counters.bytes += sent


class Members:
    """Some ranks of a group, which exchange messages among themselves: the others have no part in it.

    Tensors are (batch, rows, columns); the ranks share the rows as evenly as can be.
    """

    def __init__(self, exchange: Exchange, ranks: Sequence[int]) -> None:
        """
        Args:
            exchange: of the group.
            ranks: their numbers in it; this rank's is among them.
        """
        self._exchange, self.ranks = exchange, list(ranks)
        self._own = self.ranks.index(exchange.rank)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks. Each sends all of its tensor to all others: for a few numbers."""
        return sum_of(self._trade([tensor] * len(self.ranks), [tensor.shape] * len(self.ranks)))

    def scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's rows of the sum over the ranks."""
        pieces = list(tensor.tensor_split(len(self.ranks), dim=-2))
        return sum_of(self._trade(pieces, [pieces[self._own].shape] * len(pieces)))

    def own(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's rows of what all ranks have."""
        return tensor.tensor_split(len(self.ranks), dim=-2)[self._own]

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """All rows of square matrices, from the rows that each rank has."""
        batch, _, p = rows.shape
        count = len(self.ranks)
        shapes = [torch.Size((batch, even_part(p, count, number), p)) for number in range(count)]
        return torch.cat(self._trade([rows] * len(self.ranks), shapes), dim=-2)

    def _trade(self, pieces: Sequence[torch.Tensor], shapes: Sequence[torch.Size]) -> list[torch.Tensor]:
        """Send a piece to each of the ranks, and get one of a shape from each."""
        sent = [piece.contiguous() for piece in pieces]
        received = [
            piece if number == self._own else piece.new_empty(shape)
            for number, (piece, shape) in enumerate(zip(sent, shapes, strict=True))
        ]
        operations = []
        for number, rank in enumerate(self.ranks if self._exchange.sends else ()):
            if number != self._own:
                peer = dist.get_global_rank(self._exchange.group, rank)
                for function, tensor in ((dist.isend, sent[number]), (dist.irecv, received[number])):
                    if tensor.numel():
                        bytes_ = tensor.view(-1).view(torch.uint8)
                        operations.append(dist.P2POp(function, bytes_, peer, self._exchange.group))
        with self._exchange.place.at(EXCHANGE, (self._exchange.group, self.ranks)):
            for work in dist.batch_isend_irecv(operations) if operations else ():
                work.wait()
        others = (tensor for number, tensor in enumerate(sent) if number != self._own)
        self._exchange.count(sum(tensor.numel() * tensor.element_size() for tensor in others))
        return received


def sum_of(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of tensors, added in the order of the list so that all ranks get the same bits."""
    total = pieces[0].clone()
    for piece in pieces[1:]:
        total += piece
    return total
