"""``--muon-param-rule 'GLOB=steps:auto'``: steps of Newton-Schulz that are measured early in training, and then fixed.

Weights of one operator under one rule are a class, and get one number. Before step :data:`MEASURED_IN` the singular
values are taken of all matrices that are about to be orthogonalized: they tell how far from orthogonal any number of
steps would leave each (:mod:`megatron_muon.orthogonalize.defect`). A class gets the fewest that bring all its matrices
as near as the optimizer's own number brings random ones. All ranks of the model take the worst of all, so that no
parallel layout makes a difference; in other steps nothing is measured, and nobody waits.

The numbers are kept in the param groups, beside the count of steps: state dicts, copies and checkpoints have them.

Source:
    AMO (arXiv 2605.17806) observes early, by operator, and commits for the rest of training. By its abstract it
    measures weights, where this measures what is iterated. That spectra settle soon is from arXiv 2606.04058.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_muon.agree import Ranks
from megatron_muon.choices import AUTO_STEPS
from megatron_muon.engine.slices import Slices
from megatron_muon.optimizers.engines import grouped_by_engine
from megatron_muon.optimizers.groups import AUTO
from megatron_muon.optimizers.handled import STEP
from megatron_muon.optimizers.param_step import ParamStep, pack
from megatron_muon.optimizers.step import SteppingOptimizer, rates_of
from megatron_muon.optimizers.storage import gradients_of
from megatron_muon.orthogonalize.coefficients import CUSTOM
from megatron_muon.orthogonalize.defect import defect, random_defect, rounding, singular_values
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer
from megatron_muon.routing.layout import LAYOUT_ATTRIBUTE, MSIGN, WHOLE, Budget, layout_of

MEASURED_IN = 100
"""The first step before which may be measured; docs/routing.md says what other steps would give."""

TOLERANCE = 1.25
"""How many times the defect of random matrices a matrix may have."""


@dataclass(frozen=True)
class _Found:
    """Of the matrices of a class, by numbers of steps from 1 on: the largest defect, over that of random ones of its
    size after the optimizer's ``own`` number, and operations of a largest one; least and largest stable rank of all."""

    own: int
    worst: tuple[float, ...] = ()
    flops: tuple[int, ...] = ()
    ranks: tuple[float, float] = (math.inf, 0.0)

    def with_others(self, other: _Found) -> _Found:
        if not self.worst or not other.worst:
            return self if self.worst else other
        ranks = min(self.ranks[0], other.ranks[0]), max(self.ranks[1], other.ranks[1])
        return _Found(self.own, (*map(max, self.worst, other.worst),), max(self.flops, other.flops), ranks)

    @property
    def steps(self) -> int:
        """The fewest that are enough; where none is, those that leave the least."""
        enough = (number for number, worst in enumerate(self.worst, 1) if worst <= TOLERANCE)
        return next(enough, self.worst.index(min(self.worst)) + 1) if self.worst else self.own

    def __str__(self) -> str:
        if not self.worst:
            return f"{self.own} steps, as all: it has had no gradients"
        own, now = self.own - 1, self.steps - 1
        return (
            f"{self.steps} steps, {self.flops[now] / self.flops[own]:.0%} of the operations; stable rank "
            f"{self.ranks[0]:.3g} .. {self.ranks[1]:.3g}; worst defect {self.worst[now]:.2f} times that of random "
            f"matrices ({self.worst[own]:.2f} after {self.own} steps)"
        )


def take(optimizer: SteppingOptimizer, steps: Mapping[str, int]) -> None:
    """Fix the numbers of steps of classes, by their names as param groups have them: these, and no others."""
    for group in optimizer.param_groups:
        group.pop(AUTO, None)
        if steps:
            group[AUTO] = tuple(sorted(steps.items()))
    look(optimizer)


def look(optimizer: SteppingOptimizer) -> bool:
    """Before each step: give weights the steps that the param groups have, which others may have loaded or reset.

    Returns:
        whether some are to be measured now. Nothing is read from the device.
    """
    groups, is_lacking, known = optimizer.param_groups, False, _known(optimizer)
    for group in groups:
        for param in group["params"]:
            layout = getattr(param, LAYOUT_ATTRIBUTE, WHOLE)  # no call for each weight in each step
            if layout.budget is not None:
                settled = layout.settled(known)
                setattr(param, LAYOUT_ATTRIBUTE, settled)
                is_lacking |= (settled.budget or layout.budget).steps == AUTO_STEPS
    optimizer.engines.settle(known)
    return is_lacking and max(group[STEP] for group in groups) + 1 >= MEASURED_IN


def _measured_for(optimizer: SteppingOptimizer) -> str:
    """What numbers of steps were measured for, at the end of names in param groups: with others they say nothing."""
    config = optimizer.config
    chosen = " ".join(config.custom_coefficients) if config.coefficient_type == CUSTOM else config.coefficient_type
    return f", where others take {config.num_ns_steps} of {chosen} in {config.ns_type}"


