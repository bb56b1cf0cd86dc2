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

from megatron_muon.engine.modes import AUTO, BLOCKWISE, DUPLICATED, LENT, LOCAL, OWNER, SPLIT
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
    lots: dict[str, list[_Lot]] = defaultdict(list)
    peers: dict[str, Peers] = {}
    for key, item in items_of(weights, policy.mode):
        of = weights[item.weight].peers
        if of is None:
            kept.append((key, item))
        else:
            peers.setdefault(of.group, of)
            lots[of.group].append(_Lot(key, item, of))
    chunks, flops = {}, {}
    for group, its in lots.items():
        levelled = _level(its, peers[group], policy, orthogonalizer)
        kept += levelled.kept()
        chunks[group] = tuple(levelled.chunks())
        before = _Levels(its, peers[group], policy, orthogonalizer)
        flops[group] = before.flops, levelled.flops
    return Lending(weights, tuple(kept), chunks, flops)


def _level(lots: list[_Lot], peers: Peers, policy: Policy, orthogonalizer: Orthogonalizer) -> _Levels:
    """The best assignment with matrices split into at most 1, 2, 4, ... parts; with as few parts as are as good."""
    before = _Levels(lots, peers, policy, orthogonalizer)
    best, seconds = before, WORTHWHILE * before.busiest
    if peers.ranks == 1 or not before.busiest or policy.mode == BLOCKWISE:
        return before
    for most in sorted({*(2**exponent for exponent in range(peers.ranks.bit_length())), peers.ranks}):
        found = _Levels(lots, peers, policy, orthogonalizer)
        found.split(most)
        found.even_out(most)
        needed = found.busiest + found.overhead
        if needed < (seconds if best is before else (1.0 - CLOSE_ENOUGH) * seconds):
            best, seconds = found, needed
    return best


