"""The step engines of one optimizer: one for each direction and set of weights, planned when it is first asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon.config import MuonConfig
from megatron_muon.engine.modes import BLOCKWISE, DUPLICATED, OWNER
from megatron_muon.engine.plan import Weight
from megatron_muon.engine.shards import Shard, shard_of
from megatron_muon.engine.step import StepEngine
from megatron_muon.optimizers.precision import matmul_precision, precision_of
from megatron_muon.orthogonalize.backends import choose_products
from megatron_muon.orthogonalize.coefficients import coefficients, parse_triple
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer
from megatron_muon.routing.layout import MSIGN, STIEFEL, layout_of

__all__ = ["BUCKET_ATTRIBUTE", "DENSE", "EXPERT", "Engines"]

BUCKET_ATTRIBUTE = "muon_bucket"
"""Of parameters: :attr:`megatron_muon.engine.plan.Weight.bucket`."""

DENSE, EXPERT = "tensor-parallel", "expert tensor-parallel"
"""Names of the groups that divide weights."""

_MOST = 8
"""So many are kept."""


class Engines:
    """Makes engines and keeps them: parameters with gradients may alternate between steps.

    Attributes:
        products_note: which kernels multiply and why, once there is an engine.
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
        triples = tuple(map(parse_triple, config.custom_coefficients))
        self._coefficients = coefficients(config.coefficient_type, config.num_ns_steps, triples)
        self._engines: dict[Any, StepEngine] = {}
        self.products_note = ""

    def __iter__(self) -> Iterator[StepEngine]:
        return iter(self._engines.values())

    def shard(self, param: torch.Tensor) -> Shard | None:
        """The shard that a parameter is, see :func:`megatron_muon.engine.shards.shard_of`."""
        return shard_of(param, self._tp_group, self._expert_tp_group)

    def weight(self, param: torch.Tensor) -> Weight:
        """What the engine must know of a parameter."""
        shard, layout, bucket = self.shard(param), layout_of(param), getattr(param, BUCKET_ATTRIBUTE, 0)
        if shard is None:
            return Weight(tuple(param.shape), layout, bucket=bucket)
        name = EXPERT if getattr(param, "expert_tp", False) else DENSE
        return Weight(tuple(param.shape), layout, shard.dim, name, shard.size, bucket)

    def of(self, params: Sequence[torch.Tensor], direction: str = MSIGN) -> StepEngine:
        """The engine for these parameters, in this order, all of one direction."""
        # Shapes and device, too: memory is replaced, and an id is used again.
        key = direction, params[0].device, tuple((id(param), param.shape) for param in params)
        if key not in self._engines:
            if len(self._engines) >= _MOST:
                del self._engines[next(iter(self._engines))]
            self._engines[key] = self._new(params, self._mode_of(direction))
        return self._engines[key]

    def _mode_of(self, direction: str) -> str:
        """Of tensor parallelism: for balls nothing but sums is exchanged, the manifold wants whole matrices."""
        if direction == MSIGN or self.config.tp_mode == BLOCKWISE:
            return self.config.tp_mode
        return OWNER if direction == STIEFEL else DUPLICATED

    def _new(self, params: Sequence[torch.Tensor], mode: str) -> StepEngine:
        config, first = self.config, params[0]
        precision = precision_of(config, first.dtype)
        with matmul_precision(config.fp32_matmul_prec):
            products, self.products_note = choose_products(config.ns_backend, first.device, precision.iteration)
        groups = {DENSE: self._tp_group, EXPERT: self._expert_tp_group}
        return StepEngine(
            [self.weight(param) for param in params],
            {name: group for name, group in groups.items() if group is not None},
            Orthogonalizer(self._coefficients, precision.iteration, config.eps, products, damped=self._damped),
            mode=mode,
            dtype=precision.own,
            wire_dtype=precision.wire,
            chunk_mb=config.chunk_mb,
            device=first.device,
        )
