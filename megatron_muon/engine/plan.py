"""What a plan of a step is: which matrices of which weights go together, in which batches, with which messages.

:mod:`megatron_muon.engine.planner` makes it, :mod:`megatron_muon.engine.execute` carries it out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megatron_muon.engine.modes import DIVIDED, LOCAL
from megatron_muon.routing.blocks import BlockRange
from megatron_muon.routing.layout import Budget, MatrixLayout


@dataclass(frozen=True)
class Peers:
    """The ranks of a data-parallel group, one of which holds a weight's state: others may orthogonalize for it.

    Attributes:
        group: its name.
        ranks: its size.
        holder: number of the rank that holds the weight.
        wide: name of the group of all tensor-parallel ranks of these data-parallel ranks, numbered tensor first. Empty
            if there is no such group: then matrices that tensor parallelism divides stay with their holder.
        span: how many consecutive ranks of the run they reach over: a node, or more.
    """

    group: str
    ranks: int
    holder: int
    wide: str = ""
    span: int = 1


class Piece(NamedTuple):
    """What one rank holds of a weight, or of each of its matrices, where ranks do not hold equal shards in their order.

    Attributes:
        rows: its first row, and the one after its last.
        columns: its first column, and the one after its last.
        copy: number of the copy that it belongs to: the pieces of one copy make up the whole.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    copy: int = 0


@dataclass(frozen=True)
class Weight:
    """What a plan knows of one weight.

    Attributes:
        shape: of one rank's shard, or of the weight if it is whole.
        layout: its logical matrices.
        dim: the divided dimension of its matrices, -2 or -1; 0 if it is whole.
        group: name of the group that divides it; empty if it is whole.
        ranks: number of shards.
        bucket: number, in the order in which buckets are to be done, of the one in which its result travels to
            data-parallel ranks.
        peers: who else may orthogonalize its matrices; None: nobody.
        pieces: what each rank of the group holds; empty: equal shards in rank order.
    """

    shape: tuple[int, ...]
    layout: MatrixLayout
    dim: int = 0
    group: str = ""
    ranks: int = 1
    bucket: int = 0
    peers: Peers | None = None
    pieces: tuple[Piece, ...] = ()

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Shape of the whole weight."""
        shape = list(self.shape)
        if self.pieces:
            shape[-2:] = max(piece.rows[1] for piece in self.pieces), max(piece.columns[1] for piece in self.pieces)
        elif self.dim:
            shape[self.dim] *= self.ranks
        return tuple(shape)

    def first_row(self, rank: int) -> int:
        """Number of the first row of a rank's shard in the whole weight."""
        if self.pieces:
            return self.pieces[rank].rows[0]
        return rank * self.shape[-2] if self.dim == -2 else 0

    @property
    def is_broken(self) -> bool:
        """Whether the shards cut through periods of the layout, by rows or, where rows are divided too, by columns."""
        if not self.pieces:
            return self.dim == -2 and not self.layout.fits(self.shape[-2])
        rows, columns = self.whole_shape[-2:]
        cut_rows = {piece.rows for piece in self.pieces} != {(0, rows)}
        if cut_rows and self.layout.sections and {piece.columns for piece in self.pieces} != {(0, columns)}:
            return True
        return not all(self.layout.fits(edge) for piece in self.pieces for edge in piece.rows)

    def cuts(self, block: int) -> bool:
        """Whether each rank has parts of a block's matrices, and not some of them whole, such as heads."""
        if self.pieces and self.dim != -2:  # its columns are divided, or ranks have copies of all of it
            return True
        return self.dim == -1 or (self.dim == -2 and (self.is_broken or not self.layout.matrix_rows(block)))


@dataclass(frozen=True)
class MatrixSlice:
    """Some matrices of one block of one weight.

    Attributes:
        weight: index of the weight.
        block: index of the block in the weight's layout.
        start: first unit (see :class:`megatron_muon.routing.blocks.BlockRange`).
        stop: after the last unit.
        count: number of matrices.
        rows: m of the logical matrices.
        columns: n of the logical matrices.
    """

    weight: int
    block: int
    start: int
    stop: int
    count: int
    rows: int
    columns: int

    def block_range(self, weight: Weight, rank: int) -> BlockRange:
        """Where the matrices lie in the shard of ``rank``, as far as that holds them."""
        return BlockRange(weight.layout, self.block, self.start, self.stop, weight.first_row(rank), weight.is_broken)