@dataclass(frozen=True)
class _Lot:
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
class _Levels:
    """What each rank of a group has to do, and what it does for others. Ranks are numbered tensor first."""

    lots: list[_Lot]
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
        divided = [len(lot.key.parts) for lot in self.lots if lot.key.mode != LOCAL]
        self.tensor = max(divided, default=1)
        ranks = self.peers.ranks * self.tensor
        self.left = [lot.units for lot in self.lots]
        self.lent = [{} for _ in self.lots]
        self.parts = [[] for _ in self.lots]
        self.loads, self.flops = [0.0] * ranks, [0.0] * ranks
        self.held: list[list[int]] = [[] for _ in range(self.peers.ranks)]
        for index, lot in enumerate(self.lots):
            self.held[lot.peers.holder].append(index)
            self._work(lot.peers.holder, lot.units * self._whole(lot) / self._sharing(lot))

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
        large = [index for index, lot in enumerate(self.lots) if lot.key.mode == LOCAL and self._single(lot) > fair]
        for index in sorted(large, key=lambda index: (-self._single(self.lots[index]), index)):
            lot = self.lots[index]
            most_of_it = min(most, lot.key.q // COLUMNS)
            number = next((n for n in range(2, most_of_it) if self._member(lot, n) <= fair), most_of_it)
            for _ in range(lot.units if number > 1 else 0):
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
            lot, sizes = self.lots[index], self.policy.sizes
            self.left[index] -= units
            self.lent[index][to] = self.lent[index].get(to, 0) + units
            self._work(lot.peers.holder, -units * self._whole(lot) / self._sharing(lot))
            self._send(lot.peers.holder, units * lot.numel * sizes.wire / self._sharing(lot))
            self._work(to, units * self._whole(lot), whole=lot.key.mode == LOCAL)
            self._send(to, units * lot.numel * sizes.back, whole=lot.key.mode == LOCAL)

    def _moves(self, rank: int) -> Iterator[tuple[float, float, int, int, int]]:
        """What ``rank`` may lend: (seconds of the busier of the two afterwards, elements, block, to whom, units)."""
        place, busy, machine = rank // self.tensor, self.busiest, self.policy.machine
        fair = sum(self.loads) / len(self.loads)
        data = self._of_data_ranks()
        idlest = data.index(min(data)), self.loads.index(min(self.loads))
        seen = set()
        for index in self.held[place]:
            lot = self.lots[index]
            local = lot.key.mode == LOCAL
            # Other modes were asked for by name: what they share out among tensor-parallel ranks stays there.
            movable = local or (lot.peers.wide and self.policy.mode in (AUTO, OWNER))
            if not self.left[index] or not movable or (lot.key, lot.each) in seen:
                continue
            seen.add((lot.key, lot.each))
            to = idlest[not local]
            free = data[to] if local else self.loads[to]
            if (to if local else to // self.tensor) == place:
                continue
            cost = self._whole(lot) / machine.flops
            sent, back = (lot.numel * size / machine.bytes for size in (self.policy.sizes.wire, self.policy.sizes.back))
            relief, burden = (cost - sent) / self._sharing(lot), cost + back
            # What evens the two out, but no more than a fair share: what is lent is not lent on.
            units = int(min((busy - free) / max(relief + burden, burden), (fair - free) / burden))
            units = max(1, min(self.left[index], units))
            yield max(busy - units * relief, free + units * burden), units * lot.numel, index, to, units

    def _cuts(self, rank: int, most: int) -> Iterator[tuple[float, int, int, tuple[int, ...]]]:
        """What ``rank`` may split: (seconds of the busiest rank that takes part, number of ranks, block, the ranks)."""
        held = [index for index in self.held[rank // self.tensor] if self.left[index]]
        local = [index for index in held if self.lots[index].key.mode == LOCAL]
        # The largest one alone: it is what could not be lent.
        for index in sorted(local, key=lambda index: (-self._single(self.lots[index]), index))[:1]:
            lot, load = self.lots[index], self._without(index)
            idle = sorted(range(self.peers.ranks), key=lambda rank: (load[rank], rank))
            for number in range(2, min(most, lot.key.q // COLUMNS) + 1):
                after = load[idle[number - 1]] + lot.each * self._member(lot, number)
                yield max(after, load[lot.peers.holder]), number, index, tuple(idle[:number])

    def _without(self, index: int) -> list[float]:
        """Seconds of each data-parallel rank when a unit of a block has been sent away."""
        lot, load = self.lots[index], self._of_data_ranks()
        sent = lot.numel * self.policy.sizes.wire / self.policy.machine.bytes
        load[lot.peers.holder] -= lot.each * self._single(lot) - sent
        return load

    def _cut(self, index: int, members: Sequence[int]) -> None:
        """Split a unit of a block among data-parallel ranks."""
        lot = self.lots[index]
        self.left[index] -= 1
        self.parts[index].append(tuple(sorted(members)))
        self._work(lot.peers.holder, -self._whole(lot))
        self._send(lot.peers.holder, lot.numel * self.policy.sizes.wire)
        for rank in members:
            self._work(rank, lot.each * member_flops(self.orthogonalizer, lot.key, len(members)))
            self._send(rank, lot.each * self._member_bytes(lot, len(members)))

    def kept(self) -> Iterator[tuple[BatchKey, MatrixSlice]]:
        """The matrices that their holder orthogonalizes itself."""
        for lot, left in zip(self.lots, self.left, strict=True):
            if left:
                yield lot.key, _some(lot, 0, left)

    def chunks(self) -> Iterator[Chunk]:
        """The chunks of matrices that other ranks orthogonalize, whole or split."""
        rounds: dict[int, list[Batch]] = defaultdict(list)
        lent: dict[tuple[str, int], dict[tuple[BatchKey, int], list[tuple[int, MatrixSlice]]]] = defaultdict(dict)
        filled: dict[tuple[str, int], int] = defaultdict(int)
        giants = [0] * self.peers.ranks  # of each holder
        for lot, left, lent_to, parts in zip(self.lots, self.left, self.lent, self.parts, strict=True):
            holder = lot.peers.holder
            key = self._lent_kind(lot)
            for members in parts:
                split = dataclasses.replace(key, mode=SPLIT)
                rounds[giants[holder]].append(Batch(split, (_some(lot, left, 1),), self._widths(lot.key.q, members)))
                giants[holder] += 1
                left += 1
            for rank, units in sorted(lent_to.items()):
                while units:
                    size = filled[key.group, rank]
                    number, rest = divmod(size, self.policy.chunk_bytes)
                    fitting = (self.policy.chunk_bytes - rest) // (4 * lot.numel)
                    take = min(units, fitting or int(not rest))
                    if not take:  # the rest of this round stays empty
                        filled[key.group, rank] += self.policy.chunk_bytes - rest
                        continue
                    lent[key.group, number].setdefault((key, holder), []).append((rank, _some(lot, left, take)))
                    # A larger matrix than a round may hold is a round of its own.
                    filled[key.group, rank] += max(4 * lot.numel * take, 0 if fitting else self.policy.chunk_bytes)
                    left, units = left + take, units - take
        for _, batches in sorted(rounds.items()):
            yield Chunk(SPLIT, self.peers.group, tuple(batches))
        for (group, _), found in sorted(lent.items()):
            yield Chunk(LENT, group, tuple(_batch(key, items) for (key, _), items in found.items()))

    def _lent_kind(self, lot: _Lot) -> BatchKey:
        """The key of lent matrices: no rank but the holder's has parts of them."""
        key, holder = lot.key, lot.peers.holder
        if key.mode == LOCAL:
            parts = tuple(key.q * (rank == holder) for rank in range(self.peers.ranks))
            return BatchKey(LENT, self.peers.group, key.m, key.n, key.summed_dim, parts)
        before, after = holder * self.tensor, (self.peers.ranks - holder - 1) * self.tensor
        parts = (*[0] * before, *key.parts, *[0] * after)
        return BatchKey(LENT, lot.peers.wide, key.m, key.n, key.dim, parts)

    def _widths(self, q: int, members: Sequence[int]) -> tuple[int, ...]:
        """How many columns of a split matrix each data-parallel rank gets."""
        step = COLUMNS if q % COLUMNS == 0 and q // COLUMNS >= len(members) else 1
        widths = [0] * self.peers.ranks
        for number, rank in enumerate(members):
            widths[rank] = step * even_part(q // step, len(members), number)
        return tuple(widths)

    def _whole(self, lot: _Lot) -> int:
        """Operations for one unit of a block."""
        return lot.each * self.orthogonalizer.flops(lot.key.m, lot.key.n)

    def _single(self, lot: _Lot) -> float:
        """Seconds of the products for one matrix."""
        return self.orthogonalizer.flops(lot.key.m, lot.key.n) / self.policy.machine.flops

    def _member(self, lot: _Lot, number: int) -> float:
        """Seconds of one of ``number`` ranks that split a matrix."""
        flops = member_flops(self.orthogonalizer, lot.key, number) / self.policy.machine.flops
        return flops + self._member_bytes(lot, number) / self.policy.machine.bytes

    def _member_bytes(self, lot: _Lot, number: int) -> float:
        """Bytes that one of ``number`` ranks sends for one matrix: in each step rows of a sum, and twice all rows."""
        p, width = lot.key.p, lot.key.q / number
        moved = p * p * (4 + 2 * self.orthogonalizer.dtype.itemsize) * (number - 1) / number
        return len(self.orthogonalizer.coefficients) * moved + p * width * self.policy.sizes.back

    def _sharing(self, lot: _Lot) -> int:
        """How many ranks of the holder share the work on one matrix."""
        return 1 if lot.key.mode == LOCAL or self.policy.mode == DUPLICATED else self.tensor

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


def member_flops(orthogonalizer: Orthogonalizer, key: BatchKey, number: int) -> float:
    """Operations of one of ``number`` ranks that split a matrix evenly."""
    p, width = key.p, key.q / number
    return orthogonalizer.member_flops(p, width, p / number)


def _some(lot: _Lot, first: int, units: int) -> MatrixSlice:
    start = lot.item.start + first
    return dataclasses.replace(lot.item, start=start, stop=start + units, count=units * lot.each)


def _batch(key: BatchKey, items: list[tuple[int, MatrixSlice]]) -> Batch:
    """A batch of lent matrices, in the order of the ranks that orthogonalize them."""
    items.sort(key=lambda pair: pair[0])
    counts = [0] * len(key.parts)
    for rank, item in items:
        counts[rank] += item.count
    return Batch(key, tuple(item for _, item in items), tuple(counts))
