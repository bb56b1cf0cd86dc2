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

__all__ = ["Addition", "ParamStep", "Weights", "pack", "rows_of", "update_momentum"]


@dataclass(slots=True, eq=False)
class ParamStep:
    """A parameter in one step.

    Attributes:
        group: its parameter group.
        options: of the group, in this step.
        param: the weight (this rank's shard).
        layout: of the weight.
        raw_grad: its gradient, in the dtype of its momentum.
        state: of the weight.
        buffer: the momentum, of the weight's shape.
    """

    group: dict[str, Any]
    options: Options
    param: torch.Tensor
    layout: MatrixLayout
    raw_grad: torch.Tensor
    state: dict[str, Any]
    buffer: torch.Tensor

    @classmethod
    def of(cls, group: dict[str, Any], options: Options, param: torch.Tensor, state: dict[str, Any]) -> ParamStep:
        """
        Args:
            group: of the parameter.
            options: of the group, in this step.
            param: with a gradient.
            state: of the parameter, with momentum.
        """
        buffer, grad = state["momentum_buffer"], cast(torch.Tensor, param.grad)
        if grad.dtype != buffer.dtype:
            grad = grad.to(buffer.dtype)
        return cls(group, options, param, layout_of(param), grad, state, buffer)

    @property
    def l2(self) -> float:
        """How much of the weight is added to its gradient."""
        # Those on a manifold do not decay: the way back to it would undo that.
        return 0.0 if self.layout.direction == STIEFEL else self.options.l2

    @property
    def grad(self) -> torch.Tensor:
        """The gradient, with the decay of method ``l2``: then it is a copy, made anew each time."""
        if not self.l2:
            return self.raw_grad
        # Megatron reads its gradient buffer again, and rows under Adam have their own decay.
        grad = self.raw_grad.clone()
        for its, rows in zip(self._rows(grad), self._rows(self.param), strict=True):
            its.add_(rows, alpha=self.l2)
        return grad

    def _rows(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return self.layout.rows_by_rule(tensor, ORTHOGONALIZE)


Weights = Mapping[int, ParamStep]
"""By the number that the engine has for the weight."""


def update_momentum(weights: Sequence[ParamStep]) -> None:
    """Let the momentum of matrices take in their gradients.

    Args:
        weights: of one parameter group.
    """
    if not weights:
        return
    layouts = [weight.layout for weight in weights]
    buffers = rows_of([weight.buffer for weight in weights], layouts)
    rate = 1.0 - weights[0].options.momentum
    if not weights[0].options.l2:
        torch._foreach_lerp_(buffers, rows_of([weight.raw_grad for weight in weights], layouts), rate)
        return
    for weight in weights:  # one copy of a gradient at a time
        torch._foreach_lerp_(rows_of([weight.buffer], [weight.layout]), rows_of([weight.grad], [weight.layout]), rate)


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
