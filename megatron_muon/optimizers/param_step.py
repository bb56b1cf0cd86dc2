"""A weight in one step, and what a step reads from it and writes to it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_muon.engine.plan import MatrixSlice
from megatron_muon.engine.slices import Slices, Tensors
from megatron_muon.optimizers.forms import PLAIN
from megatron_muon.optimizers.precision import own_dtype
from megatron_muon.optimizers.rates import Options
from megatron_muon.optimizers.storage import Cutter, Kept, Take, master_of, momentum_of, opened, opened_in_turn
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
        raw_grad: its gradient, in whatever dtype it has.
        state: the optimizer's state of the weight.
        momentum: as it is kept in the state.
        master: what the optimizer updates, as it is kept in the weight and its state.
        key: what the weights of a part of a batch have in common: param group, and how their numbers are kept.
    """

    group: dict[str, Any]
    options: Options
    param: torch.Tensor
    layout: MatrixLayout
    raw_grad: torch.Tensor
    state: dict[str, Any]
    momentum: Kept
    master: Kept
    key: tuple[Hashable, ...]

    @classmethod
    def of(
        cls, group: dict[str, Any], options: Options, param: torch.Tensor, grad: torch.Tensor, state: dict[str, Any]
    ) -> ParamStep:
        """
        Args:
            group: the parameter's group.
            options: the options of the group in this step.
            param: the parameter.
            grad: its gradient.
            state: its state, with momentum.
        """
        momentum, master = momentum_of(state), master_of(param, state)
        key = (id(group), param.dtype, grad.dtype, master.form, momentum.form)
        return cls(group, options, param, layout_of(param), grad, state, momentum, master, key)

    @property
    def l2(self) -> float:
        """How much of the weight is added to its gradient."""
        # Those on a manifold do not decay: the way back to it would undo that.
        return 0.0 if self.layout.direction == STIEFEL else self.options.l2

    def matrix_rows(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Views of the rows of matrices in a tensor with the weight's rows."""
        return rows_of(tensors, [self.layout])


class Cut:
    """Cuts tensors of weights to the rows that some matrices of a batch have, see :func:`storage.opened`.

    Attributes:
        slots: views of the batch, of the shapes of what was cut last but for columns.
    """

    def __init__(self, slices: Slices, batch: torch.Tensor) -> None:
        self._slices, self._batch = slices, batch
        self.slots: Tensors = []

    def __call__(self, tensors: Sequence[torch.Tensor]) -> Tensors:
        """Views of tensors with the weights' rows: these matrices' rows, with all columns."""
        views, self.slots = self._slices.pairs(tensors, self._batch)
        return views


_TIMES = 8
"""See :func:`opened_in_turn`: copies of 1 MiB, beside a chunk of 16."""

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
    rate, alike = 1.0 - weights[0].options.momentum, list[ParamStep]()
    for weight in weights:
        if weight.momentum.form is PLAIN and weight.momentum.planes[0].dtype == weight.raw_grad.dtype and not weight.l2:
            alike.append(weight)
            continue
        _update_part_by_part(weight, rate)
    if alike:
        layouts = [weight.layout for weight in alike]
        buffers = rows_of([weight.momentum.planes[0] for weight in alike], layouts)
        torch._foreach_lerp_(buffers, rows_of([weight.raw_grad for weight in alike], layouts), rate)


def _update_part_by_part(weight: ParamStep, rate: float) -> None:
    """Let momentum take in a gradient of another dtype, or one with decay, without a copy of the whole of either."""
    rows, raw = weight.matrix_rows, weight.matrix_rows([weight.raw_grad])
    for momenta, take in opened_in_turn([weight.momentum], rows, copies=True):
        grads = [grad.to(momenta[0].dtype) for grad in take(raw)]
        if weight.l2:
            grads = _with_decay([weight], grads, rows, take)
        torch._foreach_lerp_(momenta, grads, rate)


def pack(weights: Weights, slices: Sequence[Slices], batches: Sequence[torch.Tensor], *, first: bool) -> None:
    """Fill batches with the momentum, or with Nesterov's mix of gradient and momentum.

    Args:
        weights: of the step.
        slices: the matrices of each batch.
        batches: to be filled.
        first: whether to update the momentum of these matrices before.
    """
    together: dict[Hashable, tuple[Options, tuple[Tensors, Tensors, Tensors]]] = {}
    for run, mine, batch in by_param_group(weights, slices, batches):
        options, momenta, cut = mine[0].options, [weight.momentum for weight in mine], Cut(run, batch)
        decay, nesterov, raw = mine[0].l2, options.nesterov, None
        if first or nesterov != 1.0:
            # Gradients stay as they are: Megatron reads their buffer again (logging, gradient norms).
            raw = run.views([weight.raw_grad for weight in mine], batch)
        for numbers, take in opened_in_turn(momenta, cut, writes=first, times=_TIMES):
            grads, slots = numbers if raw is None else take(raw), take(cut.slots)
            if batch.is_cuda and momenta[0].form is PLAIN and not decay:  # kernels take all batches at once
                _, views = together.setdefault((options, *mine[0].key[1:]), (options, ([], [], [])))
                for some, more in zip(views, (numbers, grads, slots), strict=True):
                    some.extend(more)
                continue
            if decay and raw is not None:
                grads = _with_decay(mine, grads, cut, take)
            # While it is in a CPU's cache, or there are copies.
            elementwise.pack(numbers, grads, slots, options.momentum if first else None, nesterov)
    for options, views in together.values():
        elementwise.pack(*views, options.momentum if first else None, options.nesterov)


def gradients(weights: Sequence[ParamStep], slices: Slices, batch: torch.Tensor) -> Iterator[tuple[Tensors, Tensors]]:
    """Gradients of matrices, with the decay of method ``l2``: then copies, of a few rows at a time.

    Args:
        weights: of one param group, one for each item of ``slices``.
        slices: the matrices.
        batch: of these matrices, or with one column.

    Yields:
        gradients, not to be changed, and views of the same rows of the batch.
    """
    raw, slots = slices.pairs([weight.raw_grad for weight in weights], batch)
    if not (decay := weights[0].l2):
        yield raw, slots
        return
    dtype, masters = own_dtype(weights[0].param.dtype), [weight.master for weight in weights]
    for numbers, take in opened_in_turn(masters, Cut(slices, batch), writes=False, copies=True):
        yield list(torch._foreach_add([grad.to(dtype) for grad in take(raw)], numbers, alpha=decay)), take(slots)


def _with_decay(weights: Sequence[ParamStep], grads: Tensors, cut: Cutter, take: Take) -> Tensors:
    """Some rows of gradients, with the decay of method ``l2``: copies."""
    dtype = own_dtype(weights[0].param.dtype)
    with opened([weight.master for weight in weights], lambda tensors: take(cut(tensors)), writes=False) as masters:
        if masters:
            return list(torch._foreach_add([grad.to(dtype) for grad in grads], masters, alpha=weights[0].l2))
    return []


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
    """Let weights decay, and add directions to them, times learning rate and a factor; nothing at rate 0.

    Args:
        weights: of the step.
        slices: the matrices of each batch.
        directions: a batch for each; those of weights of 16 bits may be changed.
        factor: gives the factor of the matrices of one item of a weight.
        key: gives what that factor depends on, beside the param group and the shape.
    """
    together: dict[Hashable, tuple[Options, tuple[Tensors, Tensors, list[float]]]] = {}
    for run, mine, batch in by_param_group(weights, slices, directions, key):
        options, masters, cut = mine[0].options, [weight.master for weight in mine], Cut(run, batch)
        if type(options.lr) is float and options.lr == 0.0:  # is_still, without a call
            continue
        for numbers, take in opened_in_turn(masters, cut, times=_TIMES):
            slots, factors = take(cut.slots), [factor(mine[0], run.items[0])] * len(numbers)
            if batch.is_cuda and masters[0].form is PLAIN:  # as in pack
                _, its = together.setdefault((options, *mine[0].key[1:]), (options, ([], [], [])))
                its[0].extend(numbers)
                its[1].extend(slots)
                its[2].extend(factors)
            else:
                elementwise.add(numbers, slots, factors, options.lr, options.kept, options.cautious)
    for options, each in together.values():
        elementwise.add(*each, options.lr, options.kept, options.cautious)


def by_param_group(
    weights: Weights,
    slices: Sequence[Slices],
    batches: Sequence[torch.Tensor],
    key: Callable[[ParamStep, MatrixSlice], Hashable] | None = None,
) -> Iterator[tuple[Slices, list[ParamStep], torch.Tensor]]:
    """Cut batches where param groups change, or how numbers are kept: yields (slices, weights, part of the batch).

    Args:
        weights: of the step.
        slices: the matrices of each batch.
        batches: (matrices, rows, columns).
        key: gives what else the weights of a part, and their matrices, must have in common.
    """
    for each, batch in zip(slices, batches, strict=True):
        mine = [weights[number] for number in each.numbers]
        keys: list[Hashable] = [weight.key for weight in mine]
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
