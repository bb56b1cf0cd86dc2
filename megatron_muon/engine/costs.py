"""What the ranks of a tensor-parallel group need for matrices of one shape in each mode, and the cheapest mode."""

from __future__ import annotations

import dataclasses

from megatron_muon.engine.modes import DISTRIBUTED, DIVIDED, GRAM, OWNED, OWNER, SPLIT, Cost, Machine, Sizes
from megatron_muon.engine.packing import even_part
from megatron_muon.engine.plan import Batch, BatchKey, Chunk, MatrixSlice
from megatron_muon.engine.prediction import RankWork
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer

ALTERNATIVES = (OWNER, GRAM, DISTRIBUTED)
"""What ``auto`` chooses from for each shape. ``duplicated`` would save a message where owners have less to do than that
takes; no step of a published model is shorter by more (``tests/unit/test_auto_alternatives.py``)."""


def can_share(mode: str, key: BatchKey, orthogonalizer: Orthogonalizer) -> bool:
    """Whether ranks can have a part of each matrix in a mode: for others each matrix needs a rank that has it whole.

    In ``gram`` they divide the longer side, or either side of a square: rows of a Gram matrix need each other. If rows
    are balanced, it is so in ``distributed`` too, and of squares the rows are balanced, as where they are whole. And
    the polynomials of ``gram`` need more bits than some types of numbers have. Pieces need
    an owner.
    """
    if key.pieces:
        return mode == OWNER
    own, longer = orthogonalizer.of(key.budget), key.dim == (-2 if key.m > key.n else -1)
    if mode == GRAM and own.restarts is None:
        return False
    if own.iteration.balanced:
        return longer or mode not in DIVIDED
    return longer or key.m == key.n or mode != GRAM


def cost_of(mode: str, key: BatchKey, count: int, orthogonalizer: Orthogonalizer, sizes: Sizes) -> Cost:
    """What the rank that owns most does for matrices that are a chunk of their own, shared out evenly.

    Args:
        mode: any but ``auto`` and ``blockwise``.
        key: of the matrices; its own mode is ignored.
        count: number of matrices.
        orthogonalizer: knows what each shape costs.
        sizes: bytes of the elements that are sent.
    """
    ranks = range(len(key.parts))
    counts = tuple(even_part(count, len(ranks), rank) for rank in ranks) if mode in OWNED else ()
    batch = Batch(dataclasses.replace(key, mode=mode), (MatrixSlice(0, 0, 0, count, count, key.m, key.n),), counts)
    return RankWork(orthogonalizer, sizes, 0).cost(Chunk(mode, key.group, (batch,)))


def member_cost(key: BatchKey, number: int, orthogonalizer: Orthogonalizer, sizes: Sizes) -> Cost:
    """What one of ``number`` ranks does, none of which has held it, that split a matrix evenly.

    Args:
        key: of the matrix as its holder has it, whole.
        number: of ranks.
        orthogonalizer: knows what each shape costs.
        sizes: bytes of the elements that are sent.
    """
    split = dataclasses.replace(key, mode=SPLIT, dim=key.summed_dim, parts=(*[0] * number, key.q))
    widths = (*(even_part(key.q, number, rank) for rank in range(number)), 0)
    batch = Batch(split, (MatrixSlice(0, 0, 0, 1, 1, key.m, key.n),), widths)
    return RankWork(orthogonalizer, sizes, 0).cost(Chunk(SPLIT, "", (batch,)))


def cheapest_mode(
    key: BatchKey, count: int, orthogonalizer: Orthogonalizer, sizes: Sizes, machine: Machine, *, without: str = ""
) -> str:
    """The one of :data:`ALTERNATIVES` that takes the least time by :func:`cost_of`; ties go to the first.

    Args:
        key: of the matrices; its own mode is ignored.
        count: number of matrices.
        orthogonalizer: knows what each shape costs.
        sizes: bytes of the elements that are sent.
        machine: rates that turn operations and bytes into seconds.
        without: a mode that is not to be chosen.
    """
    evenly = len(set(key.parts)) == 1
    candidates = [mode for mode in ALTERNATIVES if mode != without and (evenly or mode != GRAM)]
    candidates = [mode for mode in candidates if can_share(mode, key, orthogonalizer)] or [OWNER]
    return min(candidates, key=lambda mode: cost_of(mode, key, count, orthogonalizer, sizes).seconds(machine))
