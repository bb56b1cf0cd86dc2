"""A weight in one step, and what a step reads from it and writes to it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_muon.engine.execute import Part, Read
from megatron_muon.optimizers.stages import Variant
from megatron_muon.routing.layout import ORTHOGONALIZE, MatrixLayout

__all__ = ["Job", "decay_cautiously", "reader", "rows_of"]


@dataclass(frozen=True)
class Job:
    """A parameter in one step."""

    group: dict[str, Any]
    param: torch.Tensor
    grad: torch.Tensor
    buffer: torch.Tensor


def reader(nesterov: bool, jobs: list[Job], variant: Variant) -> Read:
    """Packs the momentum, or Nesterov's mix of gradient and momentum."""

    def read(parts: list[Part], slots: list[torch.Tensor]) -> None:
        views: dict[float, list[tuple[torch.Tensor, ...]]] = defaultdict(list)
        for part, slot in zip(parts, slots, strict=True):
            job = jobs[part.item.weight]
            pairs = part.piece.pairs(job.buffer, slot)
            grads = part.piece.pairs(job.grad, slot) if nesterov else pairs
            views[job.group["momentum"]] += [(*pair, grad) for pair, (grad, _) in zip(pairs, grads, strict=True)]
        for momentum, found in views.items():
            if not found:
                continue
            sources, targets, mixed_in = zip(*found, strict=True)
            # The gradient itself stays as it is: Megatron reads its buffer again (logging, gradient norms).
            torch._foreach_copy_(targets, torch._foreach_lerp(mixed_in, sources, momentum) if nesterov else sources)
        variant.transform(slots)
        scales = [_damping_scale(jobs, part) for part in parts]
        if any(scale != 1.0 for scale in scales):
            torch._foreach_mul_(slots, scales)

    return read


def _damping_scale(jobs: list[Job], part: Part) -> float:
    """Where the iteration adds eps to the norm of u times this, it adds eps sqrt(n / m) / depth to that of u."""
    depth: float = jobs[part.item.weight].group["damping_depth"]
    return depth * (part.item.rows / part.item.columns) ** 0.5 if depth else 1.0


def rows_of(
    tensors: Sequence[torch.Tensor], layouts: Sequence[MatrixLayout], rule: str = ORTHOGONALIZE
) -> list[torch.Tensor]:
    """Views of the rows under ``rule``, of all tensors."""
    pairs = zip(tensors, layouts, strict=True)
    return [view for tensor, layout in pairs for view in layout.rows_by_rule(tensor, rule)]


def decay_cautiously(views: list[tuple[torch.Tensor, torch.Tensor]], rate: float) -> None:
    """Decay the elements that the update makes smaller (as Dion's cautious decay)."""
    for weight, direction in views:
        weight.sub_(weight * (weight * direction > 0), alpha=rate)
