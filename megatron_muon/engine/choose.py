"""The plan of a step in mode ``auto``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from megatron_muon.engine.modes import AUTO, GRAM, OWNER
from megatron_muon.engine.plan import Plan, Weight
from megatron_muon.engine.planner import Policy, make_plan
from megatron_muon.engine.prediction import predict
from megatron_muon.engine.stages import in_stages
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer

__all__ = ["choose_plan"]


def choose_plan(weights: Sequence[Weight], policy: Policy, orthogonalizer: Orthogonalizer) -> Plan:
    """The plan; in ``auto``, for each group the quickest of: a mode for each shape, ``owner`` or ``gram`` for all.

    Modes that are best shape by shape need not be best together: owners make up for one another's loads. So whole plans
    are compared, by what their busiest rank does. Each group is judged by its own weights: ranks that share one group
    may differ in the weights of another, and must choose alike.

    Args:
        weights: of this rank.
        policy: mode and bounds.
        orthogonalizer: knows what each shape costs.

    Raises:
        ConfigError: for a weight that the mode cannot treat.
    """
    if policy.mode != AUTO:
        return _made(weights, policy, orthogonalizer)
    candidates = [AUTO, OWNER] if orthogonalizer.restarts is None else [AUTO, OWNER, GRAM]
    modes = {}
    for group in dict.fromkeys(weight.group for weight in weights if weight.group):
        mine = [weight for weight in weights if weight.group == group]
        times = {mode: _seconds(mine, dataclasses.replace(policy, mode=mode), orthogonalizer) for mode in candidates}
        modes[group] = min(times, key=lambda mode: times[mode])
    return _made(weights, policy, orthogonalizer, modes)


def _made(
    weights: Sequence[Weight], policy: Policy, orthogonalizer: Orthogonalizer, modes: Mapping[str, str] | None = None
) -> Plan:
    """With as many stages as pay."""
    return in_stages(
        lambda stages: make_plan(weights, policy, orthogonalizer, modes, stages), weights, policy, orthogonalizer
    )


def _seconds(weights: Sequence[Weight], policy: Policy, orthogonalizer: Orthogonalizer) -> float:
    """Of the busiest rank of the group that divides the weights."""
    plan = make_plan(weights, policy, orthogonalizer)
    return max(
        predict(plan, orthogonalizer, policy.sizes, {weights[0].group: rank}).seconds(policy.machine)
        for rank in range(weights[0].ranks)
    )
