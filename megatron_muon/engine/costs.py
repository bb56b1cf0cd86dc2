"""What the ranks of a tensor-parallel group need for matrices of one shape in each mode, and the cheapest mode."""

from __future__ import annotations

from megatron_muon.engine.modes import DISTRIBUTED, DUPLICATED, GRAM, OWNER, Cost, Machine, Sizes
from megatron_muon.engine.packing import triangle_numel
from megatron_muon.engine.plan import BatchKey
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer

ALTERNATIVES = (OWNER, GRAM, DISTRIBUTED)
"""What ``auto`` chooses from for each shape. ``duplicated`` would save a message where owners have less to do than that
takes; no step of a published model is shorter by more (``tests/unit/test_auto_alternatives.py``)."""

_NORM = 8
"""Bytes of the square of a norm."""


def can_share(mode: str, key: BatchKey, orthogonalizer: Orthogonalizer) -> bool:
    """Whether ranks can have a part of each matrix in a mode: for others each matrix needs a rank that has it whole.

    In ``gram`` they divide the longer side, or either side of a square: rows of a Gram matrix need each other. If rows
    are balanced, it is so in ``distributed`` too, and of squares the rows are balanced, as where they are whole. And
    the polynomials of ``gram`` need more bits than some types of numbers have.
    """
    own, longer = orthogonalizer.of(key.budget), key.dim == (-2 if key.m > key.n else -1)
    if mode == GRAM and own.restarts is None:
        return False
    if own.iteration.balanced:
        return longer or mode not in (GRAM, DISTRIBUTED)
    return longer or key.m == key.n or mode != GRAM


def cost_of(mode: str, key: BatchKey, count: int, orthogonalizer: Orthogonalizer, sizes: Sizes) -> Cost:
    """What the busiest rank does for matrices that are a chunk of their own and are divided evenly.

    Args:
        mode: any but ``auto`` and ``blockwise``.
        key: of the matrices; its own mode is ignored.
        count: number of matrices.
        orthogonalizer: knows what each shape costs.
        sizes: bytes of the elements that are sent.
    """
    orthogonalizer, ranks = orthogonalizer.of(key.budget), len(key.parts)
    p, q = sorted((key.m, key.n))
    others, most = ranks - 1, -(-count // ranks)
    local = count * p * q // ranks
    if mode == OWNER:
        sent = local * others / ranks * sizes.wire + most * p * q * others / ranks * sizes.back
        return Cost(most * orthogonalizer.flops(p, q), sent, 2)
    if mode == DUPLICATED:
        return Cost(count * orthogonalizer.flops(p, q), local * others * sizes.wire, 1)
    if mode == DISTRIBUTED:
        whole, part = (key.m, key.n // ranks) if key.dim == -1 else (key.n, key.m // ranks)
        steps = len(orthogonalizer.coefficients)
        reduced = 2 * others / ranks * count * (steps * triangle_numel(whole) * 4 + _NORM)
        return Cost(count * orthogonalizer.standard_flops(whole, part), reduced, steps + 1)
    triangle, runs = triangle_numel(p) * sizes.gram, orthogonalizer.segment_count
    sent = 2 * others / ranks * count * _NORM + runs * (count / ranks + most) * others * triangle
    sent += orthogonalizer.iteration.balanced * most * others * p * sizes.gram
    flops = runs * count * orthogonalizer.rectangular_flops(p, q // ranks) + most * orthogonalizer.polynomial_flops(p)
    return Cost(flops, sent, 1 + 2 * runs)


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
