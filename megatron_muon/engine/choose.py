"""The plan of a step in mode ``auto``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from megatron_muon.engine.lending import lend
from megatron_muon.engine.modes import AUTO, GRAM, OWNER
from megatron_muon.engine.plan import BatchKey, Chunk, MatrixSlice, Plan, Weight
from megatron_muon.engine.planner import Policy, Stages, items_of, make_plan
from megatron_muon.engine.prediction import predict
from megatron_muon.engine.stages import in_stages
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer

WHOLE_PLANS = (AUTO, OWNER, GRAM)
"""What is compared for all matrices of a group: the cheapest mode for each shape, ``owner`` and ``gram``."""


def choose_plan(
    weights: Sequence[Weight], policy: Policy, orthogonalizer: Orthogonalizer, places: Mapping[str, int] | None = None
) -> Plan:
    """The plan; in ``auto``, for each group the quickest of: a mode for each shape, ``owner`` or ``gram`` for all.

    Modes that are best shape by shape need not be best together: owners make up for one another's loads. So whole plans
    are compared, by what their busiest rank does. Each group is judged by its own weights: ranks that share one group
    may differ in the weights of another, and must choose alike.

    Args:
        weights: the weights of this rank; if there are ``places``, those of all ranks of these groups.
        policy: mode and bounds.
        orthogonalizer: knows what each shape costs.
        places: this rank's number in each data-parallel group whose ranks orthogonalize for one another.

    Raises:
        ConfigError: for a weight that the mode cannot treat.
    """
    items, shared = items_of(weights, policy.mode), list[Chunk]()
    if places:
        lending = lend(tuple(weights), policy, orthogonalizer)
        items, shared = lending.kept_by(places), lending.chunks_of(places)
    if policy.mode != AUTO:
        return _made(weights, policy, orthogonalizer, {}, items, shared)
    modes = {}
    for group in dict.fromkeys(key.group for key, _ in items if key.group):
        mine = [(key, item) for key, item in items if key.group == group]
        no_gram = all(orthogonalizer.of(key.budget).restarts is None for key, _ in mine)

        def seconds(mode: str, mine: list[tuple[BatchKey, MatrixSlice]] = mine, group: str = group) -> float:
            """Predicted time of the busiest rank of a group if all its matrices are exchanged in one mode."""
            plan = make_plan(weights, dataclasses.replace(policy, mode=mode), orthogonalizer, items=mine)
            ranks = range(len(mine[0][0].parts))
            costs = (predict(plan, orthogonalizer, policy.sizes, {group: rank}) for rank in ranks)
            return max(cost.seconds(policy.machine.over(len(ranks))) for cost in costs)

        modes[group] = min((mode for mode in WHOLE_PLANS if mode != GRAM or not no_gram), key=seconds)
    return _made(weights, policy, orthogonalizer, modes, items, shared)


def _made(
    weights: Sequence[Weight],
    policy: Policy,
    orthogonalizer: Orthogonalizer,
    modes: Mapping[str, str],
    items: Sequence[tuple[BatchKey, MatrixSlice]],
    shared: Sequence[Chunk],
) -> Plan:
    """The plan in the given modes, in as many stages as pay off."""

    def make(stages: Stages) -> Plan:
        return make_plan(weights, policy, orthogonalizer, modes, stages, items, shared)

    return in_stages(make, weights, policy, orthogonalizer)
