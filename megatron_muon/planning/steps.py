"""What the step engine does with the weights of a rank: told by the engine's own plan, for an accelerator."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch

from megatron_muon.config import MuonConfig
from megatron_muon.engine.modes import AUTO, BLOCKWISE, LENT, MODES, OWNER, SPLIT, Cost, Sizes
from megatron_muon.engine.plan import Weight
from megatron_muon.engine.prediction import Choice, matrices_by_mode, predict
from megatron_muon.engine.step import StepEngine
from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.precision import precision_of
from megatron_muon.optimizers.stiefel_solvers import SIGN_STEPS, SOLVERS
from megatron_muon.orthogonalize.coefficients import iteration
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer
from megatron_muon.orthogonalize.switches import matmul_precision
from megatron_muon.planning.memory import Known, Taken, memory_of_step
from megatron_muon.planning.rates import Rates
from megatron_muon.planning.rehearsal import Forms, Group, SymmetricKernel
from megatron_muon.planning.timing import Times, step_times
from megatron_muon.routing.layout import MSIGN, STIEFEL

_DEVICE = torch.device("cuda")
"""A plan has no device: it is for the rates of an accelerator. Nothing is put there."""


class StepPlanner:
    """Plans steps under the options of one run, each set of weights once.

    Products are those of torch, unless the options name kernels that compute symmetric results once.

    Attributes:
        precision: the types of numbers.
        orthogonalizer: the iteration.
    """

    def __init__(self, options: MuonConfig, passes: int = 1, gradient: torch.dtype | None = None) -> None:
        """
        Args:
            options: validated.
            passes: how often a step orthogonalizes all matrices; the spectral sphere does so several times.
            gradient: type of the numbers of gradients; None: as the weights that are updated.
        """
        self.options = options
        self.forms = Forms(options.master, options.momentum_dtype, gradient, options.offload, options.chunk_mb)
        self.passes = passes
        # Megatron's optimizers update float32 weights: main copies, the model's own, or what remainders stand for.
        self.precision = precision_of(options, torch.float32)
        kernels = None if options.ns_backend in ("auto", "torch", "onednn") else SymmetricKernel()
        its, tf32 = options.iteration, options.fp32_matmul_prec == "high"
        self.orthogonalizer = Orthogonalizer(
            its(), self.precision.iteration, options.eps, kernels, tf32=tf32, budgeted=its
        )
        self.manifold_work = _ManifoldWork(options)
        self._steps: dict[frozenset[tuple[Weight, int]], Step] = {}
        self._shared: dict[tuple[Weight, ...], list[Step]] = {}
        self._together: dict[tuple[Step, ...], Step] = {}
        self.parts: Known = {}

    def step(self, weights: Sequence[Weight]) -> Step:
        """The step of a rank that updates these weights; their order does not matter to what it costs."""
        key = frozenset(Counter(weights).items())
        if key not in self._steps:
            self._steps[key] = Step(self, weights)
        return self._steps[key]

    def steps(self, weights: Sequence[Weight], ranks: int) -> list[Step]:
        """Those of the ranks of a data-parallel group, each of which holds some weights.

        Args:
            weights: of all of them, with their peers, in the order in which the optimizer has them.
            ranks: how many.
        """
        key = tuple(weights)
        if key not in self._shared:
            held: list[list[Weight]] = [[] for _ in range(ranks)]
            for weight in weights:
                if weight.peers is not None:
                    held[weight.peers.holder].append(dataclasses.replace(weight, peers=None))
            group = next((weight.peers.group for weight in weights if weight.peers is not None), "")
            steps = [Step(self, mine, weights, {group: rank}) for rank, mine in enumerate(held)]
            # The spectral sphere goes over its matrices again and again, and steps in blocks take shards as they are:
            # each rank goes over its own.
            alone = self.passes > 1 or (self.options.blockwise_period > 1 and any(weight.dim for weight in weights))
            shares = not alone and steps[0].engine(self.options.tp_mode).shares
            self._shared[key] = steps if shares else [self.step(mine) for mine in held]
        return self._shared[key]

    def together(self, *steps: Step) -> Step:
        """The steps of several sets of weights of a rank as one."""
        busy = tuple(step for step in steps if step.planned)
        if len(busy) < 2:
            return (*busy, *steps)[0]
        if busy not in self._together:
            weights = [weight for step in busy for weight in step.weights]
            planned = [weight for step in busy for weight in step.planned]
            places = {name: place for step in busy for name, place in step.places.items()}
            self._together[busy] = Step(self, weights, planned, places)
        return self._together[busy]

    def refusals(self, weights: Iterable[Weight]) -> dict[str, str]:
        """The modes of tensor parallelism in which some weight cannot be updated, with the engine's message."""
        step, found = self.step(list(dict.fromkeys(weights))), {}
        for mode in MODES:
            try:
                step.engine(mode)
                step.manifold_engine(mode)
            except ConfigError as error:
                found[mode] = str(error)
        return found


