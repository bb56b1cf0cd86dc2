"""What the work on every chunk of a plan needs, and which part of each chunk this rank has."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from megatron_muon.engine.callbacks import Flops, Read, Solve, Write
from megatron_muon.engine.clock import PACK, WRITE
from megatron_muon.engine.exchange import Counters, Exchange
from megatron_muon.engine.modes import LENT, LOCAL, OWNER, SPLIT
from megatron_muon.engine.packing import cut, numel
from megatron_muon.engine.place import Place
from megatron_muon.engine.plan import Batch, Chunk, Weight
from megatron_muon.engine.planner import cut_items
from megatron_muon.engine.slices import Slices
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer


class Pause(enum.Enum):
    """Where the work on a chunk may rest while other chunks go on.

    Attributes:
        EXCHANGE: a message is under way that it needs to go on.
        COMPUTED: its results are to be sent next. Whatever waits for results before it goes first: the sums that their
            writing takes would queue behind a payload that waits for the products of this chunk.
        RETURN: results are under way, and nothing is left but to write them.
        LATE: the same, from ranks that may be busy for as long as this one: written when all else is done.
    """

    EXCHANGE = enum.auto()
    COMPUTED = enum.auto()
    RETURN = enum.auto()
    LATE = enum.auto()


ChunkWork = Iterator[Pause]
"""The work on one chunk, a generator of pauses. The first comes when its first message is under way, and in any case
before it computes anything; there are equally many on all ranks of the chunk's group."""


@dataclass(frozen=True)
class WireDtypes:
    """The dtypes in which ranks send each other matrices.

    Attributes:
        dtype: of matrices that are sent to be orthogonalized.
        back: of orthogonalized matrices that are sent back.
        gram: of partial Gram matrices and polynomials.
        device: where all buffers are.
    """

    dtype: torch.dtype
    back: torch.dtype
    gram: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class RankChunk:
    """The part of a chunk that this rank has: the same in every step.

    Attributes:
        chunk: the chunk of the plan.
        rank: number of this rank in the chunk's group; 0 without one.
        held: the chunk's batches of which this rank holds a part: of lent matrices, those of its own weights.
        batches: the same in the order in which they are packed. Where whole matrices are sent to ranks: what the first
            rank gets of each, then what the second gets of each, and so on.
        in_order: whether ``batches`` have that order. They have not where a rank's first matrix lies within a unit.
        slices: the matrices of each of :attr:`batches`.
        sum_group: name of the group whose ranks hold the other parts of these matrices; empty if this rank has all.
    """

    chunk: Chunk
    rank: int
    held: tuple[Batch, ...]
    batches: tuple[Batch, ...]
    in_order: bool
    slices: tuple[Slices, ...]
    sum_group: str

    @property
    def works(self) -> bool:
        """Whether this rank multiplies: not where all matrices are sent to others."""
        owned = self.chunk.mode in (OWNER, LENT, SPLIT)
        return not owned or any(batch.counts[self.rank] for batch in self.chunk.batches)

    @classmethod
    def of(cls, weights: Sequence[Weight], chunk: Chunk, rank: int) -> RankChunk:
        """
        Args:
            weights: the weights of the plan.
            chunk: a chunk of the plan.
            rank: number of this rank in the chunk's group.
        """
        held, shard, sum_group = chunk.batches, rank, chunk.group
        if chunk.mode in (LENT, SPLIT):
            # Numbers in the group count the tensor-parallel ranks of one data-parallel rank after the other.
            first = weights[held[0].items[0].weight]
            assert first.peers is not None
            width = len(held[0].key.parts) // first.peers.ranks
            place, shard = divmod(rank, width)
            held = tuple(batch for batch in held if _holder(weights, batch) == place)
            sum_group = first.group if width > 1 else ""
        whole = chunk.mode in (OWNER, LENT)
        batches = (_by_rank(held) if whole and len(held) > 1 else ()) or held
        in_order = whole and (len(held) < 2 or batches is not held)
        if held and held[0].key.copies:
            batches, in_order = held, False  # not all is sent to all
        slices = tuple(
            Slices(batch.items, tuple(item.block_range(weights[item.weight], shard) for item in batch.items))
            for batch in batches
        )
        return cls(chunk, rank, held, batches, in_order, slices, "" if chunk.mode == LOCAL else sum_group)


def _by_rank(batches: Sequence[Batch]) -> tuple[Batch, ...]:
    """Batches in the order of the ranks that get their matrices; none if one would begin within a unit."""
    rests, found = [list(batch.items) for batch in batches], []
    for rank in range(len(batches[0].counts)):
        for index, batch in enumerate(batches):
            items, rests[index] = cut_items(rests[index], batch.counts[rank])
            if sum(item.count for item in items) != batch.counts[rank]:
                return ()
            found += [replace(batch, items=tuple(items))] if items else []
    return tuple(found)


