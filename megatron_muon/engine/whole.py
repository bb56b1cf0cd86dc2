"""The work on chunks of which a rank has all matrices whole: its own, or those of all ranks."""

from __future__ import annotations

import torch

from megatron_muon.engine.packing import cut, numel, padded
from megatron_muon.engine.run import ChunkWork, Pause, RankChunk, Run


def local(run: Run, mine: RankChunk) -> ChunkWork:
    """Orthogonalize matrices that this rank holds whole."""
    yield Pause.EXCHANGE  # the exchange of the next chunk begins meanwhile
    packed = run.pack(mine, run.local_dtype)[::-1]
    run.unpack(mine, [run.transform(batch, 0, packed) for batch in mine.batches])


def duplicated(run: Run, mine: RankChunk) -> ChunkWork:
    """Gather all shards on every rank, each of which orthogonalizes everything."""
    exchange, batches = run.exchange(mine), mine.batches
    shapes = [[(batch.count, *batch.key.part(rank)) for batch in batches] for rank in range(exchange.size)]
    longest = max(sum(map(numel, each)) for each in shapes)
    pending = exchange.all_gather(padded(run.pack_together(mine, run.wire.dtype), longest))
    yield Pause.EXCHANGE
    received = [cut(buffer, [each])[0] for buffer, each in zip(pending.wait(), shapes, strict=True)]
    whole = [torch.cat(shards, dim=b.key.dim) for b, *shards in zip(batches, *received, strict=True)][::-1]
    del received
    results = [run.orthogonalize(b, whole).split(b.key.parts, dim=b.key.dim)[mine.rank] for b in batches]
    run.unpack(mine, results)
