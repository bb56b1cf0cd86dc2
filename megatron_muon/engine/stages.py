"""In how many stages a step is done, so that the first buckets are final while the last are being computed.

A stage is a run of buckets, with chunks of its own. Small batches are slower, and uneven shares of few matrices leave
tensor-parallel ranks idle; so there are as many stages as cost next to nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Sequence

from megatron_muon.engine.plan import Plan, Weight
from megatron_muon.engine.planner import Policy, Stages
from megatron_muon.engine.prediction import predict
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer

_MORE = 1.02
"""How many times as long a plan in stages may take, by prediction."""

_BATCH = 1e-4
"""Seconds that the products of one batch take beside their operations: measured on a CPU; on GPUs some 15 kernels."""


def in_stages(
    make: Callable[[Stages], Plan], weights: Sequence[Weight], policy: Policy, orthogonalizer: Orthogonalizer
) -> Plan:
    """The plan with most stages that takes hardly longer than the one without.

    Each group is judged by its own matrices, as in :func:`megatron_muon.engine.choose.choose_plan`.

    Args:
        make: makes the plan with given stages.
        weights: the weights of the plan.
        policy: sizes of elements and rates of the machine.
        orthogonalizer: knows what each shape costs.
    """
    plan = make({})
    stages: dict[str, dict[int, int]] = {}
    for group in dict.fromkeys(["", *(weight.group for weight in weights)]):
        work = _work(plan, group, orthogonalizer)
        number = len(work)
        while number > 1 and group not in stages:
            tried = _cut(work, number)
            longer = _seconds(make({**stages, group: tried}), group, policy, orthogonalizer)
            if longer <= _MORE * _seconds(plan, group, policy, orthogonalizer):
                stages[group] = tried
            number = number * 2 // 3
    return make(stages) if stages else plan


def _work(plan: Plan, group: str, orthogonalizer: Orthogonalizer) -> list[tuple[int, int]]:
    """The buckets of a group's matrices, in their order, with the operations of each."""
    found: Counter[int] = Counter()
    for chunk in plan.chunks:
        for batch in chunk.batches if chunk.group == group else ():
            each = orthogonalizer.of(batch.key.budget).flops(batch.key.m, batch.key.n)
            for item in batch.items:
                found[plan.weights[item.weight].bucket] += item.count * each
    return sorted(found.items())


def _cut(work: Sequence[tuple[int, int]], number: int) -> dict[int, int]:
    """The stage of each bucket. Stages are runs of buckets of about equal work, numbered by their last bucket."""
    total = sum(cost for _, cost in work)
    ends = itertools.accumulate(cost for _, cost in work)
    runs: dict[int, list[int]] = {}
    for (bucket, cost), end in zip(work, ends, strict=True):
        run = bucket if number == len(work) else int((end - cost / 2) * number / total)
        runs.setdefault(run, []).append(bucket)
    return {bucket: run[-1] for run in runs.values() for bucket in run}


def _seconds(plan: Plan, group: str, policy: Policy, orthogonalizer: Orthogonalizer) -> float:
    """Predicted time of all chunks of a group, one after another; each takes as long as its busiest rank."""
    total = 0.0
    for chunk in plan.chunks:
        if chunk.group != group:
            continue
        alone = dataclasses.replace(plan, chunks=(chunk,))
        ranks = range(max(1, len(chunk.batches[0].key.parts)))
        costs = (predict(alone, orthogonalizer, policy.sizes, {group: rank} if group else {}) for rank in ranks)
        total += max(cost.seconds(policy.machine.over(len(ranks))) for cost in costs) + len(chunk.batches) * _BATCH
    return total
