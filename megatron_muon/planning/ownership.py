"""Which data-parallel rank holds the optimizer state of which weight, and what buffers hold beside weights.

Megatron-Core's own assignment, through the hooks of a run (:mod:`megatron_muon.plugin.layer_wise`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from megatron_muon.planning.flags import Layout
from megatron_muon.planning.model import Stage
from megatron_muon.plugin.arguments import from_arguments
from megatron_muon.plugin.layer_wise import balanced_together, keeps_upstream_lists, share_lists
from megatron_muon.plugin.uneven_buckets import owners_of, padding
from megatron_muon.routing.predicate import _is_nonlinear_or_embedding, is_expert_parallel

Owners = tuple[tuple[int, int], ...]
"""(rank in the weight's data-parallel group, elements of state that it holds), for each rank that holds some."""


@dataclass(frozen=True)
class Shares:
    """How data-parallel ranks share out the weights of a pipeline stage.

    Attributes:
        owners: of each weight; empty if every rank holds all state.
        padding: bytes of each rank's buffers of weights and gradients that belong to no weight.
        between_owners: how many elements of it, of either, a rank's buffers of Muon's weights have.
    """

    owners: dict[torch.Tensor, Owners]
    padding: int = 0
    between_owners: int = 0


def shares_of_stage(stage: Stage, args: argparse.Namespace, layout: Layout) -> Shares:
    """Those of a layer-wise run; of another, every rank holds all state, and nothing is padded."""
    if not args.use_layer_wise_distributed_optimizer:
        return Shares({})
    is_shared = max(layout.data, layout.expert_data) > 1
    if not args.use_layer_wise_param_layout:
        return Shares(_by_lists(stage.chunks, args, layout) if is_shared else {})
    with balanced_together(len(stage.chunks)):
        layouts = [
            _buffers(chunk, _bucket_size(stage, number, args, layout), args, layout)
            for number, chunk in enumerate(stage.chunks)
        ]
    owners: dict[torch.Tensor, Owners] = {}
    for buffers in layouts if is_shared else ():
        owners.update(_owners_in(buffers))
    found = [each for buffers in layouts for each in buffers.layouts.items()]
    between_owners = sum(padding(buffer) for key, buffer in found if key.is_managed_by_layer_wise_optimizer)
    in_bytes = sum(padding(buffer) * (key.param_dtype.itemsize + key.grad_dtype.itemsize) for key, buffer in found)
    return Shares(owners, in_bytes, between_owners)


def _bucket_size(stage: Stage, chunk: int, args: argparse.Namespace, layout: Layout) -> int | None:
    """As ``megatron.training`` chooses it: buckets only in the first chunk of the first stage."""
    from megatron.training.training import get_megatron_ddp_config, resolve_ddp_bucket_size

    if stage.number > 0 or chunk > 0 or args.overlap_param_gather_with_optimizer_step:
        return None
    ddp_config = get_megatron_ddp_config(args)
    elements = sum(param.numel() for chunk in stage.chunks for param in chunk.parameters())
    group = SimpleNamespace(size=lambda: layout.data)
    return resolve_ddp_bucket_size(ddp_config, group, ddp_config.overlap_grad_reduce, elements)


def _buffers(chunk: torch.nn.Module, bucket_size: int | None, args: argparse.Namespace, layout: Layout) -> Any:
    """Megatron's ``FullParamLayout``: where in which buffer each weight of the chunk lies."""
    from megatron.core.optimizer.layer_wise_optimizer import (
        LayerWiseDistributedOptimizer,
        tag_params_for_buffer_routing,
    )
    from megatron.training.training import get_megatron_ddp_config

    tag_params_for_buffer_routing([chunk])
    return LayerWiseDistributedOptimizer.compute_full_param_layout(
        [param for param in chunk.parameters() if param.requires_grad],
        bucket_size,
        layout.data,
        get_megatron_ddp_config(args),
        expert_data_parallel_world_size=layout.expert_data,
    )


def _owners_in(buffers: Any) -> dict[torch.Tensor, Owners]:
    """Muon's weights have one owner each; those of the scalar optimizer are cut with their buffer."""
    owners: dict[torch.Tensor, Owners] = {}
    for buffer in buffers.layouts.values():
        if (owner := owners_of(buffer)) is not None:
            owners.update((param, ((rank, param.numel()),)) for param, rank in owner.items())
            continue
        for param, (start, end, bucket) in buffer.param_index_map.items():
            first, last = buffer.bucket_indices[bucket]
            shard = (last - first) // buffer.num_optimizer_shards
            owners[param] = _pieces(start - first, end - first, shard)
    return owners


def _pieces(start: int, end: int, shard: int) -> Owners:
    """How shards of equal size divide the elements from ``start`` to ``end``."""
    return tuple(
        (rank, min(end, (rank + 1) * shard) - max(start, rank * shard))
        for rank in range(start // shard, -(-end // shard))
    )


def _by_lists(
    chunks: Sequence[torch.nn.Module], args: argparse.Namespace, layout: Layout
) -> dict[torch.Tensor, Owners]:
    """The older assignment (``--no-use-layer-wise-param-layout``): whole weights, Adam's too."""
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    # Its method reads the groups for the rank in them, and leaves the lists of all ranks.
    muon = None if keeps_upstream_lists(args) else from_arguments(args)
    optimizer = SimpleNamespace(dp_cp=None, expt_dp=None, pg_collection=None, options_of_cost=muon)
    groups = SimpleNamespace(param_groups=list(_param_groups(chunks)))
    share = LayerWiseDistributedOptimizer._shard_params_ping_pong
    share_lists(optimizer, [groups], lambda: share(optimizer, [groups], layout.data, layout.expert_data))
    owners: dict[torch.Tensor, Owners] = {}
    for lists in (optimizer.dp_cp_params_list, optimizer.expt_dp_params_list or []):
        for rank, params in enumerate(lists):
            owners.update((param, ((rank, param.numel()),)) for param in params)
    return owners


def _param_groups(chunks: Sequence[torch.nn.Module]) -> Iterable[dict[str, Any]]:
    """Muon's weights and the others, each without and with experts."""
    params = [param for chunk in chunks for param in chunk.parameters() if param.requires_grad]
    for scalar in (False, True):
        for expert in (False, True):
            mine = [
                param
                for param in params
                if _is_nonlinear_or_embedding(param) is scalar and is_expert_parallel(param) is expert
            ]
            yield {"params": mine, "is_expert_parallel": expert}