def _known(optimizer: SteppingOptimizer) -> dict[str, int]:
    """The steps of classes that have been measured for these options, by the names of :class:`Budget`."""
    entries = [entry for group in optimizer.param_groups for entry in group.get(AUTO, ())]
    suffix = _measured_for(optimizer) if entries else ""
    return {name.removesuffix(suffix): steps for name, steps in entries if name.endswith(suffix)}


@torch.no_grad()
def measure(optimizers: Sequence[SteppingOptimizer], ranks: Ranks) -> None:
    """Before a step, measure and fix the steps of all classes that have none, and tell.

    The host waits for each matrix. It is the matrices of all layers: of some, the layout would decide which.

    Args:
        optimizers: of this rank, with gradients; none if it has no weights of Muon's.
        ranks: that step together; all of them must call this.
    """
    found: dict[str, _Found] = {}
    for part in ranks.gather(lambda: [its for optimizer in optimizers for its in _measured_apart(optimizer).items()]):
        for name, its in part:
            found[name] = its.with_others(found.get(name, its))
    for optimizer in optimizers:
        known = _known(optimizer) | {name: its.steps for name, its in found.items()}
        take(optimizer, {name + _measured_for(optimizer): steps for name, steps in known.items()})
    if ranks.is_first:
        lines = (f"\n  {name}: {its}" for name, its in sorted(found.items()))
        print(f"megatron_muon: steps of Newton-Schulz, measured and fixed{''.join(lines)}", flush=True)


def _measured(optimizer: SteppingOptimizer) -> dict[str, _Found]:
    """The classes of this rank's weights that have no number of steps yet."""
    own, found, having = optimizer.config.num_ns_steps, dict[str, _Found](), dict[torch.Tensor, ParamStep]()
    for group in optimizer.param_groups:
        optimizer._init_group(group)
        budgets = (layout_of(param).budget for param in group["params"])
        found |= {each.measured: _Found(own) for each in budgets if each is not None and each.steps == AUTO_STEPS}
    for rates in rates_of(optimizer):
        # Momentum that has not taken in the gradient yet has so much less of a share in u.
        options = replace(rates.options, nesterov=rates.options.nesterov * rates.options.momentum)
        for param, grad in zip(rates.params, gradients_of(rates.params), strict=True):
            budget = layout_of(param).budget
            if grad is not None and budget is not None and budget.steps == AUTO_STEPS:
                having[param] = ParamStep.of(rates.group, options, param, grad, optimizer.state[param])
    for params in grouped_by_engine([*having], [MSIGN]).values():
        for name, its in _of_matrices(optimizer, [having[param] for param in params]):
            found[name] = found[name].with_others(its)
    return found


def _measured_apart(optimizer: SteppingOptimizer) -> dict[str, _Found]:
    with optimizer.streaming():
        return _measured(optimizer)


def _of_matrices(optimizer: SteppingOptimizer, steps: Sequence[ParamStep]) -> list[tuple[str, _Found]]:
    """Each matrix of which this rank gets the whole, with its class; of weights of one dtype."""
    engine = optimizer.engines.of_whole_matrices([step.param for step in steps])
    weights, found = dict(enumerate(steps)), list[tuple[str, _Found]]()

    def read(slices: Sequence[Slices], batches: Sequence[torch.Tensor]) -> None:
        pack(weights, slices, batches, first=False)
        optimizer.variant.transform(batches)

    def look_at(numbers: list[int], batches: list[torch.Tensor]) -> torch.Tensor:
        for number, matrix in zip(numbers, batches[0], strict=True):
            budget = steps[number].layout.budget
            assert budget is not None
            own = optimizer.config.num_ns_steps
            found.append((budget.measured, _of_matrix(matrix, engine.orthogonalizer, own, budget)))
        return batches[0]

    engine.solve([read], look_at, lambda slices, batches, reduce: None, lambda p, q: 0)
    return found


def _of_matrix(x: torch.Tensor, orthogonalizer: Orthogonalizer, own: int, budget: Budget) -> _Found:
    """(m, n)."""
    p, q = sorted(x.shape)
    each = [orthogonalizer.of(replace(budget, steps=number)) for number in range(1, 2 * own + 1)]
    usual = each[own - 1]
    s = singular_values(x, usual.iteration.balanced).cpu()
    s = s[s > rounding(p, q, orthogonalizer.dtype) * s.norm()]
    if not s.numel():  # zeros, or NaN
        return _Found(own)
    random = random_defect(p, usual.iteration)
    # Gram Newton-Schulz, which may be asked for, is not accurate with any number.
    is_worse = [its.restarts is None and usual.restarts is not None for its in each]
    worst = (math.inf if bad else defect(s, its.iteration) / random for its, bad in zip(each, is_worse, strict=True))
    rank = float(s.square().sum() / s[-1].square())
    return _Found(own, (*worst,), tuple(its.flops(p, q) for its in each), (rank, rank))
