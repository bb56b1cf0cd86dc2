"""What each rank of a pipeline stage holds and does: bytes of state, the engine's account of a step, active parameters.

Bytes, matrices and active parameters are arithmetic on shapes; what a step does is asked of the engine's plan
(:mod:`megatron_muon.planning.steps`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from megatron_muon.engine import plan as engine
from megatron_muon.engine.modes import AUTO, MODES, Cost
from megatron_muon.engine.plan import Peers
from megatron_muon.engine.prediction import Choice
from megatron_muon.optimizers.engines import DATA, DENSE, EXPERT, EXPERT_DATA, WIDE
from megatron_muon.planning.accounts import ALL, STATE, STEP, WEIGHTS, WINDOWS, Account, Entry
from megatron_muon.planning.flags import Layout
from megatron_muon.planning.holding import Weight, held_in_stage
from megatron_muon.planning.memory import Taken
from megatron_muon.planning.rates import Rates
from megatron_muon.planning.steps import Step, StepPlanner
from megatron_muon.planning.timing import Times


@dataclass(frozen=True)
class RankLoad:
    """What one rank of a pipeline stage holds and does.

    Attributes:
        rank: number within the stage of the first rank with this load.
        ranks: number of ranks with this load.
        account: of all bytes that it holds, those of the step (0 in a mode that cannot be) included.
        work: for each mode that can be, what it does for one step.
        lent_bytes: for each, what of it goes to data-parallel ranks, which orthogonalize for one another.
        steps: those of the weights of dense layers and of experts.
        group_ranks: the number of this rank in each group of :mod:`megatron_muon.optimizers.engines`.
    """

    rank: int
    ranks: int
    account: Account
    work: dict[str, Cost]
    lent_bytes: dict[str, float]
    steps: tuple[Step, Step] = field(repr=False, compare=False)
    group_ranks: dict[str, int] = field(repr=False, compare=False)

    @property
    def parameter_bytes(self) -> int:
        """Of its shard of the model."""
        return self.account.total(WEIGHTS)

    @property
    def state_bytes(self) -> int:
        """Of its optimizer state, on the device and on the host."""
        return self.account.total(*STATE, on_host=None)

    @property
    def step_bytes(self) -> int:
        """That its step takes beside parameters, gradients and state."""
        return self.account.total(STEP)

    def times(self, mode: str, layout: Layout, rates: Rates) -> Times:
        """How long its step takes on a device; see :meth:`megatron_muon.planning.steps.Step.times`."""
        # A stage has consecutive ranks, and its data-parallel groups reach over all of them.
        spans = dict.fromkeys((DATA, EXPERT_DATA, WIDE), layout.ranks_of_stage)
        spans |= {DENSE: layout.tensor, EXPERT: layout.expert_tensor}
        # No group divides weights of both, so that planning them apart changes nothing.
        return sum((step.times(mode, self.group_ranks, spans, rates) for step in self.steps), Times())


def loads_of_stage(
    weights: Sequence[Weight], layout: Layout, scalar_optimizer: str, planner: StepPlanner, padding: int = 0
) -> list[RankLoad]:
    """The loads of all ranks of one pipeline stage; ranks whose loads are equal are counted together.

    Args:
        weights: of a rank.
        layout: of the run.
        scalar_optimizer: ``adam`` or ``lion``.
        planner: knows the options.
        padding: bytes of a rank's buffers that belong to no weight.
    """
    refused = refusals_of_stage(weights, planner)
    modes = [mode for mode in MODES if mode not in refused]
    wide = WIDE if layout.tensor > 1 else ""
    span = layout.ranks_of_stage
    peers, expert_peers = Peers(DATA, layout.data, 0, wide, span), Peers(EXPERT_DATA, layout.expert_data, 0, "", span)
    data = _steps_of([w for w in weights if not w.by_expert_data], peers, planner)
    experts = _steps_of([w for w in weights if w.by_expert_data], expert_peers, planner)
    held = held_in_stage(weights, layout, scalar_optimizer, padding)
    found: dict[tuple[Account, tuple[Cost, ...], tuple[float, ...]], list[int]] = defaultdict(list)
    examples: list[tuple[tuple[Step, Step], dict[str, int]]] = []
    for rank in range(layout.ranks_of_stage):
        position = layout.position(rank)
        step, expert_step = both = data[position.data], experts[position.expert_data]
        group_ranks = {
            DENSE: position.tensor,
            EXPERT: position.expert_tensor,
            DATA: position.data,
            EXPERT_DATA: position.expert_data,
            WIDE: position.data * layout.tensor + position.tensor,
        }
        work = tuple(step.cost(mode, group_ranks) + expert_step.cost(mode, group_ranks) for mode in modes)
        lent = tuple(sum(each.lent_bytes(mode, group_ranks) for each in both) for mode in modes)
        is_possible = planner.options.tp_mode not in refused
        taken = planner.together(*both).memory_of_step(group_ranks) if is_possible else Taken(0)
        own = Counter({Entry(STEP, ALL): taken.peak, Entry(WINDOWS, ALL): taken.windows})
        account = Account.of(held[rank] + own)
        found[account, work, lent].append(rank)
        examples.append((both, group_ranks))
    return [
        RankLoad(
            *(ranks[0], len(ranks), account),
            dict(zip(modes, work, strict=True)),
            dict(zip(modes, lent, strict=True)),
            *examples[ranks[0]],
        )
        for (account, work, lent), ranks in found.items()
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


def _steps_of(weights: Sequence[Weight], peers: Peers, planner: StepPlanner) -> list[Step]:
    """For each data-parallel rank the step of the weights that it owns, or has a part in."""
    ranks = peers.ranks
    muons = [(each, weight.owners) for weight in weights if (each := weight.engine_weight) is not None]
    if muons and all(owners is not None for _, owners in muons):
        owned = [
            dataclasses.replace(each, peers=dataclasses.replace(peers, holder=rank))
            for each, owners in muons
            for rank, _ in owners or ()
        ]
        return planner.steps(owned, ranks)
    return _steps(weights, ranks, planner)


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