@dataclass(frozen=True)
class BatchKey:
    """What the matrices of a batch have in common.

    Attributes:
        mode: how they are exchanged.
        group: name of the group that divides them; empty if they are whole on this rank.
        m: rows of a matrix.
        n: its columns.
        dim: the divided dimension, -2 or -1; 0 if they are whole.
        parts: size of the divided dimension on each rank; for lent matrices 0 on all ranks but those that hold them.
        budget: what their iteration takes, see :meth:`megatron_muon.orthogonalize.Orthogonalizer.of`.
        pieces: where each rank's part of a matrix lies, if not in rank order along ``dim``; ``parts`` then has the
            elements of each.
    """

    mode: str
    group: str
    m: int
    n: int
    dim: int = 0
    parts: tuple[int, ...] = ()
    budget: Budget | None = None
    pieces: tuple[Piece, ...] = ()

    @cached_property
    def copies(self) -> tuple[int, ...]:
        """The number of the copy that each rank has a part of; empty if there is only one."""
        found = tuple(piece.copy for piece in self.pieces)
        return found if len(set(found)) > 1 else ()

    def feeds(self, holder: int, worker: int) -> bool:
        """Whether ``worker`` gets its matrices from the part of ``holder``: of several copies from its own."""
        return not self.copies or self.copies[holder] == self.copies[worker]

    def part(self, rank: int) -> tuple[int, int]:
        """Shape of what ``rank`` holds of one matrix."""
        if self.pieces:
            (top, bottom), (left, right), _ = self.pieces[rank]
            return bottom - top, right - left
        if self.dim == 0:
            return self.m, self.n
        return (self.parts[rank], self.n) if self.dim == -2 else (self.m, self.parts[rank])

    def part_numel(self, rank: int) -> int:
        """Elements of what ``rank`` holds of one matrix."""
        rows, columns = self.part(rank)
        return rows * columns

    @property
    def summed_dim(self) -> int:
        """The dimension that Gram matrices are sums over: the longer one, but where ranks add up their parts of them.

        That is in ``gram``, which divides the longer one anyway or either one of a square, and in ``distributed``.
        """
        if self.mode in DIVIDED:
            return self.dim
        return -2 if self.m > self.n else -1

    @property
    def p(self) -> int:
        """Rows of the Gram matrix."""
        return self.m if self.summed_dim == -1 else self.n

    @property
    def q(self) -> int:
        """How many terms each of its elements is the sum of."""
        return self.n if self.summed_dim == -1 else self.m


@dataclass(frozen=True)
class Batch:
    """Matrices of one key in one chunk.

    Attributes:
        key: what they have in common.
        items: the matrices, in the order in which they lie in the batch.
        counts: how many of the matrices each rank of the group owns, in the order of the batch; empty in modes without
            owners. In ``split``, how much of the longer side of each matrix each rank gets.
    """

    key: BatchKey
    items: tuple[MatrixSlice, ...]
    counts: tuple[int, ...] = ()

    @cached_property
    def count(self) -> int:
        """Number of matrices."""
        return sum(item.count for item in self.items)


@dataclass(frozen=True)
class Chunk:
    """Matrices that are exchanged together.

    Attributes:
        mode: how all its batches are exchanged.
        group: name of the group whose ranks exchange them; empty if they are whole on this rank.
        batches: the matrices; each batch has one shape. In modes whose ranks meet in each step of the iteration, all
            have one budget.
    """

    mode: str
    group: str
    batches: tuple[Batch, ...]

    @property
    def budget(self) -> Budget | None:
        """That of all its batches, if they have one."""
        return self.batches[0].key.budget


@dataclass(frozen=True)
class Plan:
    """The work of one step.

    Attributes:
        weights: the weights whose matrices are orthogonalized.
        chunks: the chunks, in the order in which they are carried out.
    """

    weights: tuple[Weight, ...]
    chunks: tuple[Chunk, ...]

    def digest(self, group: str, numbers: str = "") -> bytes:
        """32 bytes that the ranks of ``group`` compare: a hash of everything in the plan that concerns the group.

        Args:
            group: name of the group.
            numbers: text of what else must be the same on all ranks: dtypes, coefficients and kernels.
        """
        # Weights are counted within the group: ranks that share it may differ in the weights of another.
        mine = [chunk for chunk in self.chunks if chunk.group == group]
        used = {item.weight for chunk in mine for batch in chunk.batches for item in batch.items}
        places = {index: place for place, index in enumerate(sorted(used))}

        def renumbered(batch: Batch) -> list[MatrixSlice]:
            return [dataclasses.replace(item, weight=places[item.weight]) for item in batch.items]

        concerned = [[(batch.key, batch.counts, renumbered(batch)) for batch in chunk.batches] for chunk in mine]
        return hashlib.sha256(f"{numbers} {concerned}".encode()).digest()

    def exchanged(self, group: str) -> list[int]:
        """Indices of the weights of which the ranks of ``group`` exchange something."""
        chunks = [chunk for chunk in self.chunks if chunk.group == group]
        return sorted({item.weight for chunk in chunks for batch in chunk.batches for item in batch.items})

    @property
    def before_shared(self) -> set[MatrixSlice]:
        """The matrices that are written before the last messages to data-parallel ranks are sent.

        They are those of the first chunk, if that needs no exchange.
        """
        chunk = next(iter(self.chunks), None)
        batches = chunk.batches if chunk is not None and chunk.mode == LOCAL else ()
        return {item for batch in batches for item in batch.items}

    def groups(self) -> list[str]:
        """Names of the groups that exchange something, in the order of first use."""
        return list(dict.fromkeys(chunk.group for chunk in self.chunks if chunk.group))

    def sub_plans(self, chunks: int) -> Iterator[Plan]:
        """Plans of at most ``chunks`` chunks, for work that must go over some matrices again before it takes others.

        Each is of one group, and groups come in the order of their names: the ranks of one may differ in the chunks of
        another, and must meet in the same order all the same.
        """
        for group in sorted({chunk.group for chunk in self.chunks}):
            mine = [chunk for chunk in self.chunks if chunk.group == group]
            for some in itertools.batched(mine, chunks):
                yield dataclasses.replace(self, chunks=some)
