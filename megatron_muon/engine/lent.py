"""The work on chunks of matrices that data-parallel ranks orthogonalize for one another. Most have no part in one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from megatron_muon.engine.exchange import Exchange, Members, Pending
from megatron_muon.engine.modes import SPLIT
from megatron_muon.engine.packing import cut, even_part, flat
from megatron_muon.engine.plan import Batch
from megatron_muon.engine.run import Pause, RankChunk, Run, Work

__all__ = ["lent", "split"]

_Place = tuple[int, int]
"""Rank, and number of a batch: pieces lie in messages in this order."""


def lent(run: Run, mine: RankChunk) -> Work:
    """Whole matrices, each to one rank, and back."""
    return _lend(run, mine, lambda batch, x: run.orthogonalize([x]))


def split(run: Run, mine: RankChunk) -> Work:
    """A part of the longer side of each matrix to each of several ranks, which iterate together, and back."""

    def work(batch: Batch, x: torch.Tensor) -> torch.Tensor:
        p, dim = batch.key.p, batch.key.summed_dim
        members = Members(run.exchange(mine), _some(batch.counts))
        rows = even_part(p, len(members.ranks), members.ranks.index(mine.rank))
        run.counters.flops += x.size(0) * int(run.orthogonalizer.member_flops(p, x.size(dim), rows))
        return run.orthogonalizer.split(x, members.sum, members.scatter, members.gather, dim)

    return _lend(run, mine, work)


def _lend(run: Run, mine: RankChunk, work: Callable[[Batch, torch.Tensor], torch.Tensor]) -> Work:
    """All-to-all of pieces to who works on them, and back.

    Args:
        run: the step.
        mine: the chunk.
        work: what this rank does of a batch that it gets.
    """
    exchange, rank, batches = run.exchange(mine), mine.rank, mine.batches
    borrowed = [batch for batch in mine.chunk.batches if batch.counts[rank]]

    def shape(batch: Batch, worker: int, holder: int) -> tuple[int, ...]:
        found = [batch.count, *batch.key.part(holder)]
        found[_cut_dim(batch)] = batch.counts[worker]
        return tuple(found)

    nothing = torch.empty(0, dtype=run.wire.dtype, device=run.wire.device)
    taken = {(by, n): shape(batch, rank, by) for n, batch in enumerate(borrowed) for by in _some(batch.key.parts)}
    given = {(to, n): shape(batch, to, rank) for n, batch in enumerate(batches) for to in _some(batch.counts)}
    cuts = [x.split(b.counts, dim=_cut_dim(b)) for x, b in zip(run.pack(mine, run.wire.dtype), batches, strict=True)]
    pending = _sent(exchange, {(to, n): cuts[n][to] for to, n in given}, taken, nothing)
    del cuts
    yield Pause.EXCHANGE
    pieces = _by_batch(pending, taken, len(borrowed))
    results: dict[_Place, torch.Tensor] = {}
    for n, batch in enumerate(borrowed):
        holders = _some(batch.key.parts)
        whole = work(batch, torch.cat(pieces[n], dim=batch.key.dim)).to(run.wire.back)
        shards = [whole] if len(holders) == 1 else whole.split([batch.key.parts[by] for by in holders], batch.key.dim)
        results.update({(by, n): shard for by, shard in zip(holders, shards, strict=True)})
    del pieces
    yield Pause.COMPUTED
    pending = _sent(exchange, results, given, nothing.to(run.wire.back))
    del results
    yield Pause.LATE
    returned = zip(batches, _by_batch(pending, given, len(batches)), strict=True)
    run.unpack(mine, [torch.cat(some, dim=_cut_dim(batch)) for batch, some in returned])


def _cut_dim(batch: Batch) -> int:
    """What is cut for those who get a piece: the batch into matrices (0), or these along their longer side."""
    return batch.key.summed_dim if batch.key.mode == SPLIT else 0


def _sent(
    exchange: Exchange,
    pieces: Mapping[_Place, torch.Tensor],
    expected: Mapping[_Place, tuple[int, ...]],
    nothing: torch.Tensor,
) -> Pending:
    """Pieces to ranks, and pieces of expected shapes from ranks; ``nothing`` if there are none to be sent."""
    to: list[list[tuple[int, ...]]] = [[] for _ in range(exchange.size)]
    by: list[list[tuple[int, ...]]] = [[] for _ in range(exchange.size)]
    for place in sorted(pieces):
        to[place[0]].append(tuple(pieces[place].shape))
    for place in sorted(expected):
        by[place[0]].append(expected[place])
    return exchange.all_to_all(flat([pieces[place] for place in sorted(pieces)]) if pieces else nothing, to, by)


def _by_batch(pending: Pending, expected: Mapping[_Place, tuple[int, ...]], batches: int) -> list[list[torch.Tensor]]:
    """The pieces of each batch, in the order of the ranks that they came from."""
    found: list[list[torch.Tensor]] = [[] for _ in range(batches)]
    places = sorted(expected)
    for (_, n), piece in zip(places, cut(pending.wait(), [[expected[place] for place in places]])[0], strict=True):
        found[n].append(piece)
    return found


def _some(counts: Sequence[int]) -> list[int]:
    """The ranks that have some."""
    return [rank for rank, count in enumerate(counts) if count]
