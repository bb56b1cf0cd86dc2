"""The work on chunks whose matrices go to who orthogonalizes them, and back: one of the ranks that divide them, or
data-parallel ranks, most of which have no part in a chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from megatron_muon.engine.clock import WAITING
from megatron_muon.engine.exchange import Members
from megatron_muon.engine.modes import SPLIT
from megatron_muon.engine.packing import Shapes, cut, even_part, flat
from megatron_muon.engine.plan import Batch, BatchKey
from megatron_muon.engine.run import ChunkWork, Pause, RankChunk, Run

_Solver = Callable[[Batch, list[torch.Tensor]], torch.Tensor]
"""Computes a batch from the last tensor of a list, and takes that out of the list so that its memory can be freed."""


def owner(run: Run, mine: RankChunk) -> ChunkWork:
    """Send shards to the owners of matrices, which send orthogonalized shards back."""
    return _exchanged(run, mine, _whole(run, mine), Pause.RETURN)


def lent(run: Run, mine: RankChunk) -> ChunkWork:
    """Send matrices to other data-parallel ranks, which send them back orthogonalized."""
    return _exchanged(run, mine, _whole(run, mine), Pause.LATE)


def split(run: Run, mine: RankChunk) -> ChunkWork:
    """Send several ranks a part of the longer side of each matrix; they iterate together and send their parts back."""

    def solve(batch: Batch, given: list[torch.Tensor]) -> torch.Tensor:
        x, p, dim = given.pop(), batch.key.p, batch.key.summed_dim
        members = Members(run.exchange(mine), _some(batch.counts))
        rows = even_part(p, len(members.ranks), members.ranks.index(mine.rank))
        orthogonalizer = run.orthogonalizer.of(batch.key.budget)
        run.counters.flops += x.size(0) * int(orthogonalizer.member_flops(p, x.size(dim), rows))
        return orthogonalizer.split(x, members.sum, members.scatter, members.gather, members.own, dim)

    return _exchanged(run, mine, solve, Pause.LATE)


def _whole(run: Run, mine: RankChunk) -> _Solver:
    return lambda batch, given: run.transform(batch, sum(batch.counts[: mine.rank]), given)


def _exchanged(run: Run, mine: RankChunk, solve: _Solver, last: Pause) -> ChunkWork:
    """Send pieces of matrices to the ranks that work on them, and results back, by one all-to-all each.

    Args:
        run: what the work on every chunk needs.
        mine: the chunk.
        solve: computes the results of the pieces that this rank gets.
        last: the pause while the results of this rank's own matrices are on their way.
    """
    exchange, rank, stack = run.exchange(mine), mine.rank, run.stack
    ranks, held = range(exchange.size), mine.held
    borrowed = [batch for batch in mine.chunk.batches if batch.counts[rank]]
    # The shapes that each rank gets of this rank's parts, and that this rank gets of each rank's. Of several copies one
    # is sent; results go to all.
    back_to = [[_piece(batch, each, rank) for batch in held if batch.counts[each]] for each in ranks]
    back_of = [[_piece(batch, rank, each) for batch in borrowed if batch.key.parts[each]] for each in ranks]
    given, taken = back_to, back_of
    if mine.chunk.batches[0].key.copies:  # alike in all batches of a chunk
        feeds = mine.chunk.batches[0].key.feeds
        given = [each if feeds(rank, to) else [] for to, each in enumerate(back_to)]
        taken = [each if feeds(by, rank) else [] for by, each in enumerate(back_of)]

    def stacked(shapes: Sequence[Shapes]) -> list[Shapes]:
        """The shapes with a dimension for the tensors of each matrix, see :attr:`Run.stack`."""
        return [[(count, *stack, *part) for count, *part in each] for each in shapes]

    if mine.in_order or not held:
        send = run.pack_together(mine, run.wire.dtype)
    else:
        packed = zip(run.pack(mine, run.wire.dtype), held, strict=True)
        send = _sent([(batch.key, x.split(batch.counts, _cut_dim(batch))) for x, batch in packed], rank)
        del packed
    pending = exchange.all_to_all(send, stacked(given), stacked(taken))
    del send
    yield Pause.EXCHANGE
    pieces = [iter(each) for each in cut(pending.wait(), stacked(taken))]
    whole = [_joined(batch, rank, pieces) for batch in borrowed][::-1]
    del pieces
    results = [_shards(batch, solve(batch, whole).to(run.wire.back)) for batch in borrowed]
    yield Pause.COMPUTED
    back = [shards[by] for by in ranks for shards in results if by in shards]
    nothing = torch.empty(0, dtype=run.wire.back, device=run.wire.device)
    pending = exchange.all_to_all(flat(back or [nothing]), back_of, back_to, WAITING)
    del results, back
    yield last
    if mine.in_order:
        run.unpack(mine, run.cut(mine, pending.wait()))
        return
    pieces = [iter(each) for each in cut(pending.wait(), back_to)]
    run.unpack(mine, [torch.cat([next(pieces[to]) for to in _some(b.counts)], dim=_cut_dim(b)) for b in held])


def _sent(packed: Sequence[tuple[BatchKey, Sequence[torch.Tensor]]], rank: int) -> torch.Tensor:
    """What this rank sends to the ranks, one after the other: of each batch the matrices that each of them gets."""
    ranks = range(len(packed[0][1]))
    return flat([its[to] for to in ranks for key, its in packed if key.feeds(rank, to)])


def _joined(batch: Batch, rank: int, pieces: Sequence[Iterator[torch.Tensor]]) -> torch.Tensor:
    """Whole matrices of a batch, from the parts that ranks have sent to this one."""
    key, holders = batch.key, _some(batch.key.parts)
    if not key.pieces:
        return torch.cat([next(pieces[by]) for by in holders], dim=key.dim)
    found: torch.Tensor | None = None
    for by in (by for by in holders if key.feeds(by, rank)):
        part, ((top, bottom), (left, right), _) = next(pieces[by]), key.pieces[by]
        if part.shape[-2:] == (key.m, key.n):
            return part
        found = part.new_empty((*part.shape[:-2], key.m, key.n)) if found is None else found
        found[..., top:bottom, left:right] = part
    assert found is not None, "a matrix without elements is not in a plan"
    return found


def _shards(batch: Batch, x: torch.Tensor) -> dict[int, torch.Tensor]:
    """The part of each rank of whole matrices."""
    key, holders = batch.key, _some(batch.key.parts)
    if key.pieces:
        return {by: x[..., slice(*key.pieces[by].rows), slice(*key.pieces[by].columns)] for by in holders}
    # A split matrix has one holder, and this rank has only a part of it.
    shards = [x] if len(holders) == 1 else x.split([key.parts[by] for by in holders], key.dim)
    return dict(zip(holders, shards, strict=True))


def _piece(batch: Batch, worker: int, holder: int) -> tuple[int, ...]:
    """The shape of what rank ``worker`` gets of the part of rank ``holder``."""
    found = [batch.count, *batch.key.part(holder)]
    found[_cut_dim(batch)] = batch.counts[worker]
    return tuple(found)


def _cut_dim(batch: Batch) -> int:
    """The dimension in which a batch is cut: between matrices (0), or, in ``split``, along their longer side."""
    return batch.key.summed_dim if batch.key.mode == SPLIT else 0


def _some(counts: Sequence[int]) -> list[int]:
    """The ranks whose count is not 0."""
    return [rank for rank, count in enumerate(counts) if count]
