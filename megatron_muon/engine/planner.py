"""Who orthogonalizes what, in which batches, with which messages: decided before the step, from shapes alone.

Matrices of one shape that are divided in one way share a *batch key*. Those of one key are cut into chunks of bounded
size, whose matrices are shared out over the tensor-parallel ranks. A plan is a function of shapes, group sizes and
options, never of the rank: every rank of a group makes the same one, and they compare
:meth:`megatron_muon.engine.plan.Plan.digest` before they trust it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_muon.engine.costs import can_share, cheapest_mode, cost_of
from megatron_muon.engine.modes import AUTO, BLOCKWISE, DIVIDED, LOCAL, OWNED, OWNER, Machine, Sizes
from megatron_muon.engine.plan import Batch, BatchKey, Chunk, MatrixSlice, Piece, Plan, Weight
from megatron_muon.errors import ConfigError
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer
from megatron_muon.routing.blocks import block_rows_before, units_of
from megatron_muon.routing.layout import MSIGN, SCALAR, Block

Stages = Mapping[str, Mapping[int, int]]
"""The stage of each bucket, by the name of the group (empty for matrices that are whole on the rank)."""


@dataclass(frozen=True)
class Policy:
    """The options and rates by which a step is planned.

    Attributes:
        mode: see :mod:`megatron_muon.engine.modes`.
        sizes: bytes of the elements that are sent.
        chunk_bytes: bound of the float32 matrices that a rank holds whole in one chunk; one larger matrix is a chunk.
        machine: rates by which ``auto`` compares modes.
        local_bytes: the same bound of chunks that exchange nothing; 0: ``chunk_bytes``.
    """

    mode: str
    sizes: Sizes
    chunk_bytes: int
    machine: Machine
    local_bytes: int = 0


def make_plan(
    weights: Sequence[Weight],
    policy: Policy,
    orthogonalizer: Orthogonalizer,
    modes: Mapping[str, str] | None = None,
    stages: Stages | None = None,
    items: Sequence[tuple[BatchKey, MatrixSlice]] | None = None,
    shared: Sequence[Chunk] = (),
) -> Plan:
    """Plan a step.

    Args:
        weights: the weights of this rank; those of one group are the same on all its ranks.
        policy: mode and bounds.
        orthogonalizer: knows what each shape costs.
        modes: the modes of some groups, in place of the policy's.
        stages: for some groups, in which stage each bucket is done; the buckets of other groups are done together.
        items: the matrices to plan, see :func:`items_of`; None: all matrices of the weights.
        shared: chunks of data-parallel groups, which come before those that each rank does for itself.

    Raises:
        ConfigError: for a weight that the mode cannot treat.
    """
    groups: dict[BatchKey, list[MatrixSlice]] = defaultdict(list)
    for key, item in items_of(weights, policy.mode) if items is None else items:
        groups[key].append(item)
    chosen = _with_modes(groups, policy, orthogonalizer, modes or {})
    staged = [(stage, key, some) for key, mine in chosen for stage, some in _staged(key, mine, weights, stages)]

    def place(each: tuple[int, BatchKey, list[MatrixSlice]]) -> tuple[Any, ...]:
        """Costliest first: what comes later evens out the owners' loads."""
        stage, key, _ = each
        return key.mode, key.group, stage, _alone(key), -_rough_flops(key, orthogonalizer), repr(key)

    staged.sort(key=place)
    maker = _Chunks(policy, orthogonalizer)
    for stage, key, some in staged:
        maker.add(key, some, stage)
    chunks: list[Chunk] = []
    for _, group in itertools.groupby(sorted(maker.finish(), key=lambda pair: pair[0]), key=lambda pair: pair[0]):
        of_stage = [chunk for _, chunk in group]
        local = [chunk for chunk in of_stage if chunk.mode == LOCAL]
        # A chunk without exchange goes first: it is computed while the first exchange is under way.
        chunks += [*local[:1], *(chunk for chunk in of_stage if chunk.mode != LOCAL), *local[1:]]
    first = int(bool(chunks) and chunks[0].mode == LOCAL)
    return Plan(tuple(weights), (*chunks[:first], *shared, *chunks[first:]))


def _staged(
    key: BatchKey, items: Sequence[MatrixSlice], weights: Sequence[Weight], stages: Stages | None
) -> Iterator[tuple[int, list[MatrixSlice]]]:
    """Matrices of one key by the stage in which they are done."""
    of_bucket = (stages or {}).get(key.group, {})
    found: dict[int, list[MatrixSlice]] = defaultdict(list)
    for item in items:
        found[of_bucket.get(weights[item.weight].bucket, 0)].append(item)
    yield from sorted(found.items())


