"""The work on chunks whose matrices come together on a rank: the one that has them, their owner, or all ranks."""

from __future__ import annotations

import torch

from megatron_muon.engine.packing import Shapes, cut, flat, interleaved, joined, numel, padded
from megatron_muon.engine.run import Pause, RankChunk, Run, Work

__all__ = ["duplicated", "local", "owner"]


def local(run: Run, mine: RankChunk) -> Work:
    """Matrices that this rank holds whole."""
    yield Pause.EXCHANGE  # of the next chunk, which begins meanwhile
    packed = run.pack(mine, run.local_dtype)
    run.unpack(mine, [run.transform(batch, 0, x) for batch, x in zip(mine.batches, packed, strict=True)])


def duplicated(run: Run, mine: RankChunk) -> Work:
    """All-gather; every rank computes everything."""
    exchange, batches = run.exchange(mine), mine.batches
    shapes = [[(batch.count, *batch.key.part(rank)) for batch in batches] for rank in range(exchange.size)]
    longest = max(sum(map(numel, each)) for each in shapes)
    pending = exchange.all_gather(padded(flat(run.pack(mine, run.wire.dtype)), longest))
    yield Pause.EXCHANGE
    received = [cut(buffer, [each])[0] for buffer, each in zip(pending.wait(), shapes, strict=True)]
    results = []
    for batch, *shards in zip(batches, *received, strict=True):
        whole = run.orthogonalize(torch.cat(shards, dim=batch.key.dim))
        results.append(whole.split(batch.key.parts, dim=batch.key.dim)[mine.rank])
    run.unpack(mine, results)


def owner(run: Run, mine: RankChunk) -> Work:
    """All-to-all: shards to the owners, orthogonalized shards back."""
    exchange, batches, rank = run.exchange(mine), mine.batches, mine.rank
    ranks = range(exchange.size)
    # This rank's shards of what each owns, and each rank's shards of what this one owns.
    theirs: list[Shapes] = [[(batch.counts[each], *batch.key.part(rank)) for batch in batches] for each in ranks]
    own: list[Shapes] = [[(batch.counts[rank], *batch.key.part(each)) for batch in batches] for each in ranks]

    def stacked(shapes: list[Shapes]) -> list[Shapes]:
        """With all tensors of each matrix that are sent to be worked on."""
        return [[(count, *run.stack, *part) for count, *part in each] for each in shapes]

    packed = [x.split(batch.counts) for x, batch in zip(run.pack(mine, run.wire.dtype), batches, strict=True)]
    pending = exchange.all_to_all(interleaved(packed), stacked(theirs), stacked(own))
    del packed
    yield Pause.EXCHANGE
    received = cut(pending.wait(), stacked(own))
    results = []
    for batch, *shards in zip(batches, *received, strict=True):
        whole = torch.cat(shards, dim=batch.key.dim)
        whole = run.transform(batch, sum(batch.counts[:rank]), whole) if whole.size(0) else whole
        results.append(whole.to(run.wire.back).split(batch.key.parts, dim=batch.key.dim))
    del received, shards, whole
    yield Pause.COMPUTED
    pending = exchange.all_to_all(interleaved(results), own, theirs)
    del results
    yield Pause.RETURN
    run.unpack(mine, [joined(shards) for shards in zip(*cut(pending.wait(), theirs), strict=True)])
