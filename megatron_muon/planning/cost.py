"""What each rank of a pipeline stage holds and does: bytes of state, the engine's account of a step, active parameters.

Bytes, matrices and active parameters are arithmetic on shapes; what a step does is asked of the engine's plan
(:mod:`megatron_muon.planning.steps`).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from megatron_muon.engine import plan as engine
from megatron_muon.engine.modes import AUTO, MODES, Cost
from megatron_muon.engine.plan import Peers
from megatron_muon.engine.prediction import Choice
from megatron_muon.optimizers.engines import DATA, DENSE, EXPERT, EXPERT_DATA, WIDE
from megatron_muon.planning.flags import Layout
from megatron_muon.planning.rates import Rates
from megatron_muon.planning.steps import Step, StepPlanner
from megatron_muon.planning.timing import Times
from megatron_muon.routing.layout import MatrixLayout

FLOAT32_BYTES = 4

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
        replica: whether another pipeline stage has it too, which counts it (a shared embedding).
        owners: (data-parallel rank, elements whose optimizer state it holds) for each rank that holds some; None if
            every rank holds the state of all elements.
        state_elements: of Muon's state of a rank's shard, without a main copy; None for the momentum alone.
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
    replica: bool = False
    owners: tuple[tuple[int, int], ...] | None = None
    state_elements: int | None = None

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


def state_bytes(weight: Weight, elements: int, scalar_optimizer: str) -> int:
    """Bytes of optimizer state of a rank that owns so many elements of its shard of ``weight``.

    Float32 throughout: a main copy of a 16-bit weight; two moments for Adam, one for Lion; for Muon what it keeps.
    """
    kept = elements if weight.element_bytes != FLOAT32_BYTES else 0
    if weight.layout is None:
        kept += elements * (2 if scalar_optimizer == "adam" else 1)
    elif weight.state_elements is None:
        kept += elements
    else:
        kept += elements * weight.state_elements // weight.local_numel
    return kept * FLOAT32_BYTES


@dataclass(frozen=True)
class RankLoad:
    """What one rank of a pipeline stage holds and does.

    Attributes:
        rank: number within the stage of the first rank with this load.
        ranks: number of ranks with this load.
        parameter_bytes: of its shard of the model.
        state_bytes: of its optimizer state.
        step_bytes: that its step takes beside parameters, gradients and state; 0 in a mode that cannot be.
        work: for each mode that can be, what it does for one step.
        lent_bytes: for each, what of it goes to data-parallel ranks, which orthogonalize for one another.
        steps: those of the weights of dense layers and of experts.
        group_ranks: the number of this rank in each group of :mod:`megatron_muon.optimizers.engines`.
    """

    rank: int
    ranks: int
    parameter_bytes: int
    state_bytes: int
    step_bytes: int
    work: dict[str, Cost]
    lent_bytes: dict[str, float]
    steps: tuple[Step, Step] = field(repr=False, compare=False)
    group_ranks: dict[str, int] = field(repr=False, compare=False)

    def times(self, mode: str, layout: Layout, rates: Rates) -> Times:
        """How long its step takes on a device; see :meth:`megatron_muon.planning.steps.Step.times`."""
        # A stage has consecutive ranks, and its data-parallel groups reach over all of them.
        spans = dict.fromkeys((DATA, EXPERT_DATA, WIDE), layout.ranks_of_stage)
        spans |= {DENSE: layout.tensor, EXPERT: layout.expert_tensor}
        # No group divides weights of both, so that planning them apart changes nothing.
        return sum((step.times(mode, self.group_ranks, spans, rates) for step in self.steps), Times())


def loads_of_stage(
    weights: Sequence[Weight], layout: Layout, scalar_optimizer: str, planner: StepPlanner
) -> list[RankLoad]:
    """The loads of all ranks of one pipeline stage; ranks whose loads are equal are counted together."""
    refused = refusals_of_stage(weights, planner)
    modes = [mode for mode in MODES if mode not in refused]
    wide = WIDE if layout.tensor > 1 else ""
    span = layout.ranks_of_stage
    peers, expert_peers = Peers(DATA, layout.data, 0, wide, span), Peers(EXPERT_DATA, layout.expert_data, 0, "", span)
    data = _holdings([w for w in weights if not w.by_expert_data], peers, scalar_optimizer, planner)
    experts = _holdings([w for w in weights if w.by_expert_data], expert_peers, scalar_optimizer, planner)
    found: dict[tuple[int, int, tuple[Cost, ...], tuple[float, ...]], list[int]] = defaultdict(list)
    examples: list[tuple[tuple[Step, Step], dict[str, int]]] = []
    for rank in range(layout.ranks_of_stage):
        position = layout.position(rank)
        (state, step), (expert_state, expert_step) = data[position.data], experts[position.expert_data]
        group_ranks = {
            DENSE: position.tensor,
            EXPERT: position.expert_tensor,
            DATA: position.data,
            EXPERT_DATA: position.expert_data,
            WIDE: position.data * layout.tensor + position.tensor,
        }
        work = tuple(step.cost(mode, group_ranks) + expert_step.cost(mode, group_ranks) for mode in modes)
        both = step, expert_step
        lent = tuple(sum(each.lent_bytes(mode, group_ranks) for each in both) for mode in modes)
        is_possible = planner.options.tp_mode not in refused
        peak = planner.together(*both).peak_bytes(group_ranks) if is_possible else 0
        found[state + expert_state, peak, work, lent].append(rank)
        examples.append((both, group_ranks))
    parameter_bytes = sum(weight.local_numel * weight.element_bytes for weight in weights)
    return [
        RankLoad(
            *(ranks[0], len(ranks), parameter_bytes, state, peak),
            dict(zip(modes, work, strict=True)),
            dict(zip(modes, lent, strict=True)),
            *examples[ranks[0]],
        )
        for (state, peak, work, lent), ranks in found.items()
    ]


def refusals_of_stage(weights: Iterable[Weight], planner: StepPlanner) -> dict[str, str]:
    """The modes in which some weight of the stage cannot be updated, with the engine's message."""
    return planner.refusals(_engine_weights(weights))


