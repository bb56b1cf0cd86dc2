"""The weights of a pipeline stage, and what its ranks hold of them: weights, gradients, optimizer state."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_muon.engine import plan as engine
from megatron_muon.optimizers.engines import DENSE, EXPERT
from megatron_muon.planning.accounts import (
    ALL,
    COPIES,
    FLOAT32_BYTES,
    GRADIENTS,
    MASTERS,
    MUON,
    OTHERS,
    PADDING,
    SCALAR_MOMENTS,
    WEIGHTS,
    Entry,
)
from megatron_muon.planning.flags import Layout
from megatron_muon.routing.layout import MatrixLayout

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """One weight of a pipeline stage, as each of its ranks has it.

    Attributes:
        name: its pattern, ``*`` for numbers.
        shape: of the whole weight.
        layout: its logical matrices; None if the scalar optimizer updates it.
        shards: number of tensor-parallel ranks that divide it; 1 if each holds it whole.
        shard_dim: what they divide: rows (-2) or columns (-1).
        routed: whether it belongs to a routed expert.
        copies: number of weights like it in the model that other expert-parallel ranks hold.
        by_expert_data: whether its replicas are the ranks of the expert data-parallel group.
        element_bytes: bytes of one of its elements.
        gradient_bytes: of one element of its gradient.
        replica: whether another pipeline stage has it too, which counts it (a shared embedding).
        owners: (data-parallel rank, elements whose optimizer state it holds) for each rank that holds some; None if
            every rank holds the state of all elements.
        state: (what, bytes) of all that Muon keeps of a rank's shard, see
            :meth:`megatron_muon.planning.state.StateCounter.bytes`; of a weight under the scalar optimizer nothing.
    """

    name: str
    shape: Shape
    layout: MatrixLayout | None
    shards: int = 1
    shard_dim: int = -1
    routed: bool = False
    copies: int = 1
    by_expert_data: bool = False
    element_bytes: int = 2
    gradient_bytes: int = 4
    replica: bool = False
    owners: tuple[tuple[int, int], ...] | None = None
    state: tuple[tuple[Entry, int], ...] = ()

    @property
    def numel(self) -> int:
        """Elements of the whole weight."""
        return math.prod(self.shape)

    @property
    def local_numel(self) -> int:
        """Elements on one rank."""
        return self.numel // self.shards

    @property
    def local_shape(self) -> Shape:
        """Shape on one rank."""
        shape = list(self.shape)
        if self.shards > 1:
            shape[self.shard_dim] //= self.shards
        return tuple(shape)

    @cached_property
    def engine_weight(self) -> engine.Weight | None:
        """The weight as a rank's engine knows it; None if the scalar optimizer updates it."""
        if self.layout is None:
            return None
        if self.shards == 1:
            return engine.Weight(self.shape, self.layout)
        group = EXPERT if self.routed else DENSE
        return engine.Weight(self.local_shape, self.layout, self.shard_dim, group, self.shards)


def held_in_stage(
    weights: Sequence[Weight], layout: Layout, scalar_optimizer: str, padding: int = 0
) -> list[Counter[Entry]]:
    """What each rank of a pipeline stage holds, but for the buffers of Muon's step.

    Args:
        weights: of a rank.
        layout: of the run.
        scalar_optimizer: ``adam`` or ``lion``.
        padding: bytes of a rank's buffers that belong to no weight.
    """
    everywhere = _of_all_ranks(weights)
    everywhere[Entry(PADDING, ALL)] = padding
    data, experts = ([Counter[Entry]() for _ in range(ranks)] for ranks in (layout.data, layout.expert_data))
    for weight in weights:
        if weight.owners is None:
            everywhere.update(_of_owner(weight, weight.local_numel, scalar_optimizer))
        for rank, elements in weight.owners or ():
            (experts if weight.by_expert_data else data)[rank].update(_of_owner(weight, elements, scalar_optimizer))
    positions = map(layout.position, range(layout.ranks_of_stage))
    return [everywhere + data[position.data] + experts[position.expert_data] for position in positions]


def _of_all_ranks(weights: Sequence[Weight]) -> Counter[Entry]:
    """Weights and gradients."""
    found: Counter[Entry] = Counter()
    for weight in weights:
        whose = OTHERS if weight.layout is None else MUON
        found[Entry(WEIGHTS, whose)] += weight.local_numel * weight.element_bytes
        found[Entry(GRADIENTS, whose)] += weight.local_numel * weight.gradient_bytes
    return found


def _of_owner(weight: Weight, elements: int, scalar_optimizer: str) -> Counter[Entry]:
    """Optimizer state of a rank that owns so many elements of its shard of a weight, and what a step copies of them.

    Of Muon's weights what it keeps. Of others float32 throughout: a main copy of a 16-bit weight, and in the step one
    of a 16-bit gradient; two moments for Adam, one for Lion.
    """
    if weight.layout is not None:
        return Counter({entry: size * elements // weight.local_numel for entry, size in weight.state})
    size = FLOAT32_BYTES * elements
    found = Counter({Entry(SCALAR_MOMENTS, OTHERS): size * (2 if scalar_optimizer == "adam" else 1)})
    if weight.element_bytes != FLOAT32_BYTES:
        found[Entry(MASTERS, OTHERS)] = size
        found[Entry(COPIES, OTHERS)] = 0 if weight.gradient_bytes == FLOAT32_BYTES else size
    return found
