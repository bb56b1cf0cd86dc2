"""What a rank will do in one step of a plan: the numbers that its counters show afterwards, without doing it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from operator import add

import torch

from megatron_muon.engine.modes import DISTRIBUTED, DUPLICATED, GRAM, LENT, LOCAL, OWNER, SPLIT, Cost, Sizes
from megatron_muon.engine.packing import even_part, triangle_numel
from megatron_muon.engine.plan import Batch, BatchKey, Chunk, Plan
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer

Choice = tuple[str, int, int]
"""The mode of a chunk, and the rows and columns of a logical matrix."""


def predict(plan: Plan, orthogonalizer: Orthogonalizer, sizes: Sizes, group_ranks: Mapping[str, int]) -> Cost:
    """What one rank does in a step: see :class:`megatron_muon.engine.exchange.Counters`.

    Args:
        plan: the plan of the rank's engine.
        orthogonalizer: the engine's iteration.
        sizes: bytes of the elements that the engine sends.
        group_ranks: the rank's number in each group that the plan names.

    Returns:
        ``flops``, ``bytes`` and ``collectives`` of :func:`megatron_muon.engine.execute.execute`, without the comparison
        of plans before the first step. ``bytes`` are exact for groups of 2, 4, 8, ... ranks; for others, parts of a
        byte in all-reduces are summed up in another order than the step does it.

    Raises:
        KeyError: for a group without a number.
    """
    rank = RankWork(orthogonalizer, sizes, 0)
    total = Cost()
    for chunk in plan.chunks:
        rank.number = group_ranks[chunk.group] if chunk.group else 0
        total += rank.cost(chunk)
    return total


def matrices_by_mode(plan: Plan) -> Counter[Choice]:
    """How many logical matrices all ranks of the groups together treat in which way.

    A matrix that ranks hold parts of counts once; so does one that each rank holds a copy of.
    """
    found: Counter[Choice] = Counter()
    for chunk in plan.chunks:
        for batch in chunk.batches:
            for item in batch.items:
                # Shards of whole matrices: the other ranks hold others.
                copies = plan.weights[item.weight].ranks if chunk.mode == LOCAL else 1
                found[chunk.mode, item.rows, item.columns] += item.count * copies
    return found


class RankWork:
    """Counts what one rank does for a chunk; each method is the account of a task in ``execute``."""

    def __init__(self, orthogonalizer: Orthogonalizer, sizes: Sizes, number: int) -> None:
        self.orthogonalizer, self.sizes, self.number = orthogonalizer, sizes, number
        # Sums over ranks: norms in float64, Gram matrices in float32 or better.
        self.norm_bytes = torch.float64.itemsize
        self.gram_bytes = torch.promote_types(orthogonalizer.dtype, torch.float32).itemsize

    def cost(self, chunk: Chunk) -> Cost:
        """What the rank does for one chunk."""
        accounts: dict[str, Callable[[tuple[Batch, ...]], Cost]] = {
            LOCAL: self._local,
            OWNER: self._owner,
            GRAM: self._gram,
            DUPLICATED: self._duplicated,
            DISTRIBUTED: self._distributed,
            LENT: self._owner,
            SPLIT: self._split,
        }
        return accounts[chunk.mode](chunk.batches)

    def _local(self, batches: tuple[Batch, ...]) -> Cost:
        return Cost(sum(batch.count * self._flops(batch.key) for batch in batches))

    def _flops(self, key: BatchKey) -> int:
        """Operations for one matrix."""
        return self.orthogonalizer.of(key.budget).flops(key.m, key.n)

    def _duplicated(self, batches: tuple[Batch, ...]) -> Cost:
        """One all-gather, of buffers as long as the longest."""
        ranks = len(batches[0].key.parts)
        longest = max(sum(batch.count * batch.key.part_numel(rank) for batch in batches) for rank in range(ranks))
        return self._local(batches) + Cost(0, (ranks - 1) * longest * self.sizes.wire, 1)

    def _distributed(self, batches: tuple[Batch, ...]) -> Cost:
        """An all-reduce of the norms, and in each step one of the Gram matrices."""
        orthogonalizer = self.orthogonalizer.of(batches[0].key.budget)
        ranks, steps = len(batches[0].key.parts), len(orthogonalizer.coefficients)
        parts = [(batch.count, batch.key.p, batch.key.parts[self.number]) for batch in batches]
        flops = sum(count * orthogonalizer.standard_flops(p, part) for count, p, part in parts)
        norms = _reduced(ranks, sum(count for count, _, _ in parts) * self.norm_bytes)
        grams = _reduced(ranks, sum(count * triangle_numel(p) for count, p, _ in parts) * self.gram_bytes)
        return Cost(flops) + sum([grams] * steps, norms)

    def _owner(self, batches: tuple[Batch, ...]) -> Cost:
        """All-to-all there and back; this rank keeps its own shards of what it owns."""
        there, back, flops = 0, 0, 0
        for batch in batches:
            own, key = batch.counts[self.number], batch.key
            mine, ranks = batch.key.part_numel(self.number), range(len(key.parts))
            there += (sum(batch.counts[each] for each in ranks if key.feeds(self.number, each)) - own) * mine
            back += own * (sum(key.part_numel(each) for each in ranks) - mine)
            flops += own * self._flops(key)
        return Cost(flops, there * self.sizes.wire + back * self.sizes.back, 2)

    def _split(self, batches: tuple[Batch, ...]) -> Cost:
        """All-to-all there and back.

        Ranks that share a matrix send each other its norm, and in each step the rows of the summed Gram matrix that
        each is to have, and all rows, twice with a square.
        """
        total = Cost(0, 0, 2)
        for batch in batches:
            key, own = batch.key, batch.counts[self.number]
            if key.parts[self.number]:
                total += Cost(0, batch.count * key.p * (key.q - own) * self.sizes.wire)
            elif own:
                total += Cost(0, batch.count * key.p * own * self.sizes.back)
            members = [rank for rank, columns in enumerate(batch.counts) if columns]
            if not own:
                continue
            orthogonalizer = self.orthogonalizer.of(key.budget)
            others, steps = len(members) - 1, len(orthogonalizer.coefficients)
            rows = even_part(key.p, len(members), members.index(self.number))
            summed = (key.p - rows) * key.p * self.gram_bytes
            gathered = others * rows * key.p * orthogonalizer.dtype.itemsize
            flops = int(orthogonalizer.member_flops(key.p, own, rows))
            gathers = steps + orthogonalizer.squares
            sent = others * self.norm_bytes + steps * summed + gathers * gathered
            total += Cost(batch.count * flops, batch.count * sent, 1 + steps + gathers)
        return total

    def _gram(self, batches: tuple[Batch, ...]) -> Cost:
        """An all-reduce of the norms; in each segment, triangles of Gram matrices to the owners and an all-gather."""
        orthogonalizer, ranks = self.orthogonalizer.of(batches[0].key.budget), len(batches[0].key.parts)
        segments = orthogonalizer.segment_count
        total = _reduced(ranks, sum(batch.count for batch in batches) * self.norm_bytes)
        owned, factors = [0] * ranks, [0] * ranks  # elements in the triangles of each rank, and in the diagonals of S
        for batch in batches:
            p, part = batch.key.p, batch.key.parts[self.number]
            total += Cost(segments * batch.count * orthogonalizer.rectangular_flops(p, part))
            total += Cost(batch.counts[self.number] * orthogonalizer.polynomial_flops(p))
            for rank, count in enumerate(batch.counts):
                owned[rank] += count * triangle_numel(p)
                factors[rank] += count * p * orthogonalizer.iteration.balanced
        there = sum(owned) - owned[self.number]
        sent = segments * there + (ranks - 1) * ((segments - 1) * max(owned) + max(map(add, owned, factors)))
        return total + Cost(0, sent * self.sizes.gram, 2 * segments)


def _reduced(ranks: int, size: int) -> Cost:
    """What a rank does in an all-reduce of ``size`` bytes."""
    return Cost(0, 2 * (ranks - 1) * size / ranks, 1)
