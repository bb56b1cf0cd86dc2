"""The step engines of one optimizer: one for each direction and set of weights, planned when it is first asked for."""

from __future__ import annotations

import functools
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon.config import MuonConfig
from megatron_muon.engine.modes import BLOCKWISE, DUPLICATED, OWNER
from megatron_muon.engine.placements import Division, Divisions
from megatron_muon.engine.plan import Peers, Weight
from megatron_muon.engine.shards import Shard, shard_of
from megatron_muon.engine.step import StepEngine
from megatron_muon.errors import ConfigError
from megatron_muon.optimizers import codecs
from megatron_muon.optimizers.precision import Precision, leaves_bfloat16, own_dtype, precision_of
from megatron_muon.orthogonalize.backends import candidates, report
from megatron_muon.orthogonalize.bfloat16 import slow_bfloat16
from megatron_muon.orthogonalize.kernels import elementwise
from megatron_muon.orthogonalize.kernels.gate import Trial
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer
from megatron_muon.orthogonalize.products import TorchProducts
from megatron_muon.orthogonalize.switches import matmul_precision
from megatron_muon.routing.layout import MSIGN, ORTHOGONALIZE, STIEFEL, Budget, layout_of

BUCKET_ATTRIBUTE = "muon_bucket"
"""Attribute of parameters with :attr:`megatron_muon.engine.plan.Weight.bucket`."""

DIVISION_ATTRIBUTE = "muon_division"
"""Attribute of the local tensors of DTensors with their :class:`megatron_muon.engine.placements.Division`."""

DENSE, EXPERT = "tensor-parallel", "expert tensor-parallel"
"""Names of the groups that divide weights."""

DATA, EXPERT_DATA, WIDE = "data-parallel", "expert data-parallel", "tensor x data-parallel"
"""Names of the groups whose ranks may orthogonalize for one another."""

type Offers = dict[str, tuple[TorchProducts, float, str]]
"""Usable kernels by the name of their backend, the best first: products, seconds of a trial, a line for the report."""

_MOST_ENGINES = 8
"""How many engines an optimizer keeps, since the weights with gradients may alternate; the least recently used goes."""


@dataclass(frozen=True)
class Sharing:
    """The weights of a layer-wise optimizer on all ranks of its data-parallel groups.

    Attributes:
        weights: of all ranks, in an order that is the same on all; with their peers.
        numbers: which of them the optimizer's own are, in the order of its param groups.
        groups: the groups that their peers name.
        device: of all of them.
    """

    weights: Sequence[Weight]
    numbers: Sequence[int]
    groups: Mapping[str, dist.ProcessGroup]
    device: torch.device


def grouped_by_engine(
    params: Sequence[torch.Tensor], directions: Sequence[str]
) -> dict[tuple[str, torch.dtype], list[torch.Tensor]]:
    """The parameters of each engine, in the order of the step: those of one direction and one dtype of momentum.

    Args:
        params: in any order, which each engine's parameters keep.
        directions: kinds of updates, in the order of the step.
    """
    found: dict[tuple[str, torch.dtype], list[torch.Tensor]] = defaultdict(list)
    for param in params:
        found[layout_of(param).direction, own_dtype(param.dtype)].append(param)
    return {kind: found[kind] for kind in sorted(found, key=lambda kind: (directions.index(kind[0]), str(kind[1])))}


class _CachedEngine:
    """An engine, with weak references to the parameters that it was planned for."""

    def __init__(self, engine: StepEngine, kind: tuple[str, str], params: Sequence[torch.Tensor]) -> None:
        self.engine, self._kind, self._device = engine, kind, params[0].device
        self._params = [weakref.ref(param) for param in params]

    def is_for(self, kind: tuple[str, str], params: Sequence[torch.Tensor]) -> bool:
        """Whether it is the engine for these parameters, in this order, as they are now."""
        if kind != self._kind or len(params) != len(self._params) or params[0].device != self._device:
            return False
        # Shapes and layouts, too: memory may have been replaced, and weights been annotated anew.
        return all(
            known() is param
            and param.shape == weight.shape
            and ((layout := layout_of(param)) is weight.layout or layout == weight.layout)
            for known, param, weight in zip(self._params, params, self.engine.plan.weights, strict=True)
        )


