"""The work on one chunk, in each mode: pack, exchange, orthogonalize, unpack."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_muon.engine.callbacks import Flops, Part, Read, Solve, Write
from megatron_muon.engine.exchange import Counters, Exchange, Members, Pending
from megatron_muon.engine.modes import DISTRIBUTED, DUPLICATED, GRAM, LENT, LOCAL, OWNER, SPLIT
from megatron_muon.engine.packing import even_part, flat, from_triangle, joined, lower_triangle, numel, padded
from megatron_muon.engine.plan import Batch, Chunk, Kind, Plan
from megatron_muon.orthogonalize.gram import prescale
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer

__all__ = ["TASKS", "Run", "Task", "Wire"]


@dataclass(frozen=True)
class Wire:
    """In which form matrices travel and are computed.

    Attributes:
        dtype: in which they are sent to be orthogonalized, and in which matrices that stay are packed.
        back: in which they come back.
        gram: in which partial Gram matrices and polynomials are sent.
        device: of everything.
    """

    dtype: torch.dtype
    back: torch.dtype
    gram: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Run:
    """What the work on every chunk needs."""

    plan: Plan
    orthogonalizer: Orthogonalizer
    wire: Wire
    local_dtype: torch.dtype
    counters: Counters
    reads: tuple[Read, ...]
    write: Write
    exchanges: Mapping[str, Exchange]
    solve: Solve | None = None
    solve_flops: Flops | None = None

    @property
    def stack(self) -> tuple[int, ...]:
        """A dimension for the tensors of each matrix that :attr:`solve` wants: they are packed next to one another."""
        return () if self.solve is None else (len(self.reads),)


class Task:
    """The work on one chunk: :meth:`start` its exchange, :meth:`compute`, :meth:`finish`."""

    is_late = False
    """Whether others have to do a lot before :meth:`finish`."""

    @staticmethod
    def method(orthogonalizer: Orthogonalizer, kind: Kind) -> str:
        """The iteration by which it orthogonalizes matrices of a kind."""
        return str(orthogonalizer.method(kind.p, kind.q))

    def __init__(self, run: Run, chunk: Chunk) -> None:
        self.run, self.chunk = run, chunk
        self.batches = chunk.batches  # of which this rank has a part
        self.rank = self.exchange.rank if chunk.group else 0
        self.shard = self.rank  # of the weights

    @property
    def exchange(self) -> Exchange:
        """Collectives of the chunk's group."""
        return self.run.exchanges[self.chunk.group]

    def start(self) -> None:
        """Send what the computation needs."""

    def compute(self) -> None:
        """Orthogonalize, and send what others need."""
        raise NotImplementedError

    def finish(self) -> None:
        """Hand out the result."""

    def pack(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """This rank's part of each batch, (matrices, [tensors,] rows, columns), contiguous."""
        run = self.run
        batches = [
            torch.empty((batch.count, *run.stack, *batch.kind.part(self.rank)), dtype=dtype, device=run.wire.device)
            for batch in self.batches
        ]
        for number, read in enumerate(run.reads):
            read(*self._parts([batch[:, number] if run.stack else batch for batch in batches]))
        return batches

    def blanks(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """What :meth:`unpack` takes in shape and dtype, without memory."""
        element = torch.zeros((), dtype=dtype, device=self.run.wire.device)
        return [element.expand(batch.count, *batch.kind.part(self.rank)) for batch in self.batches]

    def unpack(self, batches: list[torch.Tensor]) -> None:
        """Hand out this rank's part of each orthogonalized batch."""
        self.run.write(*self._parts(batches), self.reduce)

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks that hold parts of the chunk's matrices."""
        return self.exchange.all_reduce(tensor)

    def orthogonalize(self, x: torch.Tensor) -> torch.Tensor:
        """Whole matrices (matrices, p, q)."""
        self.run.counters.flops += x.size(0) * self.run.orthogonalizer.flops(*x.shape[-2:])
        return self.run.orthogonalizer(x)

    def transform(self, batch: Batch, first: int, x: torch.Tensor) -> torch.Tensor:
        """Whole matrices of a batch, from ``first`` on: orthogonalized, or what the run's ``solve`` makes of them."""
        if self.run.solve is None:
            return self.orthogonalize(x)
        if self.run.solve_flops is not None:
            self.run.counters.flops += x.size(0) * self.run.solve_flops(batch.kind.p, batch.kind.q)
        weights = [item.weight for item in batch.items for _ in range(item.count)]
        return self.run.solve(weights[first : first + x.size(0)], list(x.unbind(1)))

    def _parts(self, batches: list[torch.Tensor]) -> tuple[list[Part], list[torch.Tensor]]:
        """The items of all batches, each with its slice of the batch, the right way round."""
        parts, slots = [], []
        for batch, tensor in zip(self.batches, batches, strict=True):
            offsets = itertools.accumulate((item.count for item in batch.items), initial=0)
            for item, offset in zip(batch.items, offsets, strict=False):
                slot = tensor[offset : offset + item.count]
                parts.append(Part(item, item.piece(self.run.plan.weights[item.weight], self.shard)))
                slots.append(slot.mT if item.transposed else slot)
        return parts, slots


class _Local(Task):
    """Matrices that this rank holds whole."""

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Nothing is elsewhere."""
        return tensor

    def compute(self) -> None:
        packed = self.pack(self.run.local_dtype)
        self.unpack([self.transform(batch, 0, x) for batch, x in zip(self.chunk.batches, packed, strict=True)])


class _Duplicated(Task):
    """All-gather; every rank computes everything."""

    def start(self) -> None:
        mine = flat(self.pack(self.run.wire.dtype))
        lengths = [self._length(rank) for rank in range(self.exchange.size)]
        self.pending = self.exchange.all_gather(padded(mine, max(lengths)))

    def compute(self) -> None:
        shards = self.pending.wait()
        offsets = [0] * self.exchange.size
        results = []
        for batch in self.chunk.batches:
            pieces = []
            for rank, shard in enumerate(shards):
                shape = (batch.count, *batch.kind.part(rank))
                pieces.append(shard[offsets[rank] : offsets[rank] + numel(shape)].view(shape))
                offsets[rank] += numel(shape)
            whole = self.orthogonalize(torch.cat(pieces, dim=batch.kind.dim))
            results.append(whole.split(batch.kind.parts, dim=batch.kind.dim)[self.rank])
        self.unpack(results)

    def _length(self, rank: int) -> int:
        return sum(batch.count * numel(batch.kind.part(rank)) for batch in self.chunk.batches)


class _Distributed(Task):
    """Each rank keeps its columns; Gram matrices are summed."""

    @staticmethod
    def method(orthogonalizer: Orthogonalizer, kind: Kind) -> str:
        """Standard for all shapes."""
        return str(orthogonalizer.named(None))

    def compute(self) -> None:
        orthogonalizer = self.run.orthogonalizer
        results = []
        for x in self.pack(self.run.local_dtype):
            self.run.counters.flops += x.size(0) * orthogonalizer.standard_flops(*x.shape[-2:])
            results.append(orthogonalizer.sharded(x, self.exchange.all_reduce))
        self.unpack(results)


class _Owner(Task):
    """All-to-all: shards to the owners, orthogonalized shards back."""

    def start(self) -> None:
        batches = self.pack(self.run.wire.dtype)
        self.pending = self._send(batches, forth=True)

    def compute(self) -> None:
        received = self.pending.wait()
        offset, mine = 0, []
        pieces: list[list[torch.Tensor]] = [[] for _ in self.chunk.batches]
        for rank in range(self.exchange.size):
            for index, batch in enumerate(self.chunk.batches):
                shape = (batch.counts[self.rank], *self.run.stack, *batch.kind.part(rank))
                pieces[index].append(received[offset : offset + numel(shape)].view(shape))
                offset += numel(shape)
        for batch, shards in zip(self.chunk.batches, pieces, strict=True):
            whole = torch.cat(shards, dim=batch.kind.dim)
            first = sum(batch.counts[: self.rank])
            mine.append(self.transform(batch, first, whole) if whole.size(0) else whole)
        self.pending = self._send([x.to(self.run.wire.back) for x in mine], forth=False)

    def finish(self) -> None:
        received = self.pending.wait()
        offset = 0
        pieces: list[list[torch.Tensor]] = [[] for _ in self.chunk.batches]
        for rank in range(self.exchange.size):
            for index, batch in enumerate(self.chunk.batches):
                shape = (batch.counts[rank], *batch.kind.part(self.rank))
                pieces[index].append(received[offset : offset + numel(shape)].view(shape))
                offset += numel(shape)
        self.unpack([joined(shards) for shards in pieces])

    def _send(self, batches: list[torch.Tensor], forth: bool) -> Pending:
        """Forth: each owner's matrices of this rank's shards. Back: each rank's shards of this owner's matrices."""
        segments, to, by = [], [], []
        for rank in range(self.exchange.size):
            there, here = 0, 0
            for batch, tensor in zip(self.chunk.batches, batches, strict=True):
                first = sum(batch.counts[:rank]) if forth else 0
                if forth:
                    segment = tensor[first : first + batch.counts[rank]]
                    here += batch.counts[self.rank] * numel((*self.run.stack, *batch.kind.part(rank)))
                else:
                    segment = tensor.split(batch.kind.parts, dim=batch.kind.dim)[rank]
                    here += batch.counts[rank] * numel(batch.kind.part(self.rank))
                segments.append(segment)
                there += segment.numel()
            to.append(there)
            by.append(here)
        # One batch going forth lies in the order of the owners already.
        send = batches[0].view(-1) if forth and len(batches) == 1 else flat(segments)
        return self.exchange.all_to_all(send, to, by)


class _Lent(Task):
    """All-to-all among data-parallel ranks: matrices to who orthogonalizes them, and back. Most ranks have no part."""

    is_late = True
    along = 0
    """What is cut for those who get a part: matrices, or their columns."""

    def __init__(self, run: Run, chunk: Chunk) -> None:
        super().__init__(run, chunk)
        peers = run.plan.weights[chunk.batches[0].items[0].weight].peers
        assert peers is not None
        self.width = self.exchange.size // peers.ranks
        place, self.shard = divmod(self.rank, self.width)
        self.batches = tuple(batch for batch in chunk.batches if _holder(run.plan, batch) == place)
        self.borrowed = tuple(batch for batch in chunk.batches if batch.counts[self.rank])
        # (rank, number of the batch): in the order in which the pieces lie in the messages.
        self.to = sorted((rank, n) for n, batch in enumerate(self.batches) for rank in _some(batch.counts))
        self.by = sorted((rank, n) for n, batch in enumerate(self.borrowed) for rank in _some(batch.kind.parts))

    def start(self) -> None:
        pieces = [
            x.split(b.counts, dim=self.along) for b, x in zip(self.batches, self.pack(self.run.wire.dtype), strict=True)
        ]
        shapes = [self._shape(self.borrowed[n], self.rank, rank) for rank, n in self.by]
        self.pending = self._send(
            [pieces[n][rank] for rank, n in self.to], self.run.wire.dtype, self.to, self.by, shapes
        )

    def compute(self) -> None:
        shards: list[list[torch.Tensor]] = [[] for _ in self.borrowed]
        for (_, n), piece in zip(self.by, self._received(), strict=True):
            shards[n].append(piece)
        back = self.run.wire.back
        results = []
        for batch, pieces in zip(self.borrowed, shards, strict=True):
            whole = self.work(batch, torch.cat(pieces, dim=batch.kind.dim)).to(back)
            results.append([whole] if len(pieces) == 1 else whole.split(batch.kind.parts, dim=batch.kind.dim))
        returned = [results[n][0 if len(results[n]) == 1 else rank] for rank, n in self.by]
        shapes = [self._shape(self.batches[n], rank, self.rank) for rank, n in self.to]
        self.pending = self._send(returned, back, self.by, self.to, shapes)

    def finish(self) -> None:
        pieces: list[list[torch.Tensor]] = [[] for _ in self.batches]
        for (_, n), piece in zip(self.to, self._received(), strict=True):
            pieces[n].append(piece)
        self.unpack([torch.cat(some, dim=self.along) for some in pieces])

    def work(self, batch: Batch, x: torch.Tensor) -> torch.Tensor:
        """What this rank does of a batch."""
        return self.orthogonalize(x)

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The parts of a lent matrix are with the tensor-parallel ranks of its holder, all of it if it is one rank."""
        if self.width == 1:
            return tensor
        return self.run.exchanges[self.run.plan.weights[self.batches[0].items[0].weight].group].all_reduce(tensor)

    def unpack(self, batches: list[torch.Tensor]) -> None:
        if batches:
            super().unpack(batches)

    def pack(self, dtype: torch.dtype) -> list[torch.Tensor]:
        return super().pack(dtype) if self.batches else []

    def _shape(self, batch: Batch, worker: int, holder: int) -> tuple[int, ...]:
        """Of what one rank gets of another's part."""
        return (batch.counts[worker], *batch.kind.part(holder))

    def _send(
        self,
        pieces: list[torch.Tensor],
        dtype: torch.dtype,
        to: list[tuple[int, int]],
        by: list[tuple[int, int]],
        shapes: list[tuple[int, ...]],
    ) -> Pending:
        """Pieces to ranks, and of certain shapes from ranks; both in order."""
        there, here = [0] * self.exchange.size, [0] * self.exchange.size
        for (rank, _), piece in zip(to, pieces, strict=True):
            there[rank] += piece.numel()
        for (rank, _), shape in zip(by, shapes, strict=True):
            here[rank] += numel(shape)
        self.shapes = shapes
        send = flat(pieces) if pieces else torch.empty(0, dtype=dtype, device=self.run.wire.device)
        return self.exchange.all_to_all(send, there, here)

    def _received(self) -> list[torch.Tensor]:
        sizes = [numel(shape) for shape in self.shapes]
        pieces = self.pending.wait().split(sizes) if sizes else ()
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]


class _Split(_Lent):
    """Some columns to each of several ranks, which iterate together."""

    along = -1

    @staticmethod
    def method(orthogonalizer: Orthogonalizer, kind: Kind) -> str:
        """Standard, but for who computes what."""
        return f"split Newton-Schulz, {orthogonalizer.named(None).dtype}"

    def work(self, batch: Batch, x: torch.Tensor) -> torch.Tensor:
        run, p = self.run, batch.kind.p
        members = Members(self.exchange, _some(batch.counts))
        rows = even_part(p, len(members.ranks), members.ranks.index(self.rank))
        run.counters.flops += x.size(0) * int(run.orthogonalizer.member_flops(p, x.size(-1), rows))
        return run.orthogonalizer.split(x, members.sum, members.scatter, members.gather)

    def _shape(self, batch: Batch, worker: int, holder: int) -> tuple[int, ...]:
        return (batch.count, batch.kind.p, batch.counts[worker])


def _holder(plan: Plan, batch: Batch) -> int:
    """The data-parallel rank whose weights these are."""
    peers = plan.weights[batch.items[0].weight].peers
    assert peers is not None
    return peers.holder


def _some(counts: Sequence[int]) -> list[int]:
    """The ranks that have some."""
    return [rank for rank, count in enumerate(counts) if count]


class _Gram(Task):
    """Partial Gram matrices to their owners, polynomials back."""

    @staticmethod
    def method(orthogonalizer: Orthogonalizer, kind: Kind) -> str:
        """Gram Newton-Schulz for all shapes."""
        return str(orthogonalizer.named(orthogonalizer.restarts))

    def compute(self) -> None:
        run = self.run
        batches = self.pack(run.local_dtype)
        shards = [self._normalized(batch.kind, x) for batch, x in zip(self.chunk.batches, batches, strict=True)]
        for segment in range(run.orthogonalizer.segment_count):
            triangles = [lower_triangle(run.orthogonalizer.products.gram(x)) for x in shards]
            scales = [prescale(x.dtype, x.size(-2)) if segment == 0 else 1.0 for x in shards]
            polynomials = self._polynomials(triangles, segment, scales)
            for index, (x, q) in enumerate(zip(shards, polynomials, strict=True)):
                shards[index] = run.orthogonalizer.products.apply(q.to(x.dtype), x, 1.0 / scales[index])
                run.counters.flops += x.size(0) * run.orthogonalizer.rectangular_flops(*x.shape[-2:])
        for batch in self.chunk.batches:
            own = batch.counts[self.rank]
            run.counters.flops += own * run.orthogonalizer.polynomial_flops(batch.kind.p)
        self.unpack(shards)

    def _normalized(self, kind: Kind, x: torch.Tensor) -> torch.Tensor:
        orthogonalizer = self.run.orthogonalizer
        return orthogonalizer.normalized(x, prescale(orthogonalizer.dtype, kind.p), self.exchange.all_reduce)

    def _polynomials(self, partial: list[torch.Tensor], segment: int, scales: list[float]) -> list[torch.Tensor]:
        """Send the partial Gram matrices, compute the polynomials of those owned, and get those of all."""
        wire = self.run.wire
        counts = [batch.counts for batch in self.chunk.batches]
        sizes = [x.size(-1) for x in partial]
        ranks = range(self.exchange.size)
        to = [sum(count[rank] * size for count, size in zip(counts, sizes, strict=True)) for rank in ranks]
        ordered = [x.split(count)[rank] for rank in ranks for x, count in zip(partial, counts, strict=True)]
        received = self.exchange.all_to_all(flat(ordered).to(wire.gram), to, [to[self.rank]] * len(to)).wait()
        # Sums of partial Gram matrices in float32 at least.
        wide = torch.promote_types(wire.gram, torch.float32)
        total = received.view(len(to), -1).sum(dim=0, dtype=wide).to(self.run.orthogonalizer.dtype)
        mine, offset = [], 0
        for batch, count, size, scale in zip(self.chunk.batches, counts, sizes, scales, strict=True):
            triangle = total[offset : offset + count[self.rank] * size].view(count[self.rank], size)
            offset += count[self.rank] * size
            gram = from_triangle(triangle, batch.kind.p)
            q = self.run.orthogonalizer.polynomials(gram, segment, scale) if gram.size(0) else gram
            mine.append(lower_triangle(q))
        gathered = self.exchange.all_gather(padded(flat(mine).to(wire.gram), max(to))).wait()
        return self._all_polynomials(gathered, sizes)

    def _all_polynomials(self, gathered: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
        found: list[list[torch.Tensor]] = [[] for _ in sizes]
        for rank, triangles in enumerate(gathered):
            offset = 0
            for index, (batch, size) in enumerate(zip(self.chunk.batches, sizes, strict=True)):
                length = batch.counts[rank] * size
                found[index].append(triangles[offset : offset + length].view(-1, size))
                offset += length
        return [
            from_triangle(torch.cat(pieces), batch.kind.p)
            for pieces, batch in zip(found, self.chunk.batches, strict=True)
        ]


TASKS: dict[str, type[Task]] = {
    LOCAL: _Local,
    OWNER: _Owner,
    GRAM: _Gram,
    LENT: _Lent,
    SPLIT: _Split,
    DUPLICATED: _Duplicated,
    DISTRIBUTED: _Distributed,
}
