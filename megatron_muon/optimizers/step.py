"""One step of an optimizer: momentum, the directions of all matrices, and their addition to the weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from megatron_muon.config import MuonConfig
from megatron_muon.engine.callbacks import Part, Reduce, Write
from megatron_muon.engine.step import StepEngine
from megatron_muon.optimizers.agreement import agree
from megatron_muon.optimizers.balls import ball_directions
from megatron_muon.optimizers.engines import Engines
from megatron_muon.optimizers.groups import Rate, options_of
from megatron_muon.optimizers.handled import STEP, Marks, refuse_elsewhere
from megatron_muon.optimizers.matrices import Matrices, matrices_of
from megatron_muon.optimizers.param_step import Addition, ParamStep, pack, update_momentum
from megatron_muon.optimizers.power import WarmStarts, spectrally_normalize
from megatron_muon.optimizers.precision import own_dtype
from megatron_muon.optimizers.scalar_rows import restart_emptied, step_scalar_rows
from megatron_muon.optimizers.sizes import normalize
from megatron_muon.optimizers.stages import Variant
from megatron_muon.orthogonalize.scale import SPECTRAL_NORM, UPDATE_NORM, scale_factor
from megatron_muon.routing.layout import MSIGN, layout_of

__all__ = ["EngineStep", "Step", "Stepped"]


class Stepped(Protocol):
    """What a step needs of its optimizer, which is a ``torch.optim.Optimizer``: see :class:`megatron_muon.Muon`."""

    config: MuonConfig
    variant: Variant
    engines: Engines
    starts: WarmStarts
    marks: Marks
    finals: list[Callable[[list[torch.Tensor]], None]]
    first_lrs: list[Rate]
    watched: tuple[str, ...]
    directions: tuple[str, ...]
    hidden_size: int
    param_groups: list[dict[str, Any]]
    state: Any

    @property
    def sends(self) -> bool:
        """Whether the step sends messages to data-parallel ranks."""

    def _init_group(self, group: dict[str, Any]) -> None: ...


class Step:
    """One step, from gradients to weights.

    Attributes:
        params: of the optimizer, all, in the order of its groups.
    """

    def __init__(self, optimizer: Stepped) -> None:
        self.optimizer = optimizer
        self.params = [param for group in optimizer.param_groups for param in group["params"]]
        self._groups: list[list[ParamStep]] = []
        self._pending = dict.fromkeys(self.params)
        self._untold: list[torch.Tensor] | None = None

    def run(self) -> None:
        """Take the step; raises what :meth:`megatron_muon.Muon.step` raises."""
        optimizer = self.optimizer
        agree(optimizer.engines, optimizer.param_groups, optimizer.directions, lambda: refuse_elsewhere(optimizer))
        having = [param for param in self.params if param.grad is not None]
        self._engines = optimizer.engines.in_step(self.params, having, optimizer.directions)
        for group, first_lr in zip(optimizer.param_groups, optimizer.first_lrs, strict=True):
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                options = options_of(group, optimizer.config, optimizer.variant.decays, first_lr)
                optimizer._init_group(group)
                weights = [ParamStep.of(group, options, param, optimizer.state[param]) for param in params]
                self._notice(weights)
                self._groups.append(weights)
        try:
            self._change()
        except Exception as error:
            error.add_note(
                f"Muon: the step had begun, {len(self._pending)} of {len(self.params)} weights are not done: they or "
                "their momentum may be between two steps. Go on from a checkpoint."
            )
            raise

    def _change(self) -> None:
        """All of a step that changes weights and state."""
        self.optimizer.variant.begin_step()
        alike: dict[tuple[str, torch.dtype], list[ParamStep]] = defaultdict(list)
        for weights in self._groups:
            weights[0].group[STEP] += 1
            for weight in weights:
                if STEP in weight.state:
                    weight.state[STEP] += 1
                alike[weight.layout.direction, own_dtype(weight.param.dtype)].append(weight)
            update_momentum(weights)
            step_scalar_rows(weights)
        self._untold = [] if self.optimizer.sends else None
        self.tell([param for param in self._pending if param.grad is None])
        # All matrices of one direction together, in the same order on all ranks.
        for (direction, dtype), engine in self._engines.items():
            self.optimizer.variant.update(EngineStep(self, engine, direction, alike[direction, dtype]))
        self.tell_untold()
        self.tell(list(self._pending))
        watched = (weight.state for weights in self._groups for weight in weights)
        self.optimizer.marks.leave(tensor for state in watched for tensor in self._watched_in(state))

    def tell(self, params: list[torch.Tensor]) -> None:
        """Tell that weights are as the step leaves them; later, if others wait for messages first."""
        if self._untold is not None:
            self._untold += params
            return
        for param in params:
            del self._pending[param]
        for final in self.optimizer.finals if params else ():
            final(params)

    def tell_untold(self) -> None:
        """Tell now, and from now on at once."""
        untold, self._untold = self._untold or [], None
        self.tell(untold)

    def _watched_in(self, state: dict[str, Any]) -> list[torch.Tensor]:
        if len(state) == 1:  # momentum alone
            return []
        return [state[name] for name in self.optimizer.watched if name in state]

    def _notice(self, weights: list[ParamStep]) -> None:
        """Find out what somebody else has made of the state since the last step."""
        marks = self.optimizer.marks
        touched = [weight for weight in weights if marks.are_touched(self._watched_in(weight.state))]
        for weight in touched:
            self.optimizer.starts.forget(weight.param)
        restart_emptied([(weight.param, weight.state) for weight in touched if STEP in weight.state])


class EngineStep:
    """The weights of one engine in one step: those of one direction, in one type of numbers.

    What a variant works with that carries out the update of all matrices itself
    (:meth:`megatron_muon.optimizers.stages.Variant.update`).

    Attributes:
        engine: goes over their matrices.
        direction: of all of them.
        weights: by the number that the engine has for each; those that this rank has a gradient for.
    """

    def __init__(self, step: Step, engine: StepEngine, direction: str, weights: Sequence[ParamStep]) -> None:
        self.step, self.engine, self.direction = step, engine, direction
        self.weights: Mapping[int, ParamStep] = dict(enumerate(weights))
        self._optimizer = step.optimizer
        if direction == MSIGN and engine.shares:
            sharing = self._optimizer.engines.sharing
            assert sharing is not None
            number = dict(zip(step.params, sharing.numbers, strict=True))
            self.weights = {number[weight.param]: weight for weight in weights}

    def run(self) -> None:
        """As the optimizer does it: orthogonalized once, or in a ball of entries, rows or columns."""
        if self.direction != MSIGN:
            self._update_in_balls()
        elif self.engine.shares:
            self._update_with_others()
        else:
            self.engine.run(self.read, self._telling(self._writer()))

    def read(self, parts: list[Part], slots: list[torch.Tensor]) -> None:
        """Pack the momentum, or Nesterov's mix of gradient and momentum."""
        pack(self.weights, self._optimizer.variant.transform, parts, slots)

    def matrices(self, parts: list[Part], directions: list[torch.Tensor], reduce: Reduce) -> Matrices:
        """What variants see of a chunk."""
        return matrices_of(self.weights, parts, directions, reduce, self._optimizer.engines.shard)

    def iterations(self, matrices: Matrices, tensors: Sequence[torch.Tensor], state: str, usual: int) -> int:
        """See :meth:`megatron_muon.optimizers.power.WarmStarts.iterations`."""
        return self._optimizer.starts.iterations(matrices, tensors, state, usual)

    def _update_with_others(self) -> None:
        """By a plan for the weights of all data-parallel ranks, whether they have gradients or not."""
        mine, add = self.weights, self._writer()

        def of_mine(parts: list[Part], slots: list[torch.Tensor]) -> tuple[list[Part], list[torch.Tensor]]:
            pairs = [pair for pair in zip(parts, slots, strict=True) if pair[0].item.weight in mine]
            return [part for part, _ in pairs], [slot for _, slot in pairs]

        def read(parts: list[Part], slots: list[torch.Tensor]) -> None:
            for part, slot in zip(parts, slots, strict=True):
                if part.item.weight not in mine:
                    slot.zero_()  # a weight without gradient: the others count on its matrices
            self.read(*of_mine(parts, slots))

        before = self.engine.plan.before_shared

        def write(parts: list[Part], directions: list[torch.Tensor], reduce: Reduce) -> None:
            some, of_some = of_mine(parts, directions)
            if some:
                add(some, of_some, reduce)
            if any(part.item not in before for part in parts):
                self.step.tell_untold()

        self.engine.run(read, self._telling(write))

    def _telling(self, write: Write) -> Write:
        """Tells of each weight when all its matrices have been handed out."""
        left = self.engine.parts.copy()

        def writing(parts: list[Part], directions: list[torch.Tensor], reduce: Reduce) -> None:
            write(parts, directions, reduce)
            left.subtract(part.item.weight for part in parts)
            done = dict.fromkeys(part.item.weight for part in parts if not left[part.item.weight])
            self.step.tell([self.weights[number].param for number in done if number in self.weights])

        return writing

    def _update_in_balls(self) -> None:
        def factor(weight: ParamStep, part: Part) -> float:
            return layout_of(weight.param).ball_factor(part.item.columns, weight.options.ball_radius)

        add = Addition(self.weights, factor)

        def look(parts: list[Part], slots: list[torch.Tensor], reduce: Reduce) -> None:
            matrices = self.matrices(parts, slots, reduce)
            add(parts, matrices.parts(ball_directions(matrices, self.direction)))

        self.engine.visit(look)

    def _writer(self) -> Write:
        """Applies orthogonalized directions to the weights."""
        add, variant = Addition(self.weights, self._scale), self._optimizer.variant

        def write(parts: list[Part], directions: list[torch.Tensor], reduce: Reduce) -> None:
            modes = {self.weights[part.item.weight].options.scale_mode for part in parts}
            if not (variant.adapts or variant.retracts or modes & {UPDATE_NORM, SPECTRAL_NORM}):
                add(parts, directions)
                return
            matrices = self.matrices(parts, directions, reduce)
            batches = variant.adapt(matrices)
            for mode in (UPDATE_NORM, SPECTRAL_NORM):
                which = [index for index, update in enumerate(matrices.updates) if update.options.scale_mode == mode]
                if which:
                    some = Matrices([matrices.updates[index] for index in which], reduce)
                    self._measure(mode, some, [batches[index] for index in which])
            add(parts, matrices.parts(batches))
            if variant.retracts:
                variant.retract(matrices)

        return write

    def _measure(self, mode: str, matrices: Matrices, directions: list[torch.Tensor]) -> None:
        """Give directions the size that a scale mode derives from their norm, in place."""
        if mode == UPDATE_NORM:
            normalize(matrices, directions)
        else:
            spectrally_normalize(matrices, directions, self._optimizer.starts)

    def _scale(self, weight: ParamStep, part: Part) -> float:
        item, options = part.item, weight.options
        factor = scale_factor(options.scale_mode, item.rows, item.columns, self._optimizer.hidden_size)
        return factor * options.extra_scale_factor