def _holder(weights: Sequence[Weight], batch: Batch) -> int:
    """The data-parallel rank that holds the weights of a batch."""
    peers = weights[batch.items[0].weight].peers
    assert peers is not None
    return peers.holder


@dataclass(frozen=True)
class Run:
    """What the work on every chunk needs."""

    orthogonalizer: Orthogonalizer
    exchanges: Mapping[str, Exchange]
    wire: WireDtypes
    local_dtype: torch.dtype
    counters: Counters
    reads: tuple[Read, ...] = ()
    write: Write | None = None
    solve: Solve | None = None
    solve_flops: Flops | None = None
    place: Place = field(default_factory=Place)

    @property
    def stack(self) -> tuple[int, ...]:
        """Size of the dimension for several tensors of each matrix: :attr:`solve` gets them packed side by side."""
        return () if self.solve is None else (len(self.reads),)

    def exchange(self, mine: RankChunk) -> Exchange:
        """Collectives of a chunk's group."""
        return self.exchanges[mine.chunk.group]

    def pack(self, mine: RankChunk, dtype: torch.dtype) -> list[torch.Tensor]:
        """This rank's part of each batch, (matrices, [tensors,] rows, columns), contiguous."""
        with self.place.at(PACK):
            batches = [torch.empty(shape, dtype=dtype, device=self.wire.device) for shape in self._shapes(mine)]
            self._read(mine, batches)
        return batches

    def pack_together(self, mine: RankChunk, dtype: torch.dtype) -> torch.Tensor:
        """This rank's part of all batches in one buffer, (elements,), one batch after the other."""
        shapes = self._shapes(mine)
        with self.place.at(PACK):
            buffer = torch.empty(sum(map(numel, shapes)), dtype=dtype, device=self.wire.device)
            self._read(mine, cut(buffer, [shapes])[0])
        return buffer

    def cut(self, mine: RankChunk, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The orthogonalized batches that lie one after the other in a buffer."""
        return cut(buffer, [[(batch.count, *batch.key.part(mine.rank)) for batch in mine.batches]])[0]

    def _shapes(self, mine: RankChunk) -> list[tuple[int, ...]]:
        return [(batch.count, *self.stack, *batch.key.part(mine.rank)) for batch in mine.batches]

    def _read(self, mine: RankChunk, batches: Sequence[torch.Tensor]) -> None:
        for number, read in enumerate(self.reads if mine.slices else ()):
            read(list(mine.slices), [batch[:, number] if self.stack else batch for batch in batches])

    def unpack(self, mine: RankChunk, batches: Sequence[torch.Tensor]) -> None:
        """Hand out this rank's part of each orthogonalized batch."""
        if mine.slices and self.write is not None:
            with self.place.at(WRITE):
                self.write(list(mine.slices), list(batches), self._sum(mine))

    def _sum(self, mine: RankChunk) -> Callable[[torch.Tensor], torch.Tensor]:
        """Gives sums over the ranks that hold the other parts of a chunk's matrices; of copies one counts."""
        if not mine.sum_group:
            return lambda tensor: tensor
        exchange, copies = self.exchanges[mine.sum_group], mine.batches[0].key.copies
        if copies and copies[mine.rank]:
            return lambda tensor: exchange.sum(tensor.zero_())
        return exchange.sum

    def blanks(self, mine: RankChunk, dtype: torch.dtype) -> list[torch.Tensor]:
        """Tensors of the shapes that :meth:`unpack` takes, expanded from one element so that they take no memory."""
        element = torch.zeros((), dtype=dtype, device=self.wire.device)
        return [element.expand(batch.count, *batch.key.part(mine.rank)) for batch in mine.batches]

    def orthogonalize(self, batch: Batch, given: list[torch.Tensor]) -> torch.Tensor:
        """Orthogonalize matrices of a batch, the last of a list: taken out, and their memory overwritten."""
        orthogonalizer = self.orthogonalizer.of(batch.key.budget)
        self.counters.flops += given[-1].size(0) * orthogonalizer.flops(*given[-1].shape[-2:])
        return orthogonalizer.use_up(given)

    def transform(self, batch: Batch, first: int, given: list[torch.Tensor]) -> torch.Tensor:
        """Matrices of ``batch`` from number ``first`` on: orthogonalized, or what :attr:`solve` makes of them."""
        if self.solve is None:
            return self.orthogonalize(batch, given)
        x = given.pop()
        if self.solve_flops is not None:
            self.counters.flops += x.size(0) * self.solve_flops(batch.key.p, batch.key.q)
        weights = itertools.chain.from_iterable([item.weight] * item.count for item in batch.items)
        return self.solve(list(itertools.islice(weights, first, first + x.size(0))), list(x.unbind(1)))