class Engines:
    """Makes engines and keeps them: parameters with gradients may alternate between steps.

    Attributes:
        elementwise_note: a line for the report: by what elementwise passes are done; empty where there is no choice.
        divisions: those of DTensors.
        compared_elsewhere: whether somebody else makes all ranks of the model compare, before each step, which weights
            have gradients, after they have compared the plans for all weights
            (:mod:`megatron_muon.plugin.nonfinite`).
        compared_groups: names of the groups whose ranks compare their plans in each step; None before the first step.
        products: the kernels that multiply, by kind of device and dtype of the iteration.
        sharing: the weights of the data-parallel ranks that work may be shared with; None if there are none.
        slow_bfloat16: whether the device of one of the ranks has no fast bfloat16; None: nobody has looked.
    """

    def __init__(
        self,
        config: MuonConfig,
        tp_group: dist.ProcessGroup | None,
        expert_tp_group: dist.ProcessGroup | None,
        *,
        damped: bool,
    ) -> None:
        """
        Args:
            config: validated.
            tp_group: tensor-parallel group of dense weights; None if nothing is divided.
            expert_tp_group: that of weights with ``expert_tp = True``.
            damped: whether ``eps`` is added to norms, see :class:`megatron_muon.Muon`.
        """
        self.config, self._damped = config, damped
        self._tp_group, self._expert_tp_group = tp_group, expert_tp_group
        groups = {DENSE: tp_group, EXPERT: expert_tp_group}
        self._groups = {name: group for name, group in groups.items() if group is not None}
        self.divisions = Divisions()
        self._kept: list[_CachedEngine] = []  # the last used is the first
        self.elementwise_note = ""
        self.products: dict[tuple[str, torch.dtype], TorchProducts] = {}
        self.compared_elsewhere = False
        self.slow_bfloat16: bool | None = None
        self.sharing: Sharing | None = None
        self._shared: StepEngine | None = None
        self._settled: Mapping[str, int] = {}
        self.compared_groups: list[str] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Engines:
        """A copy with the same process groups but no engines, which belong to the weights of the original."""
        copied = Engines(self.config, self._tp_group, self._expert_tp_group, damped=self._damped)
        copied.sharing, copied.products, copied._settled = self.sharing, dict(self.products), self._settled
        copied.divisions, copied.slow_bfloat16 = self.divisions, self.slow_bfloat16
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        """How pickle makes it anew: from its options, without engines.

        Raises:
            ConfigError: if ranks share weights.
        """
        if self.sharing is not None or any(group.size() > 1 for group in self.groups.values()):
            raise ConfigError(
                "pickle of an optimizer whose ranks share weights: process groups do not leave their process. Save its "
                "state_dict(), and build it anew."
            )
        return functools.partial(Engines, damped=self._damped), (self.config, None, None)

    def __iter__(self) -> Iterator[StepEngine]:
        return iter([*(kept.engine for kept in self._kept), *([] if self._shared is None else [self._shared])])

    @property
    def groups(self) -> dict[str, dist.ProcessGroup]:
        """The groups that divide weights, by their names."""
        return {**self._groups, **self.divisions.groups}

    def shard(self, param: torch.Tensor) -> Shard | None:
        """The shard that a parameter is, see :func:`megatron_muon.engine.shards.shard_of`."""
        division: Division | None = getattr(param, DIVISION_ATTRIBUTE, None)
        if division is not None:
            return division.shard
        return shard_of(param, self._tp_group, self._expert_tp_group)

    def weight(self, param: torch.Tensor, peers: Peers | None = None) -> Weight:
        """What the engine must know of a parameter."""
        shard, layout, bucket = self.shard(param), layout_of(param), getattr(param, BUCKET_ATTRIBUTE, 0)
        if shard is None:
            return Weight(tuple(param.shape), layout, bucket=bucket, peers=peers)
        division: Division | None = getattr(param, DIVISION_ATTRIBUTE, None)
        name = EXPERT if getattr(param, "expert_tp", False) else DENSE
        name = name if division is None else division.group
        return Weight(tuple(param.shape), layout, shard.dim, name, shard.size, bucket, peers, shard.pieces)

    def of(self, params: Sequence[torch.Tensor], direction: str = MSIGN, *, in_blocks: bool = False) -> StepEngine:
        """The engine for these parameters, in this order, all of one direction.

        Args:
            params: of one dtype of momentum.
            direction: how their updates are found.
            in_blocks: whether it is that of steps that orthogonalize each shard by itself (``blockwise_period``).
        """
        kind = direction, self._mode_of(direction, in_blocks)
        kept = next((kept for kept in self._kept if kept.is_for(kind, params)), None)
        if kept is None:
            first, weights = params[0], [self.weight(param) for param in params]
            kept = _CachedEngine(self._new(weights, {}, kind[1], first.device, first.dtype), kind, params)
        else:
            self._kept.remove(kept)
        self._kept = [kept, *self._kept[: _MOST_ENGINES - 1]]
        return kept.engine

    def of_whole_matrices(self, params: Sequence[torch.Tensor]) -> StepEngine:
        """An engine that is not kept, whose :meth:`StepEngine.solve` gives each matrix, whole, to one rank."""
        first, weights = params[0], [self.weight(param) for param in params]
        return self._new(weights, {}, self._mode_of(STIEFEL, False), first.device, first.dtype, builds=False)

    def settle(self, steps: Mapping[str, int]) -> None:
        """Give the weights of all ranks the numbers of steps that have been measured, by the names of classes."""
        if self.sharing is not None and steps != self._settled:
            weights = [replace(weight, layout=weight.layout.settled(steps)) for weight in self.sharing.weights]
            self.sharing, self._shared, self._settled = replace(self.sharing, weights=weights), None, dict(steps)

    def in_step(
        self,
        own: Sequence[torch.Tensor],
        params: Sequence[torch.Tensor],
        directions: Sequence[str],
        *,
        in_blocks: bool = False,
    ) -> dict[tuple[str, torch.dtype], StepEngine]:
        """The engines of a step in its order, by the direction and dtype of their parameters.

        Args:
            own: all parameters of the optimizer.
            params: those of them that are in the step.
            directions: kinds of updates, in the order of the step.
            in_blocks: as of :meth:`of`.
        """
        engines: dict[tuple[str, torch.dtype], StepEngine] = {}
        shared = self.shared(own)
        if shared is not None and shared.shares:
            engines[MSIGN, shared.local_dtype] = shared
        for kind, some in grouped_by_engine(params, directions).items():
            if kind not in engines:
                engines[kind] = self.of(some, kind[0], in_blocks=in_blocks)
        return engines

    def digests(
        self, own: Sequence[torch.Tensor], directions: Sequence[str]
    ) -> dict[tuple[str, tuple[int, ...]], bytes]:
        """Digests of what the ranks of each group must plan alike for all weights, by the group's name and its ranks.

        Args:
            own: all parameters of the optimizer.
            directions: kinds of updates, in the order of the step.
        """
        planned, shared = [*self.in_step(own, own, directions).values()], self.shared(own)
        if shared is not None and shared not in planned:
            planned.append(shared)  # ranks must agree that they share nothing, too
        groups = {**self.groups, **({} if self.sharing is None else self.sharing.groups)}
        found: dict[tuple[str, tuple[int, ...]], bytes] = {}
        for engine in planned:
            for name in engine.groups:
                key = name, tuple(dist.get_process_group_ranks(groups[name]))
                found[key] = found.get(key, b"") + engine.digest(name)
        return found

    def shared(self, own: Sequence[torch.Tensor]) -> StepEngine | None:
        """The engine for the matrices of all ranks of the data-parallel groups; None if there are none.

        Its plan may be that each rank orthogonalizes its own; then plans without the others' weights are as good.

        Args:
            own: all parameters of the optimizer.
        """
        sharing = self.sharing
        if sharing is None:
            return None
        if self._shared is None:
            # Layer-wise optimizers update float32 weights: main copies, or the model's own.
            mode, weights = self.config.tp_mode, list(sharing.weights)
            for number, param in zip(sharing.numbers, own, strict=True):
                if number >= 0:  # buckets are numbered later than weights are shared out
                    weights[number] = replace(weights[number], bucket=getattr(param, BUCKET_ATTRIBUTE, 0))
            self._shared = self._new(weights, sharing.groups, mode, sharing.device, torch.float32)
        return self._shared

    def _mode_of(self, direction: str, in_blocks: bool) -> str:
        """The mode of tensor parallelism: balls exchange nothing but sums, the manifold needs whole matrices."""
        if direction == MSIGN or self.config.tp_mode == BLOCKWISE:
            return BLOCKWISE if in_blocks else self.config.tp_mode
        return OWNER if direction == STIEFEL else DUPLICATED

    def _new(
        self,
        weights: Sequence[Weight],
        groups: Mapping[str, dist.ProcessGroup],
        mode: str,
        device: torch.device,
        dtype: torch.dtype,
        *,
        builds: bool = True,
    ) -> StepEngine:
        config = self.config
        if self.slow_bfloat16 is None:
            self.slow_bfloat16 = bool(self.slowness(weights, device))
        precision = self.precision(dtype)
        key = device.type, precision.iteration
        if key not in self.products:
            alone = not dist.is_initialized() or dist.get_world_size() == 1
            self.products[key] = next(iter(self.offers(weights, device, precision.iteration, alone).values()))[0]
        engine = StepEngine(
            weights,
            {**self.groups, **groups},
            self._orthogonalizer(precision.iteration, self.products[key]),
            mode=mode,
            dtype=precision.own,
            wire_dtype=precision.wire,
            chunk_mb=config.chunk_mb,
            device=device,
        )
        if builds and all(weight.layout.direction == MSIGN for weight in weights):
            with matmul_precision(config.fp32_matmul_prec):
                engine.build()
        updates = (precision.iteration, engine.wire.back, precision.own)
        slots, shapes = (precision.own, precision.wire), [weight.shape for weight in weights]
        notes = (
            elementwise.prepare(device, dtype, slots, updates, shapes),
            codecs.prepare(device, (config.master, config.momentum_dtype)),
        )
        self.elementwise_note = "; ".join(filter(None, notes))
        return engine

    def _orthogonalizer(self, dtype: torch.dtype, products: TorchProducts) -> Orthogonalizer:
        its, config = self.config.iteration, self.config
        how = {"damped": self._damped, "tf32": config.fp32_matmul_prec == "high"}
        return Orthogonalizer(its(), dtype, config.eps, products, budgeted=its, **how)

    def precision(self, dtype: torch.dtype) -> Precision:
        """The dtypes of steps of weights of a dtype."""
        return precision_of(self.config, dtype, slow_bfloat16=bool(self.slow_bfloat16))

    def slowness(self, weights: Sequence[Weight], device: torch.device) -> str:
        """What is slow about bfloat16 on a device, where the options leave it to the device; empty elsewhere.

        Measured on what most of the time goes to, once; see :func:`slow_bfloat16`.
        """
        if not leaves_bfloat16(self.config):
            return ""
        trial = trial_of(weights, functools.partial(self._orthogonalizer, torch.bfloat16), device)
        return "" if trial is None else slow_bfloat16(device, *trial.shape[1:])

    def settle_bfloat16(self, is_slow: bool) -> None:
        """Take what all ranks have agreed on; engines that were planned for something else go."""
        if self.slow_bfloat16 not in (None, is_slow):
            self._kept, self._shared = [], None
        self.slow_bfloat16 = is_slow

    def offers(self, weights: Sequence[Weight], device: torch.device, dtype: torch.dtype, timed: bool) -> Offers:
        """The kernels that could multiply.

        Args:
            weights: the weights of the run.
            device: where they are.
            dtype: of the iteration.
            timed: whether they are timed, so that the fastest comes first; otherwise the one made for the device does.
                Time differs from rank to rank: copies of weights drift apart unless all ranks take the same choice.
        """
        trial = trial_of(weights, functools.partial(self._orthogonalizer, dtype), device) if timed else None
        with matmul_precision(self.config.fp32_matmul_prec):
            found = candidates(self.config.ns_backend, device, dtype, trial)
        usable = [(each, each.products) for each in found if each.products is not None]
        return {each.backend: (made, each.seconds, report(each, found, device, dtype, trial)) for each, made in usable}


def trial_of(
    weights: Sequence[Weight], made: Callable[[TorchProducts], Orthogonalizer], device: torch.device
) -> Trial | None:
    """What kernels are timed with: as many matrices as are iterated together, of what costs most in all.

    Args:
        weights: the weights of the run.
        made: gives the iteration by some kernels.
        device: where the weights are.
    """
    counts: Counter[tuple[int, int, Budget | None]] = Counter()
    for weight in weights:
        for block in weight.layout.blocks(weight.whole_shape):
            if block.rule == ORTHOGONALIZE and block.numel:
                p, q = sorted((block.rows, block.columns))
                counts[p, q, weight.layout.budget] += block.count
    if not counts:
        return None
    usual = made(TorchProducts())
    p, q, budget = max(counts, key=lambda its: (counts[its] * usual.of(its[2]).flops(*its[:2]), its[:2]))
    each = usual.batch_bytes[device.type] // (p * q * usual.dtype.itemsize)
    return Trial((max(1, min(counts[p, q, budget], each)), p, q), lambda products, x: made(products).of(budget)(x))
