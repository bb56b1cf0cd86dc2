"""One step of an optimizer: momentum, the directions of all matrices, and their addition to the weights."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_muon.config import MuonConfig
from megatron_muon.engine.callbacks import Reduce, Write
from megatron_muon.engine.plan import MatrixSlice
from megatron_muon.engine.slices import Slices
from megatron_muon.engine.step import StepEngine
from megatron_muon.optimizers.agreement import agree
from megatron_muon.optimizers.balls import ball_directions
from megatron_muon.optimizers.engines import Engines
from megatron_muon.optimizers.fading import forget_faded
from megatron_muon.optimizers.findings import Finding
from megatron_muon.optimizers.groups import all_options
from megatron_muon.optimizers.handled import STEP, HostReads, TensorVersions
from megatron_muon.optimizers.matrices import Matrices, Update, matrices_of
from megatron_muon.optimizers.param_step import ParamStep, add, damp, pack, update_momentum
from megatron_muon.optimizers.power import WarmStarts
from megatron_muon.optimizers.precision import own_dtype
from megatron_muon.optimizers.probe import Probe
from megatron_muon.optimizers.rates import Options, note_peak, on_host, options_of
from megatron_muon.optimizers.scalar_rows import SECOND_MOMENT, RowRates, restart_emptied, row_rates, step_scalar_rows
from megatron_muon.optimizers.sizes import normalize, spectrally_normalize
from megatron_muon.optimizers.stages import Variant
from megatron_muon.optimizers.storage import gradients_of, having_gradients
from megatron_muon.optimizers.windows import Windows
from megatron_muon.orthogonalize.kernels.elementwise import Rate
from megatron_muon.orthogonalize.scale import SPECTRAL_NORM, UPDATE_NORM, scale_factor
from megatron_muon.routing.layout import MSIGN


class Graph(Protocol):
    """An optimizer's step as a CUDA graph, see :class:`megatron_muon.optimizers.graph.StepGraph`."""

    def step(self) -> None:
        """Take a step, by the graph where that does what is to be done."""

    def release(self) -> None:
        """Give back the memory that the graph keeps between steps; those that come are taken without it."""

    def on_device(self, rates: Sequence[GroupRates]) -> list[GroupRates]:
        """The same numbers, as scalars on the device where they change from step to step."""


