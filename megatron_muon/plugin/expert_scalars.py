"""Expert-parallel weights of the scalar optimizer (biases of experts, experts under a rule) in the parameter layout.

Megatron-Core's distributed optimizer, which has all other weights of Adam there, cannot take them: it knows one
data-parallel group. They lie whole in the layer-wise buffer of the experts, each at one owner, and Adam updates them as
a part of the layer-wise optimizer, as without the layout.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch

from megatron_muon._patching import Original, Patches
from megatron_muon.plugin.within import within
from megatron_muon.routing.predicate import is_expert_parallel

PATCHES = Patches()

_REASON = "Adam's weights among experts have no distributed optimizer; Megatron-Core's factory refuses them"

_apart: ContextVar[list[dict[str, Any]] | None] = ContextVar("megatron_muon_expert_scalars", default=None)
"""Param groups that the layer-wise optimizer which is being built will have; None outside of that."""


def set_apart() -> AbstractContextManager[None]:
    """Within, the layer-wise optimizer gets them; the model is laid out for it."""
    return within(_apart, [])


def sum_once(model_chunks: Sequence[torch.nn.Module], expert_tensor: Any) -> None:
    """Keep gradients of experts that are whole on each tensor-parallel rank from being summed over these ranks.

    Biases carry ``sequence_parallel`` as dense ones do, and Megatron-Core would add the gradients of tensor-parallel
    ranks after those of the experts' data-parallel group, in which these ranks are: whole sums, or, where they were
    reduce-scattered, what lies beside them.
    """
    if expert_tensor is None or expert_tensor.size() > 1:
        return
    for param in (param for chunk in model_chunks for param in chunk.parameters()):
        if is_expert_parallel(param) and getattr(param, "sequence_parallel", False):
            param.sequence_parallel = False  # type: ignore[attr-defined]


@PATCHES.around("megatron.core.optimizer:_get_param_groups", _REASON)
def _without_experts(
    original: Original, model_chunks: list[Any], config: Any, *args: Any, **kwargs: Any
) -> list[dict[str, Any]]:
    groups, apart = original(model_chunks, config, *args, **kwargs), _apart.get()
    if apart is None:
        return groups
    name = config.optimizer.removeprefix("dist_")
    others: list[dict[str, Any]] = []
    for group in groups:
        scalar = group.get("optimizer", name) != name
        (apart if scalar and group["is_expert_parallel"] else others).append(group)
    return others


@PATCHES.around("megatron.core.optimizer.layer_wise_optimizer:LayerWiseDistributedOptimizer.__init__", _REASON)
def _with_experts(
    original: Original,
    self: Any,
    optimizers: list[Any],
    config: Any,
    pg_collection: Any = None,
    init_state_fn_list: list[Any] | None = None,
    model_chunks: list[Any] | None = None,
) -> None:
    if groups := _apart.get():
        from megatron.core.optimizer import _get_megatron_optimizer_based_on_param_groups

        inner = copy.copy(config)
        inner.optimizer, inner.use_distributed_optimizer = groups[0]["optimizer"], False
        optimizer, init_state = _get_megatron_optimizer_based_on_param_groups(
            inner, model_chunks, groups, pg_collection=pg_collection, skip_megatron_wrapping=True
        )
        init_state_fn_list = [*(init_state_fn_list or [None] * len(optimizers)), init_state]
        optimizers = [*optimizers, optimizer]
    original(self, optimizers, config, pg_collection, init_state_fn_list, model_chunks)
