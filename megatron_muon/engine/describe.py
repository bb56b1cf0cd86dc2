"""A plan in words, for the report at the start of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from megatron_muon.engine.modes import DISTRIBUTED, GRAM, LENT, LOCAL, SPLIT
from megatron_muon.engine.plan import BatchKey, Plan
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer

_WAYS = {LOCAL: "whole on this rank", LENT: "lent by others ({})", SPLIT: "split with others ({})"}


def describe(plan: Plan, orthogonalizer: Orthogonalizer, ranks: Mapping[str, int]) -> list[str]:
    """What one rank's step consists of.

    Args:
        plan: the plan of the step.
        orthogonalizer: the iteration.
        ranks: the rank's number in each group.

    Returns:
        Lines: how matrices are shared, and by which iteration they are orthogonalized.
    """
    ways: Counter[str] = Counter()
    methods: Counter[str] = Counter()
    shapes, lent = set(), 0
    for chunk in plan.chunks:
        for batch in chunk.batches:
            key, count = batch.key, batch.count
            way = _WAYS.get(chunk.mode, f"{chunk.mode} ({{}})").format(chunk.group)
            method = iteration_of(chunk.mode, orthogonalizer, key)
            if chunk.mode in (LENT, SPLIT):
                place = ranks[chunk.group]
                lent += count if key.parts[place] else 0
                count = batch.counts[place] if chunk.mode == LENT else count if batch.counts[place] else 0
            if count:
                ways[way] += count
                methods[method] += count
                shapes.add((key.m, key.n))
    number = f"{len(plan.chunks)} chunk{'s' if len(plan.chunks) != 1 else ''}"
    gone = f"; {lent} of its own go to others" if lent else ""
    return [
        f"step of this rank: {sum(ways.values())} matrices of {len(shapes)} shapes in {number}; {_listed(ways)}{gone}",
        f"iteration: {_listed(methods)}",
    ]


def iteration_of(mode: str, orthogonalizer: Orthogonalizer, key: BatchKey) -> str:
    """The iteration by which a mode orthogonalizes matrices of one key."""
    own = orthogonalizer.of(key.budget)
    if mode == SPLIT:
        name = f"split Newton-Schulz, {own.named(None).dtype}"
    elif mode == DISTRIBUTED:  # standard for all shapes, as GRAM has its own
        name = str(own.named(None))
    else:
        name = str(own.named(own.restarts) if mode == GRAM else own.method(key.m, key.n))
    return name if key.budget is None else f"{name} ({key.budget})"


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "none"