def items_of(weights: Sequence[Weight], mode: str) -> list[tuple[BatchKey, MatrixSlice]]:
    """All matrices of all weights, with their keys in mode ``auto`` if they must be exchanged.

    Raises:
        ConfigError: for a weight that the mode cannot treat.
    """
    found: list[tuple[BatchKey, MatrixSlice]] = []
    for index, weight in enumerate(weights):
        check_weight(weight, mode)
        found += _items(index, weight, mode)
    return found


def check_weight(weight: Weight, mode: str, period: int = 1) -> None:
    """Refuse what cannot be planned.

    Args:
        weight: to be orthogonalized.
        mode: of tensor parallelism.
        period: of steps, of which but one take each shard by itself.

    Raises:
        ValueError: if the layout does not fit the weight.
        ConfigError: if shards cut through what must stay whole.
    """
    layout = weight.layout
    if (weight.dim or weight.pieces) and layout.is_turned:
        raise ConfigError(
            f"a {layout.kind} weight of (inputs, outputs), or of experts in turns, that ranks divide: leave it whole, "
            "use a layer of (outputs, inputs), or give it to Adam (--muon-param-rule 'NAME=adam')."
        )
    layout.blocks(weight.whole_shape)
    if not weight.is_broken:
        return
    heads = any(section.matrix_rows for section in layout.sections)
    asked, way_out = f"--muon-tp-mode {mode}", "Use --muon-tp-mode auto"
    if period > 1 and layout.direction == MSIGN:
        asked, way_out = f"--muon-blockwise-period {period}", "Leave it out"
    elif mode != BLOCKWISE and not (layout.stacked and heads):
        return
    raise ConfigError(
        f"{asked}: a {layout.kind} weight with {weight.shape[-2]} rows on each of {weight.ranks} tensor-parallel ranks "
        f"does not hold whole sections (periods of {layout.period} rows). {way_out}, or treat the weight as one matrix "
        "(--muon-param-rule 'NAME=whole')."
    )


def _items(index: int, weight: Weight, mode: str) -> Iterator[tuple[BatchKey, MatrixSlice]]:
    """The matrices of one weight, with their keys in mode ``auto`` if they must be exchanged."""
    shape = weight.shape if mode == BLOCKWISE else weight.whole_shape
    broken = weight.is_broken
    for number, block in enumerate(weight.layout.blocks(shape)):
        if block.rule == SCALAR or not block.numel:
            continue
        heads = weight.layout.matrix_rows(number) > 0
        if mode == BLOCKWISE or not weight.cuts(number):
            if not weight.pieces or 0 not in weight.shape:  # a rank may have none of them
                yield _whole_item(index, number, weight)
        elif broken and heads:
            for head in range(block.count):
                yield _divided_item(index, number, weight, block, head, head + 1, 1)
        else:
            units = units_of(weight.layout, number, shape, broken)
            yield _divided_item(index, number, weight, block, 0, units, block.count)


def _whole_item(index: int, number: int, weight: Weight) -> tuple[BatchKey, MatrixSlice]:
    """Matrices that this rank holds whole."""
    block = weight.layout.blocks(weight.shape)[number]
    units = units_of(weight.layout, number, weight.shape, False)
    item = MatrixSlice(index, number, 0, units, block.count, block.rows, block.columns)
    return BatchKey(LOCAL, "", block.rows, block.columns, budget=weight.layout.budget), item


def _divided_item(
    index: int, number: int, weight: Weight, block: Block, start: int, stop: int, count: int
) -> tuple[BatchKey, MatrixSlice]:
    """Matrices that the ranks of a group hold parts of."""
    pieces = _pieces_of(weight, number, block, start)
    if pieces:
        parts = tuple((piece.rows[1] - piece.rows[0]) * (piece.columns[1] - piece.columns[0]) for piece in pieces)
    elif weight.dim == -1:
        parts = (weight.shape[-1],) * weight.ranks
    else:
        parts = tuple(_rows_on(weight, number, block, start, rank) for rank in range(weight.ranks))
    item = MatrixSlice(index, number, start, stop, count, block.rows, block.columns)
    budget = weight.layout.budget
    return BatchKey(AUTO, weight.group, block.rows, block.columns, weight.dim, parts, budget, pieces), item