class Step:
    """One step of a rank, in any mode of tensor parallelism; made by :class:`StepPlanner`."""

    def __init__(
        self,
        planner: StepPlanner,
        weights: Sequence[Weight],
        shared: Sequence[Weight] = (),
        places: Mapping[str, int] | None = None,
    ) -> None:
        """
        Args:
            planner: knows the options.
            weights: of the rank.
            shared: those of all ranks of its data-parallel group, if they orthogonalize for one another.
            places: its number there.
        """
        # Updates in balls of entries, rows or columns cost next to nothing.
        self.planner = planner
        self.weights = tuple(weight for weight in weights if weight.layout.direction == MSIGN)
        self.manifold = tuple(weight for weight in weights if weight.layout.direction == STIEFEL)
        self.planned = tuple(weight for weight in shared if weight.layout.direction == MSIGN) or self.weights
        self.places = places or {}
        self._engines: dict[str, StepEngine] = {}
        self._manifold_engines: dict[str, StepEngine] = {}
        self._costs: dict[tuple[str, ...], Cost] = {}
        self._peaks: dict[tuple[int, ...], Taken] = {}

    def engine(self, mode: str) -> StepEngine:
        """The engine that a run would make; it can tell its plan, and nothing else.

        Raises:
            ConfigError: for what the mode cannot do.
        """
        if mode not in self._engines:
            self._engines[mode] = self._new_engine(self.planned, mode)
        return self._engines[mode]

    def manifold_engine(self, mode: str) -> StepEngine:
        """That of weights on the Stiefel manifold, which are wanted whole in every mode that gives one update."""
        whole = BLOCKWISE if mode == BLOCKWISE else OWNER
        if whole not in self._manifold_engines:
            self._manifold_engines[whole] = self._new_engine(self.manifold, whole)
        return self._manifold_engines[whole]

    def cost(self, mode: str, group_ranks: Mapping[str, int]) -> Cost:
        """What a rank does in this step; see :func:`megatron_muon.engine.prediction.predict`.

        Args:
            mode: of tensor parallelism.
            group_ranks: the rank's number in the groups of :mod:`megatron_muon.optimizers.engines`.

        Raises:
            ConfigError: for what the mode cannot do.
        """
        return self._cost(mode, group_ranks) + self._manifold_cost(mode, group_ranks)

    def _manifold_cost(self, mode: str, group_ranks: Mapping[str, int]) -> Cost:
        engine = self.manifold_engine(mode)
        own = engine.local_dtype.itemsize
        # Momentum and weights to the owners, the new weights back, as they are.
        sizes = Sizes(2 * own, own, own)
        return predict(engine.plan, self.planner.manifold_work, sizes, group_ranks)

    def memory_of_step(self, group_ranks: Mapping[str, int]) -> Taken:
        """What it takes, see :func:`megatron_muon.planning.memory.memory_of_step`."""
        options = self.planner.options
        engines = [self.engine(options.tp_mode), *([self.engine(BLOCKWISE)] if options.blockwise_period > 1 else [])]
        key = tuple(group_ranks[name] for name in engines[0].plan.groups())
        if key not in self._peaks:
            with matmul_precision(options.fp32_matmul_prec):
                taken = [
                    memory_of_step(
                        each,
                        group_ranks,
                        nesterov=options.nesterov,
                        forms=self.planner.forms,
                        known=self.planner.parts,
                    )
                    for each in engines
                ]
                self._peaks[key] = Taken(*map(max, zip(*taken, strict=True)))
        return self._peaks[key]

    def lent_bytes(self, mode: str, group_ranks: Mapping[str, int]) -> float:
        """What of it a rank sends to data-parallel ranks, which orthogonalize for one another."""
        engine = self.engine(mode)
        chunks = tuple(chunk for chunk in engine.plan.chunks if chunk.mode in (LENT, SPLIT))
        sizes = Sizes(engine.wire.dtype.itemsize, engine.wire.back.itemsize, engine.wire.gram.itemsize)
        lent = dataclasses.replace(engine.plan, chunks=chunks)
        return predict(lent, self.planner.orthogonalizer, sizes, group_ranks).bytes

    def _cost(self, mode: str, group_ranks: Mapping[str, int]) -> Cost:
        """Of the weights that are orthogonalized."""
        if not any(weight.dim for weight in self.planned):
            mode = AUTO  # nothing is exchanged, so that all modes are one
        engine = self.engine(mode)
        key = (mode, *(f"{name} {group_ranks[name]}" for name in engine.plan.groups()))
        if key not in self._costs:
            wire, orthogonalizer = engine.wire, self.planner.orthogonalizer
            sizes = Sizes(wire.dtype.itemsize, wire.back.itemsize, wire.gram.itemsize)
            once = predict(engine.plan, orthogonalizer, sizes, group_ranks)
            self._costs[key] = sum([once] * self.planner.passes, Cost())
        return self._costs[key]

    def times(self, mode: str, group_ranks: Mapping[str, int], spans: Mapping[str, int], rates: Rates) -> Times:
        """How long it takes on a device: see :func:`megatron_muon.planning.timing.step_times`.

        Solvers on the Stiefel manifold are taken for large float32 products and messages, one after the other.
        """
        options, cost = self.planner.options, self._manifold_cost(mode, group_ranks)
        with matmul_precision(options.fp32_matmul_prec):
            once = step_times(
                self.engine(mode), rates, group_ranks, spans, nesterov=options.nesterov, forms=self.planner.forms
            )
        far = any(spans[name] > rates.numbers["node"] for name in self.manifold_engine(mode).plan.groups())
        manifold = Times(products=cost.flops / rates.numbers["float32.flops"])
        if cost.collectives:
            link, each = "between" if far else "within", cost.bytes / cost.collectives
            setattr(manifold, link, cost.collectives * rates.message_seconds(link, each))
        return sum([once] * self.planner.passes, manifold)

    def choices(self, mode: str) -> Counter[Choice]:
        """How many matrices of which shape the ranks of the groups together treat in which way."""
        return matrices_by_mode(self.engine(mode).plan) + matrices_by_mode(self.manifold_engine(mode).plan)

    def _new_engine(self, weights: tuple[Weight, ...], mode: str) -> StepEngine:
        options, precision = self.planner.options, self.planner.precision
        groups = {weight.group: Group.of(weight.ranks) for weight in weights if weight.dim}
        tensor = max((weight.ranks for weight in weights), default=1)
        for peers in {weight.peers for weight in weights if weight.peers is not None}:
            groups[peers.group] = Group.of(peers.ranks, self.places.get(peers.group, 0))
            if peers.wide:
                groups[peers.wide] = Group.of(peers.ranks * tensor)
        return StepEngine(
            weights,
            groups,
            self.planner.orthogonalizer,
            mode=mode,
            dtype=precision.own,
            wire_dtype=precision.wire,
            chunk_mb=options.chunk_mb,
            device=_DEVICE,
        )


class _ManifoldWork(Orthogonalizer):
    """Tells what an update of a matrix on the Stiefel manifold takes."""

    def __init__(self, options: MuonConfig) -> None:
        super().__init__(iteration("polar_express", SIGN_STEPS), torch.float32)
        self._solver, self._iterations = SOLVERS[options.stiefel_solver], options.stiefel_iterations

    def flops(self, p: int, q: int) -> int:
        """Multiplications and additions that one p x q matrix takes."""
        return self._solver.flops(p, q, self._iterations)
