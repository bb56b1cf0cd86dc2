"""Balance among data-parallel ranks: matrices that others orthogonalize for the rank that holds their weight.

State and momentum stay with the holder. Where it has more to do than others, it lends matrices: sends the momentum,
and gets the orthogonalized matrices back. What alone exceeds a fair share is split: several ranks get some columns of
the matrix each, and iterate together. Everything follows from shapes and constants, in seconds (operations and bytes),
so that all ranks of a group come to the same; where it gains little, nothing is lent.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_muon.engine.costs import member_cost
from megatron_muon.engine.modes import AUTO, BLOCKWISE, LENT, LOCAL, OWNER, REPEATED, SPLIT, Cost
from megatron_muon.engine.packing import even_part
from megatron_muon.engine.plan import Batch, BatchKey, Chunk, MatrixSlice, Peers, Weight
from megatron_muon.engine.planner import Policy, items_of
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer

WORTHWHILE = 0.95
"""Nothing is lent unless the busiest rank then needs at most this part of its time."""

CLOSE_ENOUGH = 0.01
"""Matrices move until the busiest rank has at most this part more to do than the mean."""

COLUMNS = 32
"""Matrices are split at multiples of this many columns, where that is possible: kernels like such widths best."""


@dataclass(frozen=True)
class Lending:
    """Who orthogonalizes what, in all data-parallel groups of some weights.

    Attributes:
        weights: the weights of all ranks.
        kept: the matrices that their holder orthogonalizes itself.
        chunks: the other matrices, by the name of their group (:class:`megatron_muon.engine.plan.Peers`).
        flops: for each group the operations of each rank, numbered tensor first, before and after matrices are lent.
            What tensor-parallel ranks divide counts as divided evenly.
    """

    weights: tuple[Weight, ...]
    kept: tuple[tuple[BatchKey, MatrixSlice], ...]
    chunks: Mapping[str, tuple[Chunk, ...]]
    flops: Mapping[str, tuple[list[float], list[float]]]

    def kept_by(self, places: Mapping[str, int]) -> list[tuple[BatchKey, MatrixSlice]]:
        """The matrices that a rank orthogonalizes for itself.

        Args:
            places: the rank's number in each group.
        """
        peers = [weight.peers for weight in self.weights]
        return [
            (key, item)
            for key, item in self.kept
            if (of := peers[item.weight]) is None or places.get(of.group) == of.holder
        ]

    def chunks_of(self, groups: Mapping[str, int]) -> list[Chunk]:
        """The chunks of matrices that the ranks of some groups orthogonalize for one another."""
        return [chunk for group in sorted(self.chunks) if group in groups for chunk in self.chunks[group]]


@functools.lru_cache(maxsize=64)
def lend(weights: tuple[Weight, ...], policy: Policy, orthogonalizer: Orthogonalizer) -> Lending:
    """Let busy ranks lend matrices to idle ones, for as long as that relieves the busiest.

    Args:
        weights: the weights of all ranks, with their peers; those without peers stay with this rank.
        policy: mode, sizes and rates.
        orthogonalizer: knows what each shape costs.

    Raises:
        ConfigError: for a weight that the mode cannot treat.
    """
    kept: list[tuple[BatchKey, MatrixSlice]] = []
    blocks: dict[str, list[_WeightBlock]] = defaultdict(list)
    peers: dict[str, Peers] = {}
    for key, item in items_of(weights, policy.mode):
        of = weights[item.weight].peers
        if of is None:
            kept.append((key, item))
        else:
            peers.setdefault(of.group, of)
            blocks[of.group].append(_WeightBlock(key, item, of))
    chunks, flops = {}, {}
    for group, its in blocks.items():
        rated = dataclasses.replace(policy, machine=policy.machine.over(peers[group].span))
        balanced = _balanced(its, peers[group], rated, orthogonalizer)
        kept += balanced.kept()
        chunks[group] = tuple(balanced.chunks())
        before = _Workloads(its, peers[group], rated, orthogonalizer)
        flops[group] = before.flops, balanced.flops
    return Lending(weights, tuple(kept), chunks, flops)


def _balanced(blocks: list[_WeightBlock], peers: Peers, policy: Policy, orthogonalizer: Orthogonalizer) -> _Workloads:
    """The best assignment with matrices split into at most 1, 2, 4, ... parts; with as few parts as are as good."""
    before = _Workloads(blocks, peers, policy, orthogonalizer)
    best, seconds = before, WORTHWHILE * before.busiest
    if peers.ranks == 1 or not before.busiest or policy.mode == BLOCKWISE:
        return before
    for most in sorted({*(2**exponent for exponent in range(peers.ranks.bit_length())), peers.ranks}):
        found = _Workloads(blocks, peers, policy, orthogonalizer)
        found.split(most)
        found.even_out(most)
        needed = found.busiest + found.overhead
        if needed < (seconds if best is before else (1.0 - CLOSE_ENOUGH) * seconds):
            best, seconds = found, needed
    return best


@dataclass(frozen=True)
class _WeightBlock:
    """Matrices of one block of one weight.

    Attributes:
        key: the key that they have at their holder.
        item: all the matrices of the block.
        peers: the data-parallel ranks of the weight.
    """

    key: BatchKey
    item: MatrixSlice
    peers: Peers

    @property
    def units(self) -> int:
        return self.item.stop - self.item.start

    @property
    def each(self) -> int:
        """Matrices in a unit."""
        return self.item.count // self.units

    @property
    def numel(self) -> int:
        """Elements of a unit."""
        return self.each * self.key.m * self.key.n


@dataclass
class _Workloads:
    """What each rank of a group has to do, and what it does for others. Ranks are numbered tensor first."""

    blocks: list[_WeightBlock]
    peers: Peers
    policy: Policy
    orthogonalizer: Orthogonalizer
    left: list[int] = field(init=False)
    """How many units of each block stay with their holder."""
    lent: list[dict[int, int]] = field(init=False)
    """For each block how many units each rank gets; data-parallel ranks count for matrices that ranks hold whole."""
    parts: list[list[tuple[int, ...]]] = field(init=False)
    """For each block, and each of its units that is split, the data-parallel ranks that share it."""
    loads: list[float] = field(init=False)
    """Seconds of each rank."""
    flops: list[float] = field(init=False)
    """Operations of each rank."""

    def __post_init__(self) -> None:
        divided = [len(block.key.parts) for block in self.blocks if block.key.mode != LOCAL]
        self.tensor = max(divided, default=1)
        ranks = self.peers.ranks * self.tensor
        self.left = [block.units for block in self.blocks]
        self.lent = [{} for _ in self.blocks]
        self.parts = [[] for _ in self.blocks]
        self.loads, self.flops = [0.0] * ranks, [0.0] * ranks
        self.held: list[list[int]] = [[] for _ in range(self.peers.ranks)]
        for index, block in enumerate(self.blocks):
            self.held[block.peers.holder].append(index)
            self._work(block.peers.holder, block.units * self._unit_flops(block) / self._ranks_sharing(block))

    @property
    def busiest(self) -> float:
        """Seconds of the rank that has most to do."""
        return max(self.loads, default=0.0)

    @property
    def overhead(self) -> float:
        """Seconds of latency of all messages."""
        return 2 * self.policy.machine.latency * sum(1 for _ in self.chunks())

    def split(self, most: int) -> None:
        """Split matrices that alone exceed a fair share of the work: into as few parts as do not, at most ``most``."""
        fair = sum(self.loads) / len(self.loads)
        shares = [0] * self.peers.ranks
        local = [index for index, block in enumerate(self.blocks) if block.key.mode == LOCAL]
        for index in self._largest_first(local):
            block = self.blocks[index]
            if self._matrix_seconds(block) <= fair:
                break
            most_of_it = min(most, block.key.q // COLUMNS)
            number = next((n for n in range(2, most_of_it) if self._member_seconds(block, n) <= fair), most_of_it)
            for _ in range(block.units if number > 1 else 0):
                load = self._without(index)
                members = sorted(range(self.peers.ranks), key=lambda rank: (shares[rank], load[rank], rank))[:number]
                self._cut(index, members)
                for rank in members:
                    shares[rank] += 1

    def even_out(self, most: int) -> None:
        """Let the busiest rank lend matrices to the idlest, or split one into up to ``most`` parts, while it helps."""
        while self.busiest > (1.0 + CLOSE_ENOUGH) * sum(self.loads) / len(self.loads):
            rank = self.loads.index(self.busiest)
            move = min(self._moves(rank), default=None)
            if move is None or move[0] >= self.busiest * (1.0 - CLOSE_ENOUGH / 10):
                cut = min(self._cuts(rank, most), default=None)
                if cut is None or cut[0] >= self.busiest * (1.0 - CLOSE_ENOUGH):
                    return
                self._cut(cut[2], cut[3])
                continue
            _, _, index, to, units = move
            block, sizes = self.blocks[index], self.policy.sizes
            self.left[index] -= units
            self.lent[index][to] = self.lent[index].get(to, 0) + units
            self._work(block.peers.holder, -units * self._unit_flops(block) / self._ranks_sharing(block))
            self._send(block.peers.holder, units * block.numel * sizes.wire / self._ranks_sharing(block))
            self._work(to, units * self._unit_flops(block), whole=block.key.mode == LOCAL)
            self._send(to, units * block.numel * sizes.back, whole=block.key.mode == LOCAL)

    def _moves(self, rank: int) -> Iterator[tuple[float, float, int, int, int]]:
        """What ``rank`` may lend: (seconds of the busier of the two afterwards, elements, block, to whom, units)."""
        place, busy, machine, sizes = rank // self.tensor, self.busiest, self.policy.machine, self.policy.sizes
        fair = sum(self.loads) / len(self.loads)
        data = self._of_data_ranks()
        idlest = data.index(min(data)), self.loads.index(min(self.loads))
        seen = set()
        for index in self.held[place]:
            block = self.blocks[index]
            local = block.key.mode == LOCAL
            # Other modes were asked for by name: what they share out among tensor-parallel ranks stays there.
            movable = local or (block.peers.wide and self.policy.mode in (AUTO, OWNER))
            if not self.left[index] or not movable or (block.key, block.each) in seen:
                continue
            seen.add((block.key, block.each))
            to = idlest[not local]
            free = data[to] if local else self.loads[to]
            if (to if local else to // self.tensor) == place:
                continue
            cost = self._unit_flops(block) / machine.flops
            sent, back = (block.numel * size / machine.bytes for size in (sizes.wire, sizes.back))
            relief, burden = (cost - sent) / self._ranks_sharing(block), cost + back
            # What evens the two out, but no more than a fair share: what is lent is not lent on.
            units = int(min((busy - free) / max(relief + burden, burden), (fair - free) / burden))
            units = max(1, min(self.left[index], units))
            yield max(busy - units * relief, free + units * burden), units * block.numel, index, to, units

    def _cuts(self, rank: int, most: int) -> Iterator[tuple[float, int, int, tuple[int, ...]]]:
        """What ``rank`` may split: (seconds of the busiest rank that takes part, number of ranks, block, the ranks)."""
        held = [index for index in self.held[rank // self.tensor] if self.left[index]]
        local = [index for index in held if self.blocks[index].key.mode == LOCAL]
        # The largest one alone: it is what could not be lent.
        for index in self._largest_first(local)[:1]:
            block, load = self.blocks[index], self._without(index)
            idle = sorted(range(self.peers.ranks), key=lambda rank: (load[rank], rank))
            for number in range(2, min(most, block.key.q // COLUMNS) + 1):
                after = load[idle[number - 1]] + block.each * self._member_seconds(block, number)
                yield max(after, load[block.peers.holder]), number, index, tuple(idle[:number])

    def _without(self, index: int) -> list[float]:
        """Seconds of each data-parallel rank when a unit of a block has been sent away."""
        block, load = self.blocks[index], self._of_data_ranks()
        sent = block.numel * self.policy.sizes.wire / self.policy.machine.bytes
        load[block.peers.holder] -= block.each * self._matrix_seconds(block) - sent
        return load

    def _cut(self, index: int, members: Sequence[int]) -> None:
        """Split a unit of a block among data-parallel ranks."""
        block = self.blocks[index]
        self.left[index] -= 1
        self.parts[index].append(tuple(sorted(members)))
        self._work(block.peers.holder, -self._unit_flops(block))
        self._send(block.peers.holder, block.numel * self.policy.sizes.wire)
        cost = self._member_cost(block, len(members))
        for rank in members:
            self._work(rank, block.each * cost.flops)
            self._send(rank, block.each * cost.bytes)

    def kept(self) -> Iterator[tuple[BatchKey, MatrixSlice]]:
        """The matrices that their holder orthogonalizes itself."""
        for block, left in zip(self.blocks, self.left, strict=True):
            if left:
                yield block.key, _units_of(block, 0, left)

    def chunks(self) -> Iterator[Chunk]:
        """The chunks of matrices that other ranks orthogonalize, whole or split."""
        rounds: dict[int, list[Batch]] = defaultdict(list)
        lent: dict[tuple[str, int], dict[tuple[BatchKey, int], list[tuple[int, MatrixSlice]]]] = defaultdict(dict)
        filled: dict[tuple[str, int], int] = defaultdict(int)
        splits = [0] * self.peers.ranks  # of each holder
        for block, left, lent_to, parts in zip(self.blocks, self.left, self.lent, self.parts, strict=True):
            holder = block.peers.holder
            key = self._lent_key(block)
            for members in parts:
                split = dataclasses.replace(key, mode=SPLIT)
                widths = self._widths(block.key.q, members)
                rounds[splits[holder]].append(Batch(split, (_units_of(block, left, 1),), widths))
                splits[holder] += 1
                left += 1
            for rank, units in sorted(lent_to.items()):
                while units:
                    size = filled[key.group, rank]
                    number, rest = divmod(size, self.policy.chunk_bytes)
                    fitting = (self.policy.chunk_bytes - rest) // (4 * block.numel)
                    take = min(units, fitting or int(not rest))
                    if not take:  # the rest of this round stays empty
                        filled[key.group, rank] += self.policy.chunk_bytes - rest
                        continue
                    lent[key.group, number].setdefault((key, holder), []).append((rank, _units_of(block, left, take)))
                    # A larger matrix than a round may hold is a round of its own.
                    filled[key.group, rank] += max(4 * block.numel * take, 0 if fitting else self.policy.chunk_bytes)
                    left, units = left + take, units - take
        for _, batches in sorted(rounds.items()):
            yield Chunk(SPLIT, self.peers.group, tuple(batches))
        for (group, _), found in sorted(lent.items()):
            yield Chunk(LENT, group, tuple(_batch(key, items) for (key, _), items in found.items()))

    def _lent_key(self, block: _WeightBlock) -> BatchKey:
        """The key of lent matrices: no rank but the holder's has parts of them."""
        key, holder = block.key, block.peers.holder
        if key.mode == LOCAL:
            parts = tuple(key.q * (rank == holder) for rank in range(self.peers.ranks))
            return BatchKey(LENT, self.peers.group, key.m, key.n, key.summed_dim, parts, key.budget)
        before, after = holder * self.tensor, (self.peers.ranks - holder - 1) * self.tensor
        parts = (*[0] * before, *key.parts, *[0] * after)
        return BatchKey(LENT, block.peers.wide, key.m, key.n, key.dim, parts, key.budget)

    def _widths(self, q: int, members: Sequence[int]) -> tuple[int, ...]:
        """How many columns of a split matrix each data-parallel rank gets."""
        step = COLUMNS if q % COLUMNS == 0 and q // COLUMNS >= len(members) else 1
        widths = [0] * self.peers.ranks
        for number, rank in enumerate(members):
            widths[rank] = step * even_part(q // step, len(members), number)
        return tuple(widths)

    def _unit_flops(self, block: _WeightBlock) -> int:
        """Operations for one unit of a block."""
        return block.each * self.orthogonalizer.of(block.key.budget).flops(block.key.m, block.key.n)

    def _matrix_seconds(self, block: _WeightBlock) -> float:
        """Seconds of the products for one matrix."""
        return self._unit_flops(block) / block.each / self.policy.machine.flops

    def _largest_first(self, indices: Sequence[int]) -> list[int]:
        """Indices of blocks, those whose matrices take longest first."""
        return sorted(indices, key=lambda index: (-self._matrix_seconds(self.blocks[index]), index))

    def _member_cost(self, block: _WeightBlock, number: int) -> Cost:
        """What one of ``number`` ranks does that split a matrix; latencies count for chunks."""
        cost = member_cost(block.key, number, self.orthogonalizer, self.policy.sizes)
        return dataclasses.replace(cost, collectives=0)

    def _member_seconds(self, block: _WeightBlock, number: int) -> float:
        return self._member_cost(block, number).seconds(self.policy.machine)

    def _ranks_sharing(self, block: _WeightBlock) -> int:
        """How many ranks of the holder share the work on one matrix."""
        return 1 if block.key.mode == LOCAL or self.policy.mode in REPEATED else self.tensor

    def _work(self, rank: int, flops: float, whole: bool = True) -> None:
        """Give a data-parallel rank, or one rank alone, more to do."""
        for each in range(rank * self.tensor, (rank + 1) * self.tensor) if whole else (rank,):
            self.flops[each] += flops
            self.loads[each] += flops / self.policy.machine.flops

    def _send(self, rank: int, size: float, whole: bool = True) -> None:
        for each in range(rank * self.tensor, (rank + 1) * self.tensor) if whole else (rank,):
            self.loads[each] += size / self.policy.machine.bytes

    def _of_data_ranks(self) -> list[float]:
        """Seconds of each data-parallel rank: those of its busiest tensor-parallel rank."""
        return [max(some) for some in itertools.batched(self.loads, self.tensor)]


def _units_of(block: _WeightBlock, first: int, units: int) -> MatrixSlice:
    """Some consecutive units of a block."""
    start = block.item.start + first
    return dataclasses.replace(block.item, start=start, stop=start + units, count=units * block.each)


def _batch(key: BatchKey, items: list[tuple[int, MatrixSlice]]) -> Batch:
    """A batch of lent matrices, in the order of the ranks that orthogonalize them."""
    items.sort(key=lambda pair: pair[0])
    counts = [0] * len(key.parts)
    for rank, item in items:
        counts[rank] += item.count
    return Batch(key, tuple(item for _, item in items), tuple(counts))