def _pieces_of(weight: Weight, number: int, block: Block, start: int) -> tuple[Piece, ...]:
    """The piece of each rank of a block's matrix; if shards cut through periods, of matrix number ``start``."""
    whole = 0, weight.whole_shape[-2]
    edges = [
        (0, block.rows) if its.rows == whole else _edges(weight, number, block, start, its.rows)
        for its in weight.pieces
    ]
    return tuple(its._replace(rows=rows) for its, rows in zip(weight.pieces, edges, strict=True))


def _rows_on(weight: Weight, number: int, block: Block, start: int, rank: int) -> int:
    """How many rows of a block's matrix lie on ``rank``; if the block has several, of matrix number ``start``."""
    rows = weight.shape[-2]
    low, high = _edges(weight, number, block, start, (rank * rows, (rank + 1) * rows))
    return high - low


def _edges(weight: Weight, number: int, block: Block, start: int, rows: tuple[int, int]) -> tuple[int, int]:
    """Rows of a block's matrix among some rows of the weight: the first, and the one after the last."""
    low, high = (block_rows_before(weight.layout, number, row) for row in rows)
    if not weight.layout.matrix_rows(number):
        return low, high
    first = start * block.rows
    low, high = (min(max(edge - first, 0), block.rows) for edge in (low, high))
    return low, high


def _with_modes(
    groups: Mapping[BatchKey, list[MatrixSlice]],
    policy: Policy,
    orthogonalizer: Orthogonalizer,
    modes: Mapping[str, str],
) -> list[tuple[BatchKey, list[MatrixSlice]]]:
    """Give matrices that must be exchanged their mode.

    In ``auto``, as many matrices of a key as give every rank the same number get the mode that is cheapest for that
    key. The rests of all keys of a group, less than one matrix for each rank, are judged together: one rank may take
    the rest of one key, and another that of the next.
    """
    chosen: list[tuple[BatchKey, list[MatrixSlice]]] = []
    rests: dict[str, list[tuple[BatchKey, list[MatrixSlice]]]] = defaultdict(list)
    for key, items in groups.items():
        mode = modes.get(key.group, policy.mode)
        if key.mode == LOCAL:
            chosen.append((key, items))
        elif mode != AUTO:
            chosen.append((_in_mode(key, mode, orthogonalizer), items))
        else:
            count = _count(items)
            even, rest = cut_items(items, count - count % len(key.parts))
            if even:
                machine = policy.machine.over(len(key.parts))
                mode = cheapest_mode(key, _count(even), orthogonalizer, policy.sizes, machine)
                chosen.append((_in_mode(key, mode, orthogonalizer), even))
            if rest:
                rests[key.group].append((key, rest))
    for group in rests.values():
        chosen += _spread(group, policy, orthogonalizer)
    return chosen


def _spread(
    rests: list[tuple[BatchKey, list[MatrixSlice]]], policy: Policy, orthogonalizer: Orthogonalizer
) -> list[tuple[BatchKey, list[MatrixSlice]]]:
    """Modes for rests of keys, less than one matrix a rank: the costliest may be shared by all, others get owners."""
    rests = sorted(rests, key=lambda pair: (-_rough_flops(pair[0], orthogonalizer), repr(pair[0])))
    ranks = len(rests[0][0].parts)
    sizes, machine = policy.sizes, policy.machine.over(ranks)
    counts = [(key, _count(items)) for key, items in rests]
    split = [cheapest_mode(*each, orthogonalizer, sizes, machine, without=OWNER) for each in counts]
    of_split = [
        cost_of(mode, *each, orthogonalizer, sizes).seconds(machine) for mode, each in zip(split, counts, strict=True)
    ]
    sent = [cost_of(OWNER, *each, orthogonalizer, sizes).bytes / machine.bytes for each in counts]

    def seconds(number: int) -> float:
        """Time if all ranks share the matrices of the first ``number`` keys, and those of the others have owners."""
        loads = [0] * ranks
        for key, count in counts[number:]:
            for _ in range(count):
                loads[loads.index(min(loads))] += orthogonalizer.of(key.budget).flops(key.m, key.n)
        messages = 2 * machine.latency if number < len(rests) else 0.0
        return sum(of_split[:number]) + sum(sent[number:]) + messages + max(loads) / machine.flops

    number = min(range(len(rests) + 1), key=seconds)
    modes = [*split[:number], *[OWNER] * (len(rests) - number)]
    return [(_in_mode(key, mode, orthogonalizer), items) for (key, items), mode in zip(rests, modes, strict=True)]


def _in_mode(key: BatchKey, mode: str, orthogonalizer: Orthogonalizer) -> BatchKey:
    """The key in a mode; what ranks cannot share in it has owners."""
    return dataclasses.replace(key, mode=mode if can_share(mode, key, orthogonalizer) else OWNER)


