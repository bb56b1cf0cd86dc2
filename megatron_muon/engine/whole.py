"""The work on chunks whose matrices come together on a rank: the one that has them, their owner, or all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_muon.engine.packing import Shapes, cut, interleaved, joined, numel, padded
from megatron_muon.engine.plan import Batch
from megatron_muon.engine.run import Pause, RankChunk, Run, Work

__all__ = ["duplicated", "local", "owner"]


def local(run: Run, mine: RankChunk) -> Work:
    """Matrices that this rank holds whole."""
    yield Pause.EXCHANGE  # of the next chunk, which begins meanwhile
    packed = run.pack(mine, run.local_dtype)[::-1]
    run.unpack(mine, [run.transform(batch, 0, packed) for batch in mine.batches])


def duplicated(run: Run, mine: RankChunk) -> Work:
    """All-gather; every rank computes everything."""
    exchange, batches = run.exchange(mine), mine.batches
    shapes = [[(batch.count, *batch.key.part(rank)) for batch in batches] for rank in range(exchange.size)]
    longest = max(sum(map(numel, each)) for each in shapes)
    pending = exchange.all_gather(padded(run.pack_together(mine, run.wire.dtype), longest))
    yield Pause.EXCHANGE
    whole = _whole(batches, [cut(buffer, [each])[0] for buffer, each in zip(pending.wait(), shapes, strict=True)])
    run.unpack(mine, [_shards(run.orthogonalize(whole), batch)[mine.rank] for batch in batches])


def owner(run: Run, mine: RankChunk) -> Work:
    """All-to-all: shards to the owners, orthogonalized shards back."""
    exchange, batches, rank = run.exchange(mine), mine.chunk.batches, mine.rank
    ranks = range(exchange.size)
    in_order = len(batches) == 1 or len(mine.batches) > len(batches)
    # This rank's shards of what each owns, and each rank's shards of what this one owns.
    theirs: list[Shapes] = [[(batch.counts[each], *batch.key.part(rank)) for batch in batches] for each in ranks]
    own: list[Shapes] = [[(batch.counts[rank], *batch.key.part(each)) for batch in batches] for each in ranks]

    def stacked(shapes: list[Shapes]) -> list[Shapes]:
        """With all tensors of each matrix that are sent to be worked on."""
        return [[(count, *run.stack, *part) for count, *part in each] for each in shapes]

    if in_order:
        send = run.pack_together(mine, run.wire.dtype)
    else:
        packed = run.pack(mine, run.wire.dtype)
        send = interleaved([x.split(batch.counts) for x, batch in zip(packed, batches, strict=True)])
        del packed
    pending = exchange.all_to_all(send, stacked(theirs), stacked(own))
    del send
    yield Pause.EXCHANGE
    whole = _whole(batches, cut(pending.wait(), stacked(own)))
    results = []
    for batch in batches:
        x = run.transform(batch, sum(batch.counts[:rank]), whole) if batch.counts[rank] else whole.pop()
        results.append(_shards(x.to(run.wire.back), batch))
        del x
    yield Pause.COMPUTED
    pending = exchange.all_to_all(interleaved(results), own, theirs)
    del results
    yield Pause.RETURN
    if in_order:
        run.unpack(mine, run.cut(mine, pending.wait()))
    else:
        run.unpack(mine, [joined(some) for some in zip(*cut(pending.wait(), theirs), strict=True)])


def _whole(batches: Sequence[Batch], received: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """Matrices of each batch, put together from the shards of all ranks. The last batch comes first: a list to pop."""
    return [torch.cat(shards, dim=b.key.dim) for b, *shards in zip(batches, *received, strict=True)][::-1]


def _shards(x: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, ...]:
    """Of whole matrices, by rank."""
    return x.split(batch.key.parts, dim=batch.key.dim)