class SteppingOptimizer(Protocol):
    """What a step needs of its optimizer, which is a ``torch.optim.Optimizer``: see :class:`megatron_muon.Muon`."""

    config: MuonConfig
    variant: Variant
    engines: Engines
    starts: WarmStarts
    versions: TensorVersions
    finals: list[Callable[[list[torch.Tensor]], None]]
    first_lrs: list[Rate]
    graph: Graph | None
    probe: Probe | None
    windows: Windows | None
    watched: tuple[str, ...]
    directions: tuple[str, ...]
    hidden_size: int
    param_groups: list[dict[str, Any]]
    state: Any

    @property
    def steps_in_blocks(self) -> bool:
        """Whether the next step orthogonalizes each shard by itself, although others do not."""

    @property
    def sends(self) -> bool:
        """Whether the step sends messages to data-parallel ranks."""

    def refuse_step(self) -> None:
        """Raise what makes this rank refuse the step."""

    def streaming(self) -> AbstractContextManager[None]:
        """Within, state that lives on the host comes to the device when it is opened."""

    def _init_group(self, group: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class GroupRates:
    """The numbers of one param group in one step.

    Attributes:
        group: the param group.
        params: those of its weights that are in the step.
        options: its options.
        rows: what the scalar optimizer multiplies rows by; None if there are none.
    """

    group: dict[str, Any]
    params: list[torch.Tensor]
    options: Options
    rows: RowRates | None


def rates_of(optimizer: SteppingOptimizer) -> list[GroupRates]:
    """The numbers of the step that comes, of each param group that has weights in it."""
    found = []
    for group, first_lr in zip(optimizer.param_groups, optimizer.first_lrs, strict=True):
        if params := having_gradients(group["params"]):
            options = options_of(group, optimizer.config, optimizer.variant.decays, first_lr)
            states = [optimizer.state[param] for param in params]
            found.append(GroupRates(group, params, options, row_rates(group, options.lr, params, states)))
    return found


def prepare(optimizer: SteppingOptimizer, rates: Sequence[GroupRates]) -> None:
    """Before a step: note peak rates, and forget momentum that has only faded."""
    for group, first_lr in zip(optimizer.param_groups, optimizer.first_lrs, strict=True):
        note_peak(group, optimizer.config, first_lr)
    for each in rates:
        states = [(param, optimizer.state[param]) for param in each.params]
        forget_faded(states, each.options.momentum, optimizer.engines.shard)


def compare(optimizer: SteppingOptimizer, is_idle: Callable[[], bool] = lambda: False) -> bool:
    """Before a step, see :func:`megatron_muon.optimizers.agreement.agree`."""
    engines, groups, directions = optimizer.engines, optimizer.param_groups, optimizer.directions
    return agree(engines, groups, directions, optimizer.refuse_step, lambda: all_options(optimizer), is_idle)


class Step:
    """One step, from gradients to weights.

    Attributes:
        params: all parameters of the optimizer, in the order of its groups.
        finals: who is told of weights that are as the step leaves them.
        in_blocks: whether it orthogonalizes each shard by itself, although other steps do not.
        probe: what looks at its matrices; None: nothing.
        counts: whether it is carried out, and counts: not if it is there to create state, as
            torch.distributed.checkpoint takes one before it saves or loads.
    """

    def __init__(self, optimizer: SteppingOptimizer) -> None:
        self.optimizer = optimizer
        self.finals = optimizer.finals
        self.params = [param for group in optimizer.param_groups for param in group["params"]]
        self.in_blocks = False
        self.probe: Probe | None = None
        self.counts = True
        self._rates: list[GroupRates] = []
        self._watched: list[dict[str, Any]] = []  # state of weights that have any that is watched
        self._pending = dict.fromkeys(self.params)
        self._deferred: list[torch.Tensor] | None = None

    def run(self) -> None:
        """Take the step; raises what :meth:`megatron_muon.Muon.step` raises."""
        with self.optimizer.streaming():
            self.look()
            if self.counts:
                self.change()
            else:
                self.report_final(list(self._pending))

    def look(self) -> None:
        """What comes before anything changes, and is the host's: comparisons, plans, numbers, missing state."""
        optimizer = self.optimizer
        having = having_gradients(self.params)
        self.counts = not compare(optimizer, lambda: self._is_idle(having))
        self.in_blocks = optimizer.steps_in_blocks
        self._engines = optimizer.engines.in_step(self.params, having, optimizer.directions, in_blocks=self.in_blocks)
        for group in optimizer.param_groups:
            optimizer._init_group(group)
        self._notice(having)
        self._rates = rates_of(optimizer)
        prepare(optimizer, self._rates)
        if optimizer.graph is not None:
            self._rates = optimizer.graph.on_device(self._rates)

    def _is_idle(self, having: Sequence[torch.Tensor]) -> bool:
        """Whether rates and this rank's gradients are zero, and there is no state yet.

        Not in Megatron-Core, whose checkpoints make state otherwise, and whose first rate may be 0: its ranks count
        alike.
        """
        optimizer = self.optimizer
        if optimizer.engines.compared_elsewhere or optimizer.engines.sharing is not None:
            return False
        if any(optimizer.state.get(param) for param in having):
            return False
        if any(on_host(group["lr"]) != 0.0 for group in optimizer.param_groups):
            return False
        HostReads.note("whether gradients are zero")
        # Waits for the device: in a first step at rate 0, and then mostly once.
        return not any(grad is not None and bool(grad.any()) for grad in gradients_of(having))

    def change(self) -> None:
        """The part of a step that changes weights and state."""
        probe = self.optimizer.probe
        try:
            if probe is None or not probe.begin():
                self._change()
            else:
                self.probe = probe
                with probe.looking([*self._engines.values()]):
                    self._change()
        except Exception as error:
            error.add_note(
                f"Muon: the step had begun, {len(self._pending)} of {len(self.params)} weights are not done: they or "
                "their momentum may be between two steps. Go on from a checkpoint."
            )
            raise

    def _change(self) -> None:
        optimizer = self.optimizer
        optimizer.variant.begin_step()
        alike: dict[tuple[str, torch.dtype], list[ParamStep]] = defaultdict(list)
        for rates in self._rates:
            weights = [
                ParamStep.of(rates.group, rates.options, param, grad, optimizer.state[param])
                for param, grad in zip(rates.params, gradients_of(rates.params), strict=True)
                if grad is not None
            ]
            rates.group[STEP] += 1
            for weight in weights:
                if STEP in weight.state:
                    weight.state[STEP] += 1
                alike[weight.layout.direction, own_dtype(weight.param.dtype)].append(weight)
            if rates.rows is not None:
                step_scalar_rows(weights, rates.rows)
        self._deferred = [] if optimizer.sends else None
        pairs = zip(self.params, gradients_of(self.params), strict=True)
        self.report_final([param for param, grad in pairs if grad is None])
        # All matrices of one direction together, in the same order on all ranks.
        for (direction, dtype), engine in self._engines.items():
            work = EngineStep(self, engine, direction, alike[direction, dtype])
            optimizer.variant.update(work)
            work.update_momentum()  # of a variant that has not looked at it
        self.report_deferred()
        self.report_final(list(self._pending))
        optimizer.versions.record(self.watched)

    def report_final(self, params: list[torch.Tensor]) -> None:
        """Report that weights are as the step leaves them; deferred while other ranks wait for messages."""
        if self._deferred is not None:
            self._deferred += params
            return
        for param in params:
            del self._pending[param]
        for final in self.finals if params else ():
            final(params)

    def report_deferred(self) -> None:
        """Report what has been deferred, and from now on report at once."""
        deferred, self._deferred = self._deferred or [], None
        self.report_final(deferred)

    @property
    def watched(self) -> list[torch.Tensor]:
        """State of the weights in the step that nobody else should write to unnoticed."""
        return [tensor for state in self._watched for tensor in self._watched_in(state)]

    def _watched_in(self, state: dict[str, Any]) -> list[torch.Tensor]:
        return [state[name] for name in self.optimizer.watched if name in state]

    def _notice(self, params: Sequence[torch.Tensor]) -> None:
        """Find out what somebody else has made of the state since the last step."""
        versions, names = self.optimizer.versions, set(self.optimizer.watched)
        states = [(param, self.optimizer.state[param]) for param in params]
        watched = [(param, state) for param, state in states if not names.isdisjoint(state)]
        touched = [(param, state) for param, state in watched if versions.have_changed(self._watched_in(state))]
        for param, _ in touched:
            self.optimizer.starts.forget(param)
        restart_emptied([(param, state) for param, state in touched if SECOND_MOMENT in state])
        self._watched = [state for _, state in watched]


class EngineStep:
    """The weights of one engine in one step: those of one direction, in one type of numbers.

    What a variant works with that carries out the update of all matrices itself
    (:meth:`megatron_muon.optimizers.stages.Variant.update`).

    Attributes:
        engine: plans and carries out the work on their matrices.
        direction: how their updates are found.
        weights: those that this rank has a gradient for, by their index in the engine's plan.
    """

    def __init__(self, step: Step, engine: StepEngine, direction: str, weights: Sequence[ParamStep]) -> None:
        self.step, self.engine, self.direction = step, engine, direction
        self.weights: Mapping[int, ParamStep] = dict(enumerate(weights))
        self._optimizer = step.optimizer
        self._has_momentum = self._has_run = False
        modes = {weight.options.scale_mode for weight in weights}
        measures, variant = not modes.isdisjoint((UPDATE_NORM, SPECTRAL_NORM)), self._optimizer.variant
        self._changes_directions = measures or variant.adapts or variant.retracts
        if direction == MSIGN and engine.shares:
            sharing = self._optimizer.engines.sharing
            assert sharing is not None
            number = dict(zip(step.params, sharing.numbers, strict=True))
            self.weights = {number[weight.param]: weight for weight in weights}

    def run(self) -> None:
        """Update all matrices: each is orthogonalized once, or moved in a ball of entries, rows or columns.

        Raises:
            RuntimeError: when it is called again.
        """
        if self._has_run:
            raise RuntimeError(
                f"{type(self._optimizer.variant).__name__}.update calls work.run() again, but a step updates each "
                "matrix once: work.engine.run() goes over matrices as often as you like."
            )
        self._has_run = True
        if self.direction != MSIGN:
            self.engine.visit(self._update_in_balls)
            return
        # Each matrix is read just once: its momentum is updated when it is packed.
        first, self._has_momentum = not self._has_momentum, True
        if self.engine.shares:
            self._update_with_others(first)
        else:
            self.engine.run(lambda slices, batches: self._pack(slices, batches, first), self._reporting(self._write))

    def read(self, slices: Sequence[Slices], batches: Sequence[torch.Tensor]) -> None:
        """Pack the momentum, or Nesterov's mix of gradient and momentum, after the variant's ``transform``."""
        self.update_momentum()
        self._pack(slices, batches, False)

    def matrices(self, slices: Sequence[Slices], directions: Sequence[torch.Tensor], reduce: Reduce) -> Matrices:
        """What variants see of a chunk."""
        self.update_momentum()
        return matrices_of(self.weights, slices, directions, reduce, self._optimizer.engines.shard)

    def iterations(self, matrices: Matrices, tensors: Sequence[torch.Tensor], state: str, usual: int) -> int:
        """See :meth:`megatron_muon.optimizers.power.WarmStarts.iterations`."""
        return self._optimizer.starts.iterations(matrices, tensors, state, usual)

    def update_momentum(self) -> None:
        """Let the momentum of all weights take in their gradients, if it has not yet in this step."""
        if not self._has_momentum:
            self._has_momentum = True
            for _, weights in itertools.groupby(self.weights.values(), lambda weight: id(weight.group)):
                update_momentum(list(weights))

    @property
    def is_measured(self) -> bool:
        """Whether :meth:`measure` does anything."""
        return self.step.probe is not None

    def measure(
        self,
        matrices: Matrices,
        results: Sequence[torch.Tensor],
        changes: Sequence[torch.Tensor] | None,
        factor: Callable[[Update], Rate | torch.Tensor],
        *,
        are_successive: bool = True,
    ) -> None:
        """See :meth:`megatron_muon.optimizers.stages.Work.measure`."""
        self._note(self._look(matrices, results, None, are_successive), matrices, changes, factor)

    def _look(
        self,
        matrices: Matrices,
        results: Sequence[torch.Tensor] | None,
        eps: float | None,
        are_successive: bool = True,
    ) -> list[Finding]:
        """See :meth:`megatron_muon.optimizers.probe.Probe.look`."""
        if (probe := self.step.probe) is None:
            return []
        with probe.aside(self.engine):
            return probe.look(matrices, results, self._mixed, eps, are_successive=are_successive)

    def _note(
        self,
        found: Sequence[Finding],
        matrices: Matrices,
        changes: Sequence[torch.Tensor] | None,
        factor: Callable[[Update], Rate | torch.Tensor],
    ) -> None:
        """See :meth:`megatron_muon.optimizers.probe.Probe.added`."""
        if found and (probe := self.step.probe) is not None:
            with probe.aside(self.engine):
                probe.added(found, matrices, changes, factor)

    def _mixed(self, update: Update) -> torch.Tensor:
        mixed = update.mix()
        if self.direction == MSIGN:
            self._optimizer.variant.transform([mixed])
        return mixed

    def _pack(self, slices: Sequence[Slices], batches: Sequence[torch.Tensor], first: bool) -> None:
        pack(self.weights, slices, batches, first=first)
        self._optimizer.variant.transform(batches)
        damp(self.weights, slices, batches)

    def _update_with_others(self, first: bool) -> None:
        """Update by a plan for the weights of all data-parallel ranks, whether they have gradients or not."""

        def cut(
            slices: Sequence[Slices], batches: Sequence[torch.Tensor]
        ) -> Iterator[tuple[Slices, torch.Tensor, bool]]:
            for each, batch in zip(slices, batches, strict=True):
                for run, start, stop in each.runs([number in self.weights for number in each.numbers]):
                    yield run, batch[start:stop], run.numbers[0] in self.weights

        def read(slices: Sequence[Slices], batches: Sequence[torch.Tensor]) -> None:
            for run, batch, is_mine in cut(slices, batches):
                if is_mine:
                    self._pack([run], [batch], first)
                else:
                    batch.zero_()  # a weight without gradient: the others count on its matrices

        before = self.engine.plan.before_shared

        def write(slices: Sequence[Slices], directions: Sequence[torch.Tensor], reduce: Reduce) -> None:
            mine = [(run, batch) for run, batch, is_mine in cut(slices, directions) if is_mine]
            if mine:
                self._write([run for run, _ in mine], [batch for _, batch in mine], reduce)
            if slices[0].items[0] not in before:
                self.step.report_deferred()

        self.engine.run(read, self._reporting(write))

    def _reporting(self, write: Write) -> Write:
        """A ``write`` that also reports each weight once all its matrices have been handed out."""
        left = self.engine.parts.copy()

        def writing(slices: Sequence[Slices], directions: Sequence[torch.Tensor], reduce: Reduce) -> None:
            write(slices, directions, reduce)
            done = []
            for number in itertools.chain.from_iterable(each.numbers for each in slices):
                left[number] -= 1
                if not left[number] and number in self.weights:
                    done.append(self.weights[number].param)
            self.step.report_final(done)

        return writing

    def _update_in_balls(self, slices: Sequence[Slices], blanks: Sequence[torch.Tensor], reduce: Reduce) -> None:
        matrices = self.matrices(slices, blanks, reduce)
        slices = [update.slices for update in matrices.updates]
        found = self._look(matrices, None, None)
        directions = ball_directions(matrices, self.direction)
        self._note(found, matrices, directions, lambda update: self._factor(update, self._ball_factor))
        add(self.weights, slices, directions, self._ball_factor, lambda weight, _: weight.layout.kind)

    def _write(self, slices: Sequence[Slices], directions: Sequence[torch.Tensor], reduce: Reduce) -> None:
        """Apply orthogonalized directions to the weights."""
        variant = self._optimizer.variant
        its_own = self._is_block if self.step.in_blocks else None
        if not self._changes_directions:
            if self.step.probe is not None:
                matrices = self.matrices(slices, directions, reduce)
                self._note(self._look_at(matrices), matrices, None, self._factor)
            add(self.weights, slices, directions, self._scale, its_own)
            return
        matrices = self.matrices(slices, directions, reduce)
        found = self._look_at(matrices)
        batches = _checked(variant, matrices, variant.adapt(matrices))
        for mode in (UPDATE_NORM, SPECTRAL_NORM):
            which = [index for index, update in enumerate(matrices.updates) if update.options.scale_mode == mode]
            if which:
                some = Matrices([matrices.updates[index] for index in which], reduce)
                measured = normalize if mode == UPDATE_NORM else spectrally_normalize
                measured(some, [batches[index] for index in which])
        self._note(found, matrices, batches, self._factor)
        add(self.weights, [update.slices for update in matrices.updates], batches, self._scale, its_own)
        if variant.retracts:
            variant.retract(matrices)

    def _look_at(self, matrices: Matrices) -> list[Finding]:
        eps = self._optimizer.config.eps
        return self._look(matrices, [update.direction for update in matrices.updates], eps)

    def _scale(self, weight: ParamStep, item: MatrixSlice) -> float:
        factor = scale_factor(weight.options.scale_mode, item.rows, item.columns, self._optimizer.hidden_size)
        factor *= self._optimizer.config.blockwise_lr_mult if self._is_block(weight, item) else 1.0
        return factor * weight.options.extra_scale_factor

    def _factor(
        self, update: Update, scale: Callable[[ParamStep, MatrixSlice], float] | None = None
    ) -> Rate | torch.Tensor:
        """What directions are multiplied by, learning rate and all: a number, or one for each matrix."""
        items = update.slices.items
        factors = list(itertools.starmap(scale or self._scale, zip(update.weights, items, strict=True)))
        if len(set(factors)) == 1:
            return factors[0] * update.options.lr
        parts = zip(factors, update.slices.counts, strict=True)
        return torch.cat([update.direction.new_full((count,), each) for each, count in parts]) * update.options.lr

    def _is_block(self, _: ParamStep, item: MatrixSlice) -> bool:
        """Whether it is a part of a matrix that is orthogonalized as a matrix, in this step and not in others."""
        return self.step.in_blocks and self.engine.plan.weights[item.weight].cuts(item.block)

    @staticmethod
    def _ball_factor(weight: ParamStep, item: MatrixSlice) -> float:
        return weight.layout.ball_factor(item.columns, weight.options.ball_radius)


def _checked(variant: Variant, matrices: Matrices, batches: Any) -> list[torch.Tensor]:
    """What :meth:`Variant.adapt` returned; other shapes would be stretched to those of the weights.

    Raises:
        TypeError: unless it is one tensor of its direction's shape for each update.
    """
    wanted = [update.direction.shape for update in matrices.updates]
    if batches is None or [getattr(batch, "shape", None) for batch in batches] != wanted:
        raise TypeError(
            f"{type(variant).__name__}.adapt must return a list with one tensor of the shape of its direction for each "
            f"of {len(wanted)} updates."
        )
    return list(batches)
