"""The work on chunks whose matrices stay divided: their ranks exchange nothing but norms and Gram matrices."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch

from megatron_muon.engine.clock import WAITING
from megatron_muon.engine.packing import (
    Shapes,
    cut,
    flat,
    from_triangle,
    interleaved,
    lower_triangle,
    numel,
    padded,
    triangle_numel,
)
from megatron_muon.engine.run import ChunkWork, Pause, RankChunk, Run
from megatron_muon.orthogonalize.gram import prescale
from megatron_muon.orthogonalize.newton_schulz import balance_, quadratic, square_sums, transposed_if
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer


def distributed(run: Run, mine: RankChunk) -> ChunkWork:
    """Iterate on shards that stay where they are; Gram matrices are summed over the ranks in each step."""
    orthogonalizer, exchange = run.orthogonalizer.of(mine.chunk.budget), run.exchange(mine)
    shards = yield from _normalized(run, mine, [1.0] * len(mine.batches))
    # Partial sums are added in float32: bfloat16 loses bits.
    wide = torch.promote_types(orthogonalizer.dtype, torch.float32)
    for step in range(len(orthogonalizer.coefficients)):
        partial = [lower_triangle(orthogonalizer.products.gram(x)).to(wide) for x in shards]
        pending = exchange.all_reduce(flat(partial))
        del partial
        yield Pause.EXCHANGE
        _standard_step(orthogonalizer, shards, pending.wait(), step)
    for x in shards:
        run.counters.flops += x.size(0) * orthogonalizer.standard_flops(*x.shape[-2:])
    _unpack(run, mine, shards)


def _standard_step(orthogonalizer: Orthogonalizer, shards: list[torch.Tensor], grams: torch.Tensor, step: int) -> None:
    """``a X + (b A + c A A) X`` in place of each X of the list, from the triangles of all A."""
    (a, b, c), products = orthogonalizer.coefficients[step], orthogonalizer.products
    triangles = cut(grams, [[(x.size(0), triangle_numel(x.size(-2))) for x in shards]])[0]
    for index, triangle in enumerate(triangles):  # with zip in it, enumerate keeps what came first
        x = shards[index]
        z = from_triangle(triangle.to(orthogonalizer.dtype), x.size(-2))
        if step == 0 and orthogonalizer.iteration.balanced:
            x.mul_(balance_(z))
        z, factor = quadratic(z, b, c, products)
        shards[index] = products.multiply_add(x, z, a, factor)


def gram(run: Run, mine: RankChunk) -> ChunkWork:
    """Send partial Gram matrices to their owners, which send polynomials of the sums back."""
    orthogonalizer, exchange, batches = run.orthogonalizer.of(mine.chunk.budget), run.exchange(mine), mine.batches
    # The shapes of the triangles of Gram matrices that each rank owns.
    triangles = [
        [(batch.counts[rank], triangle_numel(batch.key.p)) for batch in batches] for rank in range(exchange.size)
    ]
    balanced = orthogonalizer.iteration.balanced  # then the diagonal of S is sent after the first polynomial
    first = [
        [(count, size + batch.key.p * balanced) for (count, size), batch in zip(each, batches, strict=True)]
        for each in triangles
    ]
    scales = [prescale(orthogonalizer.dtype, batch.key.p) for batch in batches]
    shards = yield from _normalized(run, mine, scales)
    for segment in range(orthogonalizer.segment_count):
        partial = [lower_triangle(orthogonalizer.products.gram(x)).to(run.wire.gram) for x in shards]
        send = interleaved([x.split(batch.counts) for x, batch in zip(partial, batches, strict=True)])
        del partial
        pending = exchange.all_to_all(send, triangles, [triangles[mine.rank]] * exchange.size)
        del send
        yield Pause.EXCHANGE
        polynomials = _polynomials(run, mine, pending.wait().view(exchange.size, -1), segment, scales)
        back = triangles if segment else first
        pending = exchange.all_gather(padded(polynomials, max(sum(map(numel, each)) for each in back)), WAITING)
        del polynomials
        yield Pause.EXCHANGE
        _multiply(run, mine, shards, pending.wait(), back, scales)
        scales = [1.0] * len(batches)
    for x, batch in zip(shards, batches, strict=True):
        run.counters.flops += orthogonalizer.segment_count * x.size(0) * orthogonalizer.rectangular_flops(*x.shape[-2:])
        run.counters.flops += batch.counts[mine.rank] * orthogonalizer.polynomial_flops(batch.key.p)
    _unpack(run, mine, shards)


def _polynomials(
    run: Run, mine: RankChunk, partial: torch.Tensor, segment: int, scales: Sequence[float]
) -> torch.Tensor:
    """The polynomials of this rank's matrices, as triangles in one buffer, from the ranks' partial Gram matrices."""
    # Partial Gram matrices are added in float32 at least.
    orthogonalizer, wide = run.orthogonalizer.of(mine.chunk.budget), torch.promote_types(partial.dtype, torch.float32)
    total = partial.sum(dim=0, dtype=wide).to(orthogonalizer.dtype)
    own = [(batch.counts[mine.rank], triangle_numel(batch.key.p)) for batch in mine.batches]
    found = []
    for triangle, batch, scale in zip(cut(total, [own])[0], mine.batches, scales, strict=True):
        if not triangle.size(0):
            continue
        q, factors = orthogonalizer.polynomials(from_triangle(triangle, batch.key.p), segment, scale)
        found.append(lower_triangle(q) if factors is None else torch.cat([lower_triangle(q), factors[..., 0]], dim=1))
    return flat(found).to(run.wire.gram) if found else total[:0].to(run.wire.gram)


def _multiply(
    run: Run,
    mine: RankChunk,
    shards: list[torch.Tensor],
    gathered: torch.Tensor,
    triangles: Sequence[Shapes],
    scales: Sequence[float],
) -> None:
    """Multiply the shards of each batch by the polynomials from all ranks; the products replace them in the list."""
    received = [cut(buffer, [each])[0] for buffer, each in zip(gathered, triangles, strict=True)]
    for index, pieces in enumerate(zip(*received, strict=True)):
        p, piece = mine.batches[index].key.p, torch.cat(pieces)
        q = from_triangle(piece[:, : triangle_numel(p)], p).to(run.orthogonalizer.dtype)
        if piece.size(1) > triangle_numel(p):
            q.mul_(piece[:, triangle_numel(p) :].unsqueeze(1))
        del piece
        shards[index] = run.orthogonalizer.products.apply(q, shards[index], 1.0 / scales[index])


def _normalized(run: Run, mine: RankChunk, scales: list[float]) -> Generator[Pause, None, list[torch.Tensor]]:
    """This rank's shards, divided by the norms of the whole matrices, times a scale for each batch.

    The ranks share the last dimension of the results: where they share rows, these are views of the transposes.
    """
    packed = run.pack(mine, run.local_dtype)
    squares = [square_sums(x) for x in packed]
    pending = run.exchange(mine).all_reduce(flat(squares))
    yield Pause.EXCHANGE
    totals = cut(pending.wait(), [[each.shape for each in squares]])[0]
    packed.reverse()
    shards = []
    for batch, scale, total in zip(mine.batches, scales, totals, strict=True):
        shard = run.orthogonalizer.normalized(packed.pop(), scale, total, overwrite=True)
        shards.append(transposed_if(shard, batch.key.summed_dim == -2))
    return shards


def _unpack(run: Run, mine: RankChunk, shards: list[torch.Tensor]) -> None:
    run.unpack(
        mine, [transposed_if(x, batch.key.summed_dim == -2) for x, batch in zip(shards, mine.batches, strict=True)]
    )
