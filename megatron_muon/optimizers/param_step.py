"""A weight in one step, and what a step reads from it and writes to it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from megatron_muon.engine.callbacks import Part
from megatron_muon.optimizers.groups import Options
from megatron_muon.orthogonalize.kernels import elementwise
from megatron_muon.routing.layout import ORTHOGONALIZE, STIEFEL, MatrixLayout, layout_of

__all__ = ["Addition", "ParamStep", "Weights", "begin", "pack", "rows_of"]


@dataclass(frozen=True)
class ParamStep:
    """A parameter in one step.

    Attributes:
        group: its parameter group.
        options: of the group, in this step.
        param: the weight (this rank's shard).
        grad: of the weight's shape, in the dtype of its momentum.
        state: of the weight.
    """

    group: dict[str, Any]
    options: Options
    param: torch.Tensor
    grad: torch.Tensor
    state: dict[str, Any]

    @property
    def buffer(self) -> torch.Tensor:
        """The momentum, of the weight's shape."""
        momentum: torch.Tensor = self.state["momentum_buffer"]
        return momentum


Weights = Mapping[int, ParamStep]
"""By the number that the engine has for the weight."""


def begin(
    group: dict[str, Any], options: Options, params: list[torch.Tensor], states: list[dict[str, Any]]
) -> list[ParamStep]:
    """P1: gradients and momentum, for one parameter group.

    Args:
        group: the group.
        options: of the group, in this step.
        params: of the group, with gradients.
        states: of them.
    """
    buffers = [state["momentum_buffer"] for state in states]
    grads = [cast(torch.Tensor, param.grad).to(buffer.dtype) for param, buffer in zip(params, buffers, strict=True)]
    layouts = [layout_of(param) for param in params]
    if options.l2:
        # Those on a manifold do not decay: the way back to it would undo that.
        which = [index for index, layout in enumerate(layouts) if layout.direction != STIEFEL]
        # Copies: Megatron reads its gradient buffer again, and rows under Adam have their own decay.
        grads = [grad.clone() for grad in grads]
        some = [layouts[index] for index in which]
        if rows := rows_of([params[index] for index in which], some):
            torch._foreach_add_(rows_of([grads[index] for index in which], some), rows, alpha=options.l2)
    torch._foreach_lerp_(rows_of(buffers, layouts), rows_of(grads, layouts), 1.0 - options.momentum)
    return [ParamStep(group, options, *each) for each in zip(params, grads, states, strict=True)]


def pack(
    weights: Weights,
    transform: Callable[[Sequence[torch.Tensor]], None],
    parts: list[Part],
    slots: list[torch.Tensor],
) -> None:
    """Pack the momentum, or Nesterov's mix of gradient and momentum, as it is to be orthogonalized.

    Args:
        weights: of the step.
        transform: what is done to it then, see :meth:`megatron_muon.optimizers.stages.Variant.transform`.
        parts: what is wanted.
        slots: to be filled.
    """
    views: dict[float, list[tuple[torch.Tensor, ...]]] = defaultdict(list)
    for part, slot in zip(parts, slots, strict=True):
        weight = weights[part.item.weight]
        pairs = part.piece.pairs(weight.buffer, slot)
        grads = part.piece.pairs(weight.grad, slot) if weight.options.nesterov != 1.0 else pairs
        views[weight.options.nesterov] += [(*pair, grad) for pair, (grad, _) in zip(pairs, grads, strict=True)]
    for share, found in views.items():
        momenta, targets, mixed_in = zip(*found, strict=True) if found else ((), (), ())
        # The gradient itself stays as it is: Megatron reads its buffer again (logging, gradient norms).
        elementwise.pack(momenta, mixed_in, targets, None, share)
    transform(slots)
    scales = [_damping_scale(weights, part) for part in parts]
    if any(scale != 1.0 for scale in scales):
        torch._foreach_mul_(slots, scales)


def _damping_scale(weights: Weights, part: Part) -> float:
    """Where the iteration adds eps to the norm of u times this, it adds eps sqrt(n / m) / depth to that of u."""
    depth = weights[part.item.weight].options.damping_depth
    return depth * (part.item.rows / part.item.columns) ** 0.5 if depth else 1.0


def rows_of(
    tensors: Sequence[torch.Tensor], layouts: Sequence[MatrixLayout], rule: str = ORTHOGONALIZE
) -> list[torch.Tensor]:
    """Views of the rows under ``rule``, of all tensors."""
    pairs = zip(tensors, layouts, strict=True)
    return [view for tensor, layout in pairs for view in layout.rows_by_rule(tensor, rule)]


class Addition:
    """P6 and P7: weights decay, and directions are added to them, learning rate times a factor of each."""

    def __init__(self, weights: Weights, factor: Callable[[ParamStep, Part], float]) -> None:
        """
        Args:
            weights: of the step.
            factor: of the directions of some matrices.
        """
        self._weights, self._factor = weights, factor

    def __call__(self, parts: list[Part], directions: list[torch.Tensor]) -> None:
        """Of the matrices of one chunk."""
        views: dict[Options, list[tuple[torch.Tensor, torch.Tensor, float]]] = defaultdict(list)
        for part, direction in zip(parts, directions, strict=True):
            step = self._weights[part.item.weight]
            factor = self._factor(step, part)
            views[step.options] += [(*pair, factor) for pair in part.piece.pairs(step.param, direction)]
        for options, found in views.items():
            weights, updates, factors = zip(*found, strict=True) if found else ((), (), ())
            elementwise.add(weights, updates, factors, options.lr, options.kept, options.cautious)