def _alone(key: BatchKey) -> str:
    """What a chunk must have alone: of a mode whose ranks meet in each step, its number of steps; which rank has which
    copy, since sums over ranks count one."""
    return repr(key.budget) if key.mode in DIVIDED else repr(key.copies) if key.copies else ""


class _Chunks:
    """Fills chunks with matrices and shares them out."""

    def __init__(self, policy: Policy, orthogonalizer: Orthogonalizer) -> None:
        self.policy, self.orthogonalizer = policy, orthogonalizer
        self.done: list[tuple[int, Chunk]] = []
        self.open: list[Batch] = []
        self.stage, self.kind = 0, ("", "", 0, "")
        self.room = 0
        self.load: dict[str, list[int]] = {}
        self.chunk_load: dict[int, int] = {}

    def add(self, key: BatchKey, items: list[MatrixSlice], stage: int) -> None:
        """Add all matrices of one key that are done in a stage."""
        kind = key.mode, key.group, stage, _alone(key)
        if kind != self.kind:
            self._close()
        self.kind, self.stage = kind, stage
        size = 4 * key.m * key.n
        while items:
            if not self.open:
                # Owners share the chunk: each holds the bound. Of divided matrices no rank holds one whole.
                shared = key.mode in OWNED or key.mode in DIVIDED
                ranks = len(key.parts) if shared else 1
                local = self.policy.local_bytes if key.mode == LOCAL else 0
                self.room = max(local or self.policy.chunk_bytes, size) * ranks
            elif size > self.room:
                self._close()
                continue
            piece, items = cut_items(items, self._take(key, self.room // size, _count(items)))
            self.room -= size * _count(piece)
            self.open.append(Batch(key, tuple(piece), self._share_out(key, _count(piece))))
            if items:
                self._close()

    @staticmethod
    def _take(key: BatchKey, room: int, left: int) -> int:
        """How many matrices to put into the open chunk: even shares if more are to follow."""
        number = max(1, min(room, left))
        if key.mode in OWNED and len(key.parts) <= number < left:
            number -= number % len(key.parts)
        return number

    def finish(self) -> list[tuple[int, Chunk]]:
        """All chunks, with their stages."""
        self._close()
        return self.done

    def _close(self) -> None:
        if self.open:
            key = self.open[0].key
            self.done.append((self.stage, Chunk(key.mode, key.group, tuple(self.open))))
            self.open, self.chunk_load = [], {}

    def _share_out(self, key: BatchKey, number: int) -> tuple[int, ...]:
        """Matrices for each rank: equally many, and the odd ones to who has least to do, here and before.

        In ``gram`` nobody gets two of the odd ones: all ranks would gather as many triangles as that one has.
        """
        if key.mode not in OWNED:
            return ()
        ranks = len(key.parts)
        load = self.load.setdefault(key.group, [0] * ranks)
        counts, cost = [0] * ranks, self.orthogonalizer.of(key.budget).flops(key.m, key.n)

        def give(rank: int, count: int) -> None:
            counts[rank] += count
            load[rank] += count * cost
            self.chunk_load[rank] = self.chunk_load.get(rank, 0) + count * cost

        for rank in range(ranks):
            give(rank, number // ranks)
        for _ in range(number % ranks):
            free = [rank for rank in range(ranks) if key.mode == OWNER or counts[rank] == number // ranks]
            give(min(free, key=lambda rank: (self.chunk_load[rank], load[rank], rank)), 1)
        return tuple(counts)


def _rough_flops(key: BatchKey, orthogonalizer: Orthogonalizer) -> int:
    """Roughly in proportion to the operations that one matrix takes, to sort keys by cost."""
    p, q = sorted((key.m, key.n))
    return p * p * (q + p) * len(orthogonalizer.of(key.budget).coefficients)


def _count(items: Sequence[MatrixSlice]) -> int:
    return sum(item.count for item in items)


def cut_items(items: Sequence[MatrixSlice], number: int) -> tuple[list[MatrixSlice], list[MatrixSlice]]:
    """The first ``number`` matrices, rounded up to whole units, and the others."""
    first: list[MatrixSlice] = []
    for index, item in enumerate(items):
        if number <= 0:
            return first, list(items[index:])
        units = item.stop - item.start
        each = item.count // units
        take = min(units, -(-number // each))
        first.append(dataclasses.replace(item, stop=item.start + take, count=take * each))
        number -= take * each
        if take < units:
            rest = dataclasses.replace(item, start=item.start + take, count=item.count - take * each)
            return first, [rest, *items[index + 1 :]]
    return first, []
