"""How much memory the step of a rank takes beside weights, gradients and state: told by its plan, without doing it.

Each function here is the account of the work on one kind of chunk: what it makes, and when that is free again (see
:mod:`megatron_muon.engine.whole`, :mod:`megatron_muon.engine.all_to_all` and :mod:`megatron_muon.engine.sharded`).
They pause where the work does, and take turns as it does, so that what is in memory together is counted together.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megatron_muon.engine.execute import take_turns
from megatron_muon.engine.modes import DISTRIBUTED, DUPLICATED, GRAM, LENT, LOCAL, OWNER, SPLIT
from megatron_muon.engine.packing import even_part, triangle_numel
from megatron_muon.engine.plan import Batch, Plan
from megatron_muon.engine.run import ChunkWork, Pause, RankChunk, WireDtypes
from megatron_muon.orthogonalize.gram import segments
from megatron_muon.orthogonalize.kernels.elementwise import are_small, pieces
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer
from megatron_muon.orthogonalize.products import is_exact


def peak_bytes(
    plan: Plan,
    orthogonalizer: Orthogonalizer,
    wire: WireDtypes,
    dtype: torch.dtype,
    group_ranks: Mapping[str, int],
    nesterov: bool,
) -> int:
    """The most bytes that a step of plain Muon holds at once on a GPU, beside weights, gradients and state.

    Elementwise passes are torch's; kernels that do them need less. Numbers of which there is one for each matrix do not
    count, nor what a variant, a scale mode by norms, or decay of method ``l2`` makes.

    Args:
        plan: of the rank's engine.
        orthogonalizer: the engine's iteration.
        wire: dtypes of what the engine sends.
        dtype: of momentum, and of matrices that stay on their rank.
        group_ranks: the rank's number in each group that the plan names.
        nesterov: whether momentum is mixed with the gradient.
    """
    account = _Account(orthogonalizer, wire, dtype, nesterov)
    chunks = [RankChunk.of(plan.weights, chunk, group_ranks.get(chunk.group, 0)) for chunk in plan.chunks]
    take_turns(chunks, lambda mine: _WORK[mine.chunk.mode](account, mine))
    return account.peak


@dataclass
class _Account:
    """Bytes that are alive, and the most that there were."""

    orthogonalizer: Orthogonalizer
    wire: WireDtypes
    dtype: torch.dtype
    nesterov: bool
    live: int = 0
    peak: int = 0

    @property
    def item(self) -> int:
        """Bytes of a number of the iteration."""
        return self.orthogonalizer.dtype.itemsize

    def hold(self, size: int) -> None:
        """Something is made, or freed if the size is negative."""
        self.live += size
        self.peak = max(self.peak, self.live)

    def brief(self, *sizes: int) -> None:
        """Something is made and freed at once."""
        self.hold(sum(sizes))
        self.live -= sum(sizes)

    @contextmanager
    def held(self, size: int) -> Iterator[None]:
        """Something is there for a while."""
        self.hold(size)
        yield
        self.live -= size

    def pack(self, mine: RankChunk, dtype: torch.dtype) -> int:
        """Make the batches of a chunk; returns their size."""
        sizes = _sizes(mine.batches, mine.rank)
        self.hold(sum(sizes) * dtype.itemsize)
        if self.nesterov and dtype != self.dtype:  # mixed in the dtype of the momentum, some at a time
            self.brief(self.dtype.itemsize * _at_once(sizes))
        return sum(sizes) * dtype.itemsize

    def add(self, mine: RankChunk, dtype: torch.dtype) -> None:
        """Add updates in one dtype to the weights: small ones of one shape are converted, some at a time."""
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for batch in mine.batches if dtype != self.dtype else ():
            alike[batch.key.m, batch.key.n] += _sizes([batch], mine.rank)
        for sizes in alike.values():
            self.brief(self.dtype.itemsize * _at_once(sizes) if are_small(sizes) else 0)

    def orthogonalize(self, count: int, m: int, n: int, given: torch.dtype) -> None:
        """Matrices that are there in one dtype give way to orthogonalized ones, in that of the iteration."""
        own, (p, q) = self.orthogonalizer, sorted((m, n))
        each = max(1, own.batch_bytes["cuda"] // (m * n * self.item))
        before, after = count * m * n * given.itemsize, count * m * n * self.item
        if count <= each:
            self.start(before, after, given)
            self.iterate(count, p, q, after)
            return
        start = 0 if given == own.dtype else each * p * q * self.item  # otherwise in the memory of what is given
        with self.held(after if start else 0):
            self.hold(start)
            self.iterate(each, p, q, start)
            self.hold(-each * p * q * self.item)  # copied to its place
        self.live += after - before

    def start(self, before: int, after: int, given: torch.dtype) -> None:
        """Normalized matrices take the place of those that are given."""
        if given != self.orthogonalizer.dtype:
            self.hold(after)
            self.hold(-before)

    def iterate(self, count: int, p: int, q: int, start: int) -> None:
        """The iteration, whose results are held when it is done; of what it starts from ``start`` bytes are freed."""
        own, square, x = self.orthogonalizer, count * p * p * self.item, count * p * q * self.item
        if own.method(p, q).restarts is None:
            for step in range(len(own.coefficients)):
                self.brief(2 * square)  # the Gram matrix, and its polynomial or the last one
                self.brief(square + x)
                self.hold(x)
                self.hold(-x if step else -start)
            return
        last = 0
        for number, segment in enumerate(segments(own.coefficients, own.restarts or ())):
            self.brief(last + square * _units(len(segment), own.dtype, False))
            self.brief(square + x)
            self.hold(x)
            self.hold(-x if number else -start)
            last = square  # the polynomial is there until there is another

    def cat(self, buffer: int, parts: int) -> None:
        """A buffer is joined into tensors of ``parts`` bytes, and freed."""
        self.hold(parts)
        self.hold(-buffer)


def _units(steps: int, dtype: torch.dtype, kept: bool) -> int:
    """How many p x p matrices there are at once in :func:`megatron_muon.orthogonalize.gram.polynomial_of_gram`.

    Args:
        steps: of the segment.
        dtype: of the iteration.
        kept: whether the caller keeps the Gram matrix.
    """
    new = itertools.count().__next__
    r = new()
    always = {r} if kept else set[int]()
    q = y = r  # until there are any
    most = 0
    for step in range(steps):
        z, made = new(), new()
        sum_ = z if step == 0 and is_exact(dtype) else made
        most = max(most, len({r, y, q, z} | always), len({r, z, sum_} | always | ({q} if step else set())))
        y, q = z, sum_
        if step + 1 < steps:
            once, twice = new(), new()
            most = max(most, len({r, y, q, once, twice} | always))
            r = twice
    return most


def _local(account: _Account, mine: RankChunk) -> ChunkWork:
    yield Pause.EXCHANGE
    account.pack(mine, account.dtype)
    results = 0
    for batch in mine.batches:
        account.orthogonalize(batch.count, batch.key.m, batch.key.n, account.dtype)
        results += batch.count * batch.key.m * batch.key.n * account.item
    account.add(mine, account.orthogonalizer.dtype)
    account.hold(-results)


def _exchanged(account: _Account, mine: RankChunk) -> ChunkWork:
    """Of :func:`megatron_muon.engine.all_to_all.owner`, ``lent`` and ``split``."""
    rank, wire, back = mine.rank, account.wire.dtype, account.wire.back
    borrowed = [batch for batch in mine.chunk.batches if batch.counts[rank]]
    shapes = [_taken(batch, rank) for batch in borrowed]
    own = [count * m * n for count, m, n in shapes]
    sent = account.pack(mine, wire)
    if not mine.in_order and mine.held and len(mine.batches) * len(mine.held[0].counts) > 1:
        account.brief(sent)
    received = sum(own) * wire.itemsize
    account.hold(received)
    yield Pause.EXCHANGE
    account.hold(-sent)
    account.cat(received, received)
    results = 0
    for batch, (count, m, n), elements in zip(borrowed, shapes, own, strict=True):
        if batch.key.mode == SPLIT:
            _split(account, batch, elements, rank)
        else:
            account.orthogonalize(count, m, n, wire)
        if account.orthogonalizer.dtype != back:
            account.hold(elements * back.itemsize)
            account.hold(-elements * account.item)
        results += elements * back.itemsize
    yield Pause.COMPUTED
    returned = sum(batch.count * batch.key.part_numel(rank) for batch in mine.batches) * back.itemsize
    is_view = len(borrowed) == 1 and len([part for part in borrowed[0].key.parts if part]) == 1
    account.hold(0 if is_view else results)
    account.hold(returned)
    account.hold(0 if is_view else -results)
    yield Pause.LATE if mine.chunk.mode in (LENT, SPLIT) else Pause.RETURN
    account.hold(-results)
    again = 0 if mine.in_order else returned
    with account.held(again):
        account.add(mine, back)
    account.hold(-returned)


def _split(account: _Account, batch: Batch, elements: int, rank: int) -> None:
    """The iteration of several ranks on one matrix: sums of Gram matrices are in float32, each multiplies some rows."""
    members = [each for each, count in enumerate(batch.counts) if count]
    p, item, x = batch.key.p, account.item, elements * account.item
    account.start(elements * account.wire.dtype.itemsize, x, account.wire.dtype)
    rows = batch.count * even_part(p, len(members), members.index(rank)) * p
    square, wide = batch.count * p * p, torch.promote_types(account.orthogonalizer.dtype, torch.float32)
    account.hold(x if len(account.orthogonalizer.coefficients) > 1 else 0)  # what it starts from is there all the time
    converted = 0 if wide == account.orthogonalizer.dtype else square * wide.itemsize
    others = (len(members) - 1) * rows * wide.itemsize
    gathering = 2 * square * item - rows * item
    account.brief(2 * rows * item, square * item, converted)
    account.brief(2 * rows * item, converted or square * item, others, rows * wide.itemsize)
    account.brief(2 * rows * item, gathering)
    account.brief(2 * rows * item, square * item, x)
    account.hold(x if len(account.orthogonalizer.coefficients) == 1 else 0)
    account.hold(-x)


def _duplicated(account: _Account, mine: RankChunk) -> ChunkWork:
    batches, wire = mine.batches, account.wire.dtype
    ranks = len(batches[0].key.parts)
    longest = (
        max(sum(batch.count * batch.key.part_numel(rank) for batch in batches) for rank in range(ranks)) * wire.itemsize
    )
    sent = account.pack(mine, wire)
    if sent < longest:
        account.cat(sent, longest)
    account.hold(ranks * longest)
    yield Pause.EXCHANGE
    account.hold(-longest)
    account.cat(ranks * longest, sum(batch.count * batch.key.m * batch.key.n for batch in batches) * wire.itemsize)
    results = 0
    for batch in batches:
        account.orthogonalize(batch.count, batch.key.m, batch.key.n, wire)
        results += batch.count * batch.key.m * batch.key.n * account.item
    account.add(mine, account.orthogonalizer.dtype)
    account.hold(-results)


def _normalized(account: _Account, mine: RankChunk) -> Iterator[Pause]:
    """The shards of a chunk in the dtype of the iteration, held when it is done."""
    account.pack(mine, account.dtype)
    yield Pause.EXCHANGE
    for batch in mine.batches:
        elements = batch.count * batch.key.part_numel(mine.rank)
        account.start(elements * account.dtype.itemsize, elements * account.item, account.dtype)


def _shards(account: _Account, mine: RankChunk) -> list[int]:
    return [batch.count * batch.key.part_numel(mine.rank) * account.item for batch in mine.batches]


def _distributed(account: _Account, mine: RankChunk) -> ChunkWork:
    yield from _normalized(account, mine)
    item, wide = account.item, torch.promote_types(account.orthogonalizer.dtype, torch.float32).itemsize
    packed = [batch.count * triangle_numel(batch.key.p) for batch in mine.batches]
    for _ in account.orthogonalizer.coefficients:
        for batch, triangle in zip(mine.batches, packed, strict=True):
            _triangle(account, batch.count, batch.key.p, 0 if item == wide else wide)
            account.hold(triangle * wide)
        if len(packed) > 1:
            account.brief(sum(packed) * wide)
        yield Pause.EXCHANGE
        last = 0
        for batch, triangle, x in zip(mine.batches, packed, _shards(account, mine), strict=True):
            square = batch.count * batch.key.p**2 * item
            _untriangle(account, batch.count, batch.key.p, last + (0 if item == wide else triangle * item))
            account.brief(last, 2 * square)
            account.brief(square, x)
            last = square
        account.hold(-sum(packed) * wide)
    account.add(mine, account.orthogonalizer.dtype)
    account.hold(-sum(_shards(account, mine)))


def _gram(account: _Account, mine: RankChunk) -> ChunkWork:
    own, item, batches, rank = account.orthogonalizer, account.item, mine.batches, mine.rank
    ranks = len(batches[0].counts)
    triangles = [[batch.counts[each] * triangle_numel(batch.key.p) for batch in batches] for each in range(ranks)]
    longest, sent = max(map(sum, triangles)) * item, sum(map(sum, triangles)) * item
    mine_bytes = sum(triangles[rank]) * item
    yield from _normalized(account, mine)
    for segment in segments(own.coefficients, own.restarts or ()):
        for batch in batches:
            _triangle(account, batch.count, batch.key.p, 0)
            account.hold(batch.count * triangle_numel(batch.key.p) * item)
        account.brief(sent)
        account.hold(ranks * mine_bytes)
        yield Pause.EXCHANGE
        account.hold(-sent)
        _polynomials(account, mine, triangles[rank], len(segment))
        account.hold(mine_bytes - ranks * mine_bytes)
        if mine_bytes < longest:
            account.cat(mine_bytes, longest)
        account.hold(ranks * longest)
        yield Pause.EXCHANGE
        account.hold(-longest)
        last = 0
        for batch, x in zip(batches, _shards(account, mine), strict=True):
            square, triangle = batch.count * batch.key.p**2 * item, batch.count * triangle_numel(batch.key.p) * item
            _untriangle(account, batch.count, batch.key.p, last + triangle)
            account.brief(square, x)
            last = square
        account.hold(-ranks * longest)
    account.add(mine, own.dtype)
    account.hold(-sum(_shards(account, mine)))


def _polynomials(account: _Account, mine: RankChunk, triangles: Sequence[int], steps: int) -> None:
    """Of this rank's Gram matrices: sums in float32 at least, and the polynomials of one batch after the other."""
    dtype, item = account.orthogonalizer.dtype, account.item
    wide = torch.promote_types(dtype, torch.float32)
    account.brief(sum(triangles) * wide.itemsize, 0 if wide == dtype else sum(triangles) * item)
    with account.held(sum(triangles) * item):
        found = last = 0
        for batch, triangle in zip(mine.batches, triangles, strict=True):
            square = batch.counts[mine.rank] * batch.key.p**2 * item
            _untriangle(account, batch.counts[mine.rank], batch.key.p, found + last)
            account.brief(found, square * _units(steps, dtype, True))
            with account.held(found + square):  # r
                _triangle(account, batch.counts[mine.rank], batch.key.p, 0)
            found, last = found + triangle * item, square
        account.brief(2 * found if len(triangles) > 1 else found)


