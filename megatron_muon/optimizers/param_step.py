"""A weight in one step, and what a step reads from it and writes to it."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_muon.engine.plan import MatrixSlice
from megatron_muon.engine.slices import Slices, Tensors
from megatron_muon.optimizers.groups import Options
from megatron_muon.orthogonalize.kernels import elementwise
from megatron_muon.routing.layout import ORTHOGONALIZE, STIEFEL, MatrixLayout, layout_of


@dataclass(slots=True, eq=False)
class ParamStep:
    """A parameter in one step.

    Attributes:
        group: its parameter group.
        options: the options of the group in this step.
        param: the weight (this rank's shard).
        layout: the logical matrices of the weight.
        raw_grad: its gradient, in the dtype of its momentum.
        state: the optimizer's state of the weight.
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
            group: the parameter's group.
            options: the options of the group in this step.
            param: a parameter with a gradient.
            state: its state, with momentum.
        """
        buffer, grad = state["momentum_buffer"], param.grad
        assert grad is not None
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
"""The parameters of a step, by the index of the weight in the engine's plan."""


def update_momentum(weights: Sequence[ParamStep]) -> None:
    """Let the momentum of matrices take in their gradients.

    Args:
        weights: of one parameter group.
    """
    weights = [weight for weight in weights if weight.layout.has_matrices]
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


def pack(weights: Weights, slices: Sequence[Slices], batches: Sequence[torch.Tensor], *, first: bool) -> None:
    """Fill batches with the momentum, or with Nesterov's mix of gradient and momentum.

    Args:
        weights: of the step.
        slices: the matrices of each batch.
        batches: to be filled.
        first: whether to update the momentum of these matrices before.
    """
    together: dict[Options, tuple[Tensors, Tensors, Tensors]] = defaultdict(lambda: ([], [], []))
    for run, mine, batch in by_param_group(weights, slices, batches):
        options = mine[0].options
        momenta, slots = run.pairs([weight.buffer for weight in mine], batch)
        grads = momenta
        if first or options.nesterov != 1.0:
            # Gradients stay as they are: Megatron reads their buffer again (logging, gradient norms).
            grads = run.views([weight.raw_grad for weight in mine], batch)
            if mine[0].l2 and grads:
                params = run.views([weight.param for weight in mine], batch)
                grads = list(torch._foreach_add(grads, params, alpha=mine[0].l2))
        if batch.is_cuda and not mine[0].l2:  # kernels take all batches at once
            for some, more in zip(together[options], (momenta, grads, slots), strict=True):
                some.extend(more)
        else:  # while it is in a CPU's cache, or its gradients are copies
            elementwise.pack(momenta, grads, slots, options.momentum if first else None, options.nesterov)
    for options, views in together.items():
        elementwise.pack(*views, options.momentum if first else None, options.nesterov)


def damp(weights: Weights, slices: Sequence[Slices], batches: Sequence[torch.Tensor]) -> None:
    """Scale u where eps is damping, so that the iteration adds eps sqrt(n / m) / depth to its norm, not eps."""
    for run, mine, batch in by_param_group(weights, slices, batches):
        if depth := mine[0].options.damping_depth:
            batch.mul_(depth * (run.items[0].rows / run.items[0].columns) ** 0.5)


def add(
    weights: Weights,
    slices: Sequence[Slices],
    directions: Sequence[torch.Tensor],
    factor: Callable[[ParamStep, MatrixSlice], float],
    key: Callable[[ParamStep, MatrixSlice], Hashable] | None = None,
) -> None:
    """Let weights decay, and add directions to them, times learning rate and a factor.

    Args:
        weights: of the step.
        slices: the matrices of each batch.
        directions: a batch for each; those of weights of 16 bits may be changed.
        factor: gives the factor of the matrices of one item of a weight.
        key: gives what that factor depends on, beside the param group and the shape.
    """
    together: dict[Options, tuple[Tensors, Tensors, list[float]]] = defaultdict(lambda: ([], [], []))
    for run, mine, batch in by_param_group(weights, slices, directions, key):
        params, updates = run.pairs([weight.param for weight in mine], batch)
        factors, options = [factor(mine[0], run.items[0])] * len(params), mine[0].options
        if batch.is_cuda:  # as in pack
            its = together[options]
            its[0].extend(params)
            its[1].extend(updates)
            its[2].extend(factors)
        else:
            elementwise.add(params, updates, factors, options.lr, options.kept, options.cautious)
    for options, each in together.items():
        elementwise.add(*each, options.lr, options.kept, options.cautious)


def by_param_group(
    weights: Weights,
    slices: Sequence[Slices],
    batches: Sequence[torch.Tensor],
    key: Callable[[ParamStep, MatrixSlice], Hashable] | None = None,
) -> Iterator[tuple[Slices, list[ParamStep], torch.Tensor]]:
    """Cut batches where param groups change: yields (slices, weights, part of the batch) of one group each.

    Args:
        weights: of the step.
        slices: the matrices of each batch.
        batches: (matrices, rows, columns).
        key: gives what else the weights of a part, and their matrices, must have in common.
    """
    for each, batch in zip(slices, batches, strict=True):
        mine = [weights[number] for number in each.numbers]
        keys: list[Hashable] = [id(weight.group) for weight in mine]
        if key is not None:
            keys = [*zip(keys, itertools.starmap(key, zip(mine, each.items, strict=True)), strict=True)]
        for run, first, stop in each.runs(keys):
            if run is each:
                yield run, mine, batch
            else:
                yield run, [weights[number] for number in run.numbers], batch[first:stop]


def rows_of(
    tensors: Sequence[torch.Tensor], layouts: Sequence[MatrixLayout], rule: str = ORTHOGONALIZE
) -> list[torch.Tensor]:
    """Views of the rows under ``rule``, of all tensors."""
    pairs = zip(tensors, layouts, strict=True)
    return [view for tensor, layout in pairs for view in layout.rows_by_rule(tensor, rule)]
