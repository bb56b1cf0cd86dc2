"""Which data-parallel rank updates which whole weight: the work of Newton-Schulz is shared out evenly.

Layer-wise runs give each weight one owner. The step waits for the owner with most to do, and what it has to do are the
products of Newton-Schulz, which grow faster with the smaller side of a matrix than its number of elements. Weights lie
in buckets of the gradient buffer, of which every rank owns an equal part: an owner needs room there.

Everything here is arithmetic with integers on shapes and options, so that all ranks get the same answer from the same
model, tensor-parallel peers included (they hold shards of one shape, and costs are those of the whole weight).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_muon.engine.shards import Shard
from megatron_muon.orthogonalize import Iteration
from megatron_muon.routing.layout import BALLS, SCALAR, STIEFEL, Budget, layout_of
from megatron_muon.routing.predicate import _is_nonlinear_or_embedding

CLOSE_ENOUGH = 1000
"""Exchanges are looked for until the busiest rank has at most one part in this many more to do than the mean."""


@dataclass(frozen=True)
class Job:
    """One whole weight that some rank must update.

    Attributes:
        cost: operations of one update.
        size: elements that it takes in the owner's part of its bucket.
        bucket: number of the bucket of the gradient buffer that it lies in.
        owner: the rank that owns it so far.
        movable: whether another rank may have it.
    """

    cost: int
    size: int
    bucket: int
    owner: int
    movable: bool = True


def cost_of_weight(
    param: torch.Tensor,
    shard: Shard | None,
    iteration: Callable[[Budget | None], Iteration],
    stiefel: Callable[[int, int], int] | None = None,
) -> int:
    """Operations in the products of Newton-Schulz for one update of ``param``, of each rank that takes part.

    A step on a p x q matrix, p <= q, multiplies X X^T, where c is not 0 its square, and that with X: 4 p^2 q + 2 p^3
    operations. A weight in a ball of entries, rows or columns counts with its elements.

    Args:
        param: 2-D, or a 3-D stack of experts; annotated, see :mod:`megatron_muon.routing`.
        shard: how tensor parallelism divides it; None if it is whole. Its ranks share the work.
        iteration: of matrices of a budget.
        stiefel: gives the operations for one p x q matrix on the Stiefel manifold.

    Returns:
        The sum over its logical matrices, without rows under the scalar optimizer's rule; 0 for a weight that Muon does
        not update.

    Raises:
        ValueError: if the layout does not fit the weight.
    """
    if _is_nonlinear_or_embedding(param):
        return 0
    shape = tuple(param.shape) if shard is None else shard.whole_shape(param.shape)
    total, layout = 0, layout_of(param)
    coefficients = iteration(layout.budget).coefficients
    squares = sum(c != 0.0 for _, _, c in coefficients)
    for block in layout.blocks(shape):
        if layout.direction in BALLS:
            total += block.numel
        elif block.rule != SCALAR:
            p, q = sorted((block.rows, block.columns))
            plain = len(coefficients) * 4 * p * p * q + squares * 2 * p**3
            total += block.count * (plain if stiefel is None or layout.direction != STIEFEL else stiefel(p, q))
    return total if shard is None else total // shard.size


def assign_owners(jobs: Sequence[Job], ranks: int, room: Sequence[int]) -> list[int]:
    """Share jobs out so that the rank with most to do has as little as can be found.

    The costliest job first, of all buckets together, to the rank that has least to do and room for it (Graham's rule,
    https://doi.org/10.1137/0117039: with room everywhere the busiest rank gets at most 4/3 - 1 / (3 ranks) times what
    it must). Lack of room makes that worse; so jobs of the busiest rank are then moved, or exchanged for cheaper ones
    of their bucket, for as long as that relieves it. If the owners so far are better than the outcome, they are
    improved in that way instead: the result is never worse than they are.

    Args:
        jobs: in any order that is the same on all ranks; it decides ties.
        ranks: number of owners.
        room: for each bucket the size that one rank's jobs may take there. The owners so far keep to it.

    Returns:
        The owner of each job, 0 to ``ranks`` - 1.

    Raises:
        ValueError: if the owners so far are no ranks, or take more than ``room``.
    """
    given = _Assignment(jobs, ranks, room)
    for index, job in enumerate(jobs):
        if not 0 <= job.owner < ranks or not given.fits(job, job.owner):
            raise ValueError(f"job {index} has no room at rank {job.owner} of {ranks} in bucket {job.bucket}")
        given.put(index, job.owner)
    found = _costliest_first(jobs, ranks, room)
    _improve(found)
    if found.most > given.most:
        _improve(given)
        return given.owners
    return found.owners


class _Assignment:
    """Which rank owns which job, with the load and the used room of each rank."""

    def __init__(self, jobs: Sequence[Job], ranks: int, room: Sequence[int]) -> None:
        self.jobs, self.ranks, self.room = jobs, ranks, room
        self.owners = [-1] * len(jobs)
        self.loads = [0] * ranks
        self.taken = [[0] * ranks for _ in room]
        self.held: list[set[int]] = [set() for _ in range(ranks)]

    @property
    def most(self) -> int:
        """The load of the busiest rank."""
        return max(self.loads, default=0)

    def fits(self, job: Job, rank: int, instead_of: int = 0) -> bool:
        """Whether ``rank`` has room for ``job``, once something of size ``instead_of`` has left."""
        return self.taken[job.bucket][rank] + job.size - instead_of <= self.room[job.bucket]

    def put(self, index: int, rank: int) -> None:
        """Give a job to ``rank``, taking it from the owner that it has."""
        job, before = self.jobs[index], self.owners[index]
        if before >= 0:
            self.loads[before] -= job.cost
            self.taken[job.bucket][before] -= job.size
            self.held[before].remove(index)
        self.owners[index] = rank
        self.held[rank].add(index)
        self.loads[rank] += job.cost
        self.taken[job.bucket][rank] += job.size

    @property
    def is_close_enough(self) -> bool:
        """Whether the busiest rank has hardly more to do than all have on average."""
        total = sum(self.loads)
        return (self.most * self.ranks - total) * CLOSE_ENOUGH <= total

    def idlest(self, job: Job) -> int | None:
        """The rank with least to do that has room for a job; None if there is no room."""
        taken, most = self.taken[job.bucket], self.room[job.bucket] - job.size
        fitting = (rank for rank in range(self.ranks) if taken[rank] <= most)
        return min(fitting, key=lambda rank: (self.loads[rank], taken[rank], rank), default=None)

    def by_bucket(self, rank: int) -> dict[int, list[int]]:
        """The movable jobs of a rank in each bucket, only one of those with the same cost and size."""
        found: dict[int, list[int]] = {}
        seen = set()
        for index in sorted(self.held[rank]):
            job = self.jobs[index]
            key = (job.bucket, job.cost, job.size)
            if job.movable and key not in seen:
                seen.add(key)
                found.setdefault(job.bucket, []).append(index)
        return found

    def most_after(self, index: int, other: int, rank: int) -> int:
        """The greater load of two ranks after ``rank`` has taken a job, and given ``other`` for it (-1: nothing)."""
        more = self.jobs[index].cost - (self.jobs[other].cost if other >= 0 else 0)
        return max(self.loads[self.owners[index]] - more, self.loads[rank] + more)

    def can_exchange(self, index: int, other: int, rank: int) -> bool:
        """Whether there is room if ``rank`` takes job ``index`` and gives job ``other`` for it (-1: nothing)."""
        job, owner = self.jobs[index], self.owners[index]
        if other < 0:
            return self.fits(job, rank)
        back = self.jobs[other]
        return self.fits(job, rank, back.size) and self.fits(back, owner, job.size)


def _costliest_first(jobs: Sequence[Job], ranks: int, room: Sequence[int]) -> _Assignment:
    """Graham's rule. A bucket in which it finds no room for some job keeps its owners, and the others start again."""
    kept: set[int] = set()
    while True:
        found = _Assignment(jobs, ranks, room)
        free = [index for index, job in enumerate(jobs) if job.movable and job.bucket not in kept]
        for index in set(range(len(jobs))).difference(free):
            found.put(index, jobs[index].owner)
        for index in sorted(free, key=lambda index: (-jobs[index].cost, -jobs[index].size, index)):
            rank = found.idlest(jobs[index])
            if rank is None:
                kept.add(jobs[index].bucket)
                break
            found.put(index, rank)
        else:
            return found


def _improve(found: _Assignment) -> None:
    """Relieve the busiest rank for as long as a move or an exchange does."""
    while not found.is_close_enough:
        relief = _relief(found)
        if relief is None:
            return
        index, other, rank = relief
        busiest = found.owners[index]
        found.put(index, rank)
        if other >= 0:
            found.put(other, busiest)


def _relief(found: _Assignment) -> tuple[int, int, int] | None:
    """What the busiest rank should give away.

    Returns:
        the job, the one that comes back for it or -1, and the rank that takes part: the idlest with which both have
        less to do afterwards than the busiest has now, by as much as possible; None if there is no such rank.
    """
    busiest = found.loads.index(found.most)
    held = found.by_bucket(busiest)
    for rank in sorted(range(found.ranks), key=lambda rank: (found.loads[rank], rank)):
        theirs = found.by_bucket(rank)
        ways = [
            (found.most_after(index, other, rank), index, other)
            for bucket, mine in held.items()
            for index in mine
            for other in (-1, *theirs.get(bucket, ()))
            if found.can_exchange(index, other, rank)
        ]
        best = min(ways, default=None)
        if best is not None and best[0] < found.most:
            return best[1], best[2], rank
    return None
