"""The step of an optimizer as a CUDA graph: launched once by the host for all of its kernels and messages.

A graph does again what was captured, with the same memory and the same numbers. What changes from step to step - the
learning rate, and what follows from it and from weight decay and the count of steps - is therefore kept in scalars on
the device, which the host fills before each launch. Everything else is compared: where an option, the memory of a
weight, a gradient or state, or the set of weights with gradients is not what was captured, the step is taken anew,
without the graph, and is right all the same. Nothing is read on the host in a captured step.

What others do in a step (comparisons of ranks, QK-clip, gathers of parameters) is done by the host before the graph is
launched, or after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_muon.agree import Ranks, backends_of
from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.handled import STEP, HostReads
from megatron_muon.optimizers.step import GroupRates, Step, SteppingOptimizer, compare, prepare, rates_of
from megatron_muon.optimizers.storage import gradients_of
from megatron_muon.orthogonalize.kernels.elementwise import Rate
from megatron_muon.routing.blocks import is_dtensor
from megatron_muon.routing.layout import layout_of

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Captures the work that a function launches, without running it, and returns what runs it again and again."""

WARMUP_STEPS = 3
"""Steps before the first that is captured: as many as Megatron-Core's ``--cuda-graph-warmup-steps`` has by default."""


def cuda_graph(
    work: Callable[[], None], pool: Any = None, stream: torch.cuda.Stream | None = None
) -> Callable[[], None]:
    """Capture work in a CUDA graph: a :data:`Capture`.

    Args:
        work: launches kernels and collectives.
        pool: memory for what they allocate, see ``torch.cuda.graph``; it stays taken.
        stream: to capture on.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as NCCL's watchdog and data loaders, go on calling CUDA meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph.replay


class _DeviceScalars:
    """Numbers as scalars on a device, float64: what the host computes is what a kernel reads."""

    def __init__(self) -> None:
        self._held: dict[Hashable, tuple[float, torch.Tensor]] = {}

    def hold(self, place: Hashable, number: Rate, device: torch.device) -> torch.Tensor:
        """The scalar of a place, with this number: always the same memory."""
        known, scalar = self._held.get(place) or (math.nan, torch.empty((), dtype=torch.float64, device=device))
        if isinstance(number, torch.Tensor):
            known, scalar = math.nan, scalar.copy_(number.reshape(()))  # which others may write to at any time
        elif known != number:
            known, scalar = number, scalar.fill_(number)  # a kernel that takes the number along: nobody waits
        self._held[place] = known, scalar
        return scalar


class StepGraph:
    """The step of one optimizer, captured when it is asked for and replayed while it is the same.

    Attributes:
        optimizer: whose step it is.
        before: called at the beginning of each step.
    """

    def __init__(self, optimizer: SteppingOptimizer, how: Capture = cuda_graph) -> None:
        """
        Args:
            optimizer: on one GPU.
            how: captures.

        Raises:
            ConfigError: if its step cannot be captured, saying what prevents it.
        """
        self.optimizer, self.before = optimizer, list[Callable[[], None]]()
        self._capture, self._scalars = how, _DeviceScalars()
        self._replay: Callable[[], None] | None = None
        self._captured: tuple[Any, ...] = ()
        self._last: tuple[Any, ...] = ()
        self._has_read = False
        self._wanted = False
        _refuse(optimizer, _obstacles(optimizer))

    @property
    def is_captured(self) -> bool:
        """Whether the next step, if it is as it looks now, is launched as a graph."""
        return self._replay is not None and self._pattern(rates_of(self.optimizer)) == self._captured

    @property
    def reason(self) -> str:
        """Why the next step cannot be captured; empty if it can."""
        if self._pattern(rates_of(self.optimizer)) != self._last:
            return "its options, or the memory of weights, gradients or state, are not those of the last step"
        return "the last step read numbers of the device on the host, as first steps do" if self._has_read else ""

    def capture_next(self) -> None:
        """Capture the next step; the ranks that it communicates with must do so in the same step."""
        self._wanted = True

    def release(self) -> None:
        """See :class:`megatron_muon.optimizers.step.Graph`."""
        self._replay, self._captured, self._scalars = None, (), _DeviceScalars()

    def step(self) -> None:
        """See :class:`megatron_muon.optimizers.step.Graph`."""
        for each in self.before:
            each()
        optimizer, reads = self.optimizer, HostReads.count
        try:
            rates = rates_of(optimizer)
        except Exception:
            compare(optimizer)  # refuses what is no number, on all ranks
            raise
        self._last = self._pattern(rates)
        # What is to be measured is taken anew, with the same bits; a capture waits for the next step.
        is_measured = optimizer.probe is not None and optimizer.probe.is_wanted
        if self._wanted and not is_measured:
            self._wanted = False
            self._capture_step(rates)
        elif is_measured or self._replay is None or self._last != self._captured or self._is_touched(rates):
            Step(optimizer).run()
            self._last = self._pattern(rates_of(optimizer))  # with state that was missing
        else:
            self._replay_step(rates)
        self._has_read = HostReads.count != reads

    def on_device(self, rates: Sequence[GroupRates]) -> list[GroupRates]:
        """See :class:`megatron_muon.optimizers.step.Graph`."""
        return [self._held(number, each) for number, each in enumerate(rates)]

    def _held(self, number: int, rates: GroupRates) -> GroupRates:
        device = rates.params[0].device

        def hold(name: Hashable, rate: Rate) -> torch.Tensor:
            return self._scalars.hold((number, name), rate, device)

        def hold_if(name: str, rate: Rate | None) -> torch.Tensor | None:
            return None if rate is None else hold(name, rate)

        options, rows = rates.options, rates.rows
        kept, cautious = hold_if("kept", options.kept), hold_if("cautious", options.cautious)
        options = replace(options, lr=hold("lr", options.lr), kept=kept, cautious=cautious)
        if rows is not None:
            classes = _classes(rows.counts)
            firsts = tuple(hold(("first", each), rate) for each, rate in zip(classes, rows.firsts, strict=True))
            roots = tuple(hold(("root", each), rate) for each, rate in zip(classes, rows.roots, strict=True))
            lr, kept = hold("row lr", rows.lr), hold_if("row kept", rows.kept)
            rows = replace(rows, lr=lr, kept=kept, firsts=firsts, roots=roots)
        return replace(rates, options=options, rows=rows)

    def _pattern(self, rates: Sequence[GroupRates]) -> tuple[Any, ...]:
        """What a captured step takes for granted: options that stay, and the memory that it works on."""
        memory: list[int] = []
        for group in self.optimizer.param_groups:
            for param, grad in zip(group["params"], gradients_of(group["params"]), strict=True):
                memory += (param.data_ptr(), 0 if grad is None else grad.data_ptr(), id(layout_of(param)))
                state = self.optimizer.state.get(param, {}).values()
                memory += (value.data_ptr() for value in state if isinstance(value, torch.Tensor))
        return (*(_fixed(each) for each in rates), *memory)

    def _watched(self, rates: Sequence[GroupRates]) -> Iterator[torch.Tensor]:
        """What a step looks at on the host if somebody else has written to it; not kept, as it may be moved away."""
        state, names = self.optimizer.state, self.optimizer.watched
        states = (state[param] for each in rates for param in each.params)
        return (its[name] for its in states for name in names if name in its)

    def _is_touched(self, rates: Sequence[GroupRates]) -> bool:
        """Whether somebody else has written to it."""
        return self.optimizer.versions.have_changed(self._watched(rates)) or not self.optimizer.variant.is_settled()

    def _capture_step(self, rates: Sequence[GroupRates]) -> None:
        step = Step(self.optimizer)
        step.finals = []  # told after the launch: what they do is the host's
        step.look()
        self._replay = None  # frees the memory of an earlier graph
        with HostReads.none():
            self._replay = self._capture(step.change)
        self._captured = self._last
        self._launch(rates)

    def _replay_step(self, rates: Sequence[GroupRates]) -> None:
        optimizer = self.optimizer
        if not optimizer.engines.compared_elsewhere:
            compare(optimizer)
        prepare(optimizer, rates)
        self.on_device(rates)
        for each in rates:
            each.group[STEP] += 1
            for param in each.params:
                state = optimizer.state[param]
                if STEP in state:
                    state[STEP] += 1
        self._launch(rates)

    def _launch(self, rates: Sequence[GroupRates]) -> None:
        optimizer = self.optimizer
        assert self._replay is not None
        self._replay()
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for final in optimizer.finals if params else ():
            final(params)
        optimizer.versions.record(self._watched(rates))


def _fixed(rates: GroupRates) -> tuple[Any, ...]:
    """What is captured as it is of the numbers of a param group."""
    options, rows, group = rates.options, rates.rows, rates.group
    fixed: list[Any] = [replace(options, lr=0.0, kept=_whether(options.kept), cautious=_whether(options.cautious))]
    if rows is not None:
        fixed += [group["scalar_optimizer"], tuple(group["scalar_betas"]), group["scalar_eps"]]
        fixed += [_whether(rows.kept), rows.mixed, _classes(rows.counts)]
    return tuple(fixed)


def _whether(rate: Rate | None) -> float | None:
    return None if rate is None else 0.0


def _classes(counts: Sequence[int]) -> tuple[int, ...]:
    """Which of them are equal, by numbers from 0 in the order in which they come: these stay as all are counted on."""
    found: dict[int, int] = {}
    return tuple(found.setdefault(count, len(found)) for count in counts)


def _obstacles(optimizer: SteppingOptimizer) -> Iterator[str]:
    """Why its step cannot be captured."""
    if optimizer.variant.obstacle:
        yield optimizer.variant.obstacle
    if optimizer.windows is not None:
        yield f"with --muon-offload {optimizer.config.offload} state comes from the host and goes back in each step"
    period = optimizer.config.blockwise_period
    if period > 1 and any(group.size() > 1 for group in optimizer.engines.groups.values()):
        yield f"with --muon-blockwise-period {period} one step in {period} is not like the others"


def _refuse(optimizer: SteppingOptimizer, obstacles: Iterator[str]) -> None:
    if reason := next(obstacles, ""):
        raise ConfigError(
            f"{type(optimizer).__name__} in a CUDA graph (--optimizer-cuda-graph): {reason}. Leave the flag, or "
            "the call of capture(), out."
        )


def check_device(optimizer: SteppingOptimizer) -> None:
    """Refuse weights that are not on a GPU, and groups that exchange them by other backends than NCCL.

    Raises:
        ConfigError: naming device, or group and backend.
    """
    _refuse(optimizer, _obstacles_of_device(optimizer))


def _obstacles_of_device(optimizer: SteppingOptimizer) -> Iterator[str]:
    device = next((param.device for group in optimizer.param_groups for param in group["params"]), None)
    if device is None:
        return
    if device.type != "cuda":
        yield f"its weights are on {device}, and CUDA graphs are of GPUs"
        return
    sharing = optimizer.engines.sharing
    for name, group in {**optimizer.engines.groups, **({} if sharing is None else sharing.groups)}.items():
        if group.size() > 1 and (backend := backends_of(group).get("cuda")) != "nccl":
            yield f"its {name} group has the backend {backend}, and only NCCL's messages can be captured"


class Captures:
    """When the ranks of a model capture the steps of their optimizers: all in the same step, or none.

    NCCL may exchange addresses while its messages are captured, for which all ranks must be there.
    """

    def __init__(self, graphs: Sequence[StepGraph], ranks: Ranks, warmup: int = WARMUP_STEPS) -> None:
        """
        Args:
            graphs: of this rank; may be none.
            ranks: that make their steps together.
            warmup: steps before the first attempt. There are others after twice, four times, ... as many.
        """
        self._graphs, self._ranks = graphs, ranks
        self._steps, self._next = 0, max(1, warmup)

    def before_step(self) -> None:
        """To be called on all ranks, when gradients are ready."""
        if self._steps == self._next:
            self._next *= 2
            self._attempt()
        self._steps += 1

    def _attempt(self) -> None:
        def look() -> tuple[bool, str]:
            for each in self._graphs:
                each.optimizer.refuse_step()
            reasons = [each.reason for each in self._graphs]
            return all(each.is_captured for each in self._graphs), next(filter(None, reasons), "")

        found = self._ranks.by_number(look)
        if all(is_captured for is_captured, _ in found.values()):
            return
        told = f"megatron_muon: step {self._steps + 1} of the optimizer is captured in a CUDA graph"
        if refused := {rank: reason for rank, (_, reason) in found.items() if reason}:
            rank, reason = next(iter(refused.items()))
            told = (
                f"megatron_muon: the optimizer's step is not captured in a CUDA graph yet: on {len(refused)} of "
                f"{len(found)} ranks (first: {rank}) {reason}; tried again at step {self._next + 1}"
            )
        for each in () if refused else self._graphs:
            each.capture_next()
        if self._ranks.is_first:
            print(told, flush=True)


def capture(
    optimizer: SteppingOptimizer, warmup: int = WARMUP_STEPS, ranks: Ranks | None = None, how: Capture | None = None
) -> StepGraph:
    """Have an optimizer's steps captured in a CUDA graph, after some that are not.

    ``optimizer.step()`` stays what is called. Learning rates and weight decay may change at any time; gradients must
    be in the same memory in each step (``zero_grad(set_to_none=False)``).

    Args:
        optimizer: on a GPU.
        warmup: steps before the first that is captured.
        ranks: that make their steps together; by default those of its tensor-parallel groups.
        how: captures; None: :func:`cuda_graph`.

    Raises:
        ConfigError: if its step cannot be captured, saying what prevents it.
    """
    if any(is_dtensor(param) for group in optimizer.param_groups for param in group["params"]):
        raise ConfigError(
            "capture() of an optimizer of DTensors, whose gradients come in other memory: step() as it is."
        )
    if how is None:
        check_device(optimizer)
    graph = StepGraph(optimizer, how or cuda_graph)
    groups = tuple(group for group in optimizer.engines.groups.values() if group.size() > 1)
    graph.before.append(Captures([graph], Ranks(groups) if ranks is None else ranks, warmup).before_step)
    optimizer.graph = graph
    return graph