def _triangle(account: _Account, count: int, p: int, wide: int) -> None:
    """What packing a triangle takes: the matrix, the triangle, a part of it; and it again in another dtype."""
    square, triangle, corner = count * p * p, count * triangle_numel(p), count * (p // 2) ** 2
    account.brief((square + triangle + corner) * account.item)
    account.brief(triangle * (account.item + wide) if wide else 0)


def _untriangle(account: _Account, count: int, p: int, beside: int) -> None:
    """What unpacking takes: the matrix, and twice a quarter of it."""
    quarter = count * ((p + 1) // 2) ** 2
    account.brief(beside, (count * p * p + 2 * quarter) * account.item)


def _sizes(batches: Iterable[Batch], rank: int) -> list[int]:
    """Elements of a rank's part of each item of some batches."""
    return [item.count * batch.key.part_numel(rank) for batch in batches for item in batch.items]


def _at_once(sizes: Sequence[int]) -> int:
    """Elements of which elementwise passes make copies at a time."""
    return max((sum(sizes[start:stop]) for start, stop in pieces(sizes)), default=0)


def _taken(batch: Batch, rank: int) -> tuple[int, int, int]:
    """How many matrices of which shape a rank works on, or which part of one."""
    key, own = batch.key, batch.counts[rank]
    if key.mode != SPLIT:
        return own, key.m, key.n
    return (batch.count, own, key.n) if key.summed_dim == -2 else (batch.count, key.m, own)


_WORK: dict[str, Callable[[_Account, RankChunk], ChunkWork]] = {
    LOCAL: _local,
    OWNER: _exchanged,
    LENT: _exchanged,
    SPLIT: _exchanged,
    DUPLICATED: _duplicated,
    DISTRIBUTED: _distributed,
    GRAM: _gram,
}