def choices_of_stage(weights: Sequence[Weight], layout: Layout, planner: StepPlanner) -> Counter[Choice]:
    """How many matrices of one pipeline stage mode ``auto`` treats in which way; replicas count once."""
    total: Counter[Choice] = Counter()
    for by_expert, ranks, copies in ((False, layout.data, 1), (True, layout.expert_data, layout.expert)):
        mine = [weight for weight in weights if weight.by_expert_data is by_expert and weight.layout is not None]
        replicated = all(weight.owners is None for weight in mine)
        for step in _steps(mine, ranks, planner)[: 1 if replicated else ranks]:
            for choice, count in step.choices(AUTO).items():
                total[choice] += count * copies
    return total


def _holdings(
    weights: Sequence[Weight], peers: Peers, scalar_optimizer: str, planner: StepPlanner
) -> list[tuple[int, Step]]:
    """For each data-parallel rank the bytes of state and the step of the weights that it owns, or has a part in."""
    ranks = peers.ranks
    state, everywhere = [0] * ranks, 0
    for weight in weights:
        if weight.owners is None:
            everywhere += state_bytes(weight, weight.local_numel, scalar_optimizer)
        for rank, elements in weight.owners or ():
            state[rank] += state_bytes(weight, elements, scalar_optimizer)
    muons = [(each, weight.owners) for weight in weights if (each := weight.engine_weight) is not None]
    if muons and all(owners is not None for _, owners in muons):
        owned = [
            dataclasses.replace(each, peers=dataclasses.replace(peers, holder=rank))
            for each, owners in muons
            for rank, _ in owners or ()
        ]
        steps = planner.steps(owned, ranks)
    else:
        steps = _steps(weights, ranks, planner)
    return [(state[rank] + everywhere, steps[rank]) for rank in range(ranks)]


def _steps(weights: Iterable[Weight], ranks: int, planner: StepPlanner) -> list[Step]:
    """What each data-parallel rank does."""
    everywhere: list[Weight] = []
    owned: list[list[Weight]] = [[] for _ in range(ranks)]
    for weight in weights:
        if weight.owners is None:
            everywhere.append(weight)
        for rank, _ in weight.owners or ():
            owned[rank].append(weight)
    replicated = planner.step(_engine_weights(everywhere))
    return [planner.step(_engine_weights([*everywhere, *mine])) if mine else replicated for mine in owned]


def _engine_weights(weights: Iterable[Weight]) -> list[engine.Weight]:
    found = (weight.engine_weight for weight in weights)
    return [weight for weight in found if weight is not None]


def active_parameters(weights: Iterable[Weight], share_of_experts: float, output_uses: int) -> float:
    """Parameters that one token meets.

    Args:
        weights: of the whole model.
        share_of_experts: experts that a token is sent to, divided by the number of experts.
        output_uses: how often the output layer is applied: once, and once more for each multi-token prediction layer.

    Returns:
        Routed experts count by ``share_of_experts``, the output layer ``output_uses`` times, input embeddings, whose
        rows are looked up, not at all.
    """
    total, output = 0.0, 0
    for weight in weights:
        if weight.name.startswith(("embedding.", "output_layer.")):
            is_vocabulary = weight.name in ("embedding.word_embeddings.weight", "output_layer.weight")
            output = weight.numel if is_vocabulary else output
        else:
            total += weight.copies * weight.numel * (share_of_experts if weight.routed else 1.0)
    return total + output * output_uses


def attention_flops(heads: int, query_dim: int, value_dim: int, sequence: int) -> int:
    """Operations of one softmax-attention layer for one token, forward and backward, under a causal mask.

    A token attends to half of the sequence on average; scores and weighted values take 2 operations for each of
    ``query_dim`` and ``value_dim``; the backward pass takes twice the forward.
    """
    return 3 * heads * (query_dim + value_dim) * sequence
