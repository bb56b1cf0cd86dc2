"""A plan in words, for the report at the start of a run."""

from __future__ import annotations

from collections import Counter

from megatron_muon.engine.modes import LOCAL
from megatron_muon.engine.plan import Plan
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer

__all__ = ["describe"]


def describe(plan: Plan, orthogonalizer: Orthogonalizer) -> list[str]:
    """What one rank's step consists of.

    Args:
        plan: of its step.
        orthogonalizer: the iteration.

    Returns:
        Lines: how matrices are shared, and by which iteration they are orthogonalized.
    """
    ways: Counter[str] = Counter()
    methods: Counter[str] = Counter()
    shapes = set()
    for chunk in plan.chunks:
        for batch in chunk.batches:
            kind = batch.kind
            ways["whole on this rank" if chunk.mode == LOCAL else f"{chunk.mode} ({chunk.group})"] += batch.count
            methods[str(orthogonalizer.method(*sorted((kind.p, kind.q))))] += batch.count
            shapes.add((kind.p, kind.q))
    number = f"{len(plan.chunks)} chunk{'s' if len(plan.chunks) != 1 else ''}"
    return [
        f"step of this rank: {sum(ways.values())} matrices of {len(shapes)} shapes in {number}; {_listed(ways)}",
        f"iteration: {_listed(methods)}",
    ]


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "none"
