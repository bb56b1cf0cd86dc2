"""``--layer-wise-param-layout decoupled``: buckets of a layer-wise run without padding between owners.

Megatron-Core cuts a bucket into shards of one length, and a weight lies whole in the shard of its owner. So every shard
is as long as the largest weight at least, and what an owner does not fill is memory of every rank, of weights and of
gradients. Here the part of an owner is as long as its weights: buckets, owners and the order of weights stay, the gaps
between them go. What is left comes of alignment: a weight starts at a multiple of 64 elements, and a bucket ends at one
that its data-parallel ranks divide.

Gradients are then reduced, and weights gathered, in parts of unequal length: with NCCL these are a reduction to each
owner and a broadcast from each, grouped into one launch, straight in the buffers. All else is Megatron-Core's: when
buckets travel, scaling, checks for NaN, what waits for what.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon._patching import Original, Patches
from megatron_muon.choices import DECOUPLED, PADDED
from megatron_muon.config import flag
from megatron_muon.errors import ConfigError

PATCHES = Patches()

_GROUP = "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBucketGroup"
_OWNERS = "owners"
"""Attribute of a ``PerBufferParamLayout`` without padding: weight -> rank of its data-parallel group."""


def remove_padding(layout: Any) -> None:
    """Close the gaps between the weights of a ``PerBufferParamLayout`` whose shards have one length, in place."""
    from megatron.core.optimizer.param_layout import pad_param_start, pad_to_divisor

    ranks, end, owners = layout.num_optimizer_shards, 0, {}
    divisor = math.lcm(pad_param_start(1), ranks)
    in_bucket: list[list[torch.Tensor]] = [[] for _ in layout.bucket_indices]
    for param, (start, _, bucket) in sorted(layout.param_index_map.items(), key=lambda item: item[1][0]):
        first, last = layout.bucket_indices[bucket]
        owners[param] = (start - first) * ranks // (last - first)
        in_bucket[bucket].append(param)
    for bucket, params in enumerate(in_bucket):
        first = end
        for param in params:
            start = pad_param_start(end)
            end = start + param.numel()
            layout.param_index_map[param] = (start, end, bucket)
        end = pad_to_divisor(end, divisor)
        layout.bucket_indices[bucket] = (first, end)
    setattr(layout, _OWNERS, owners)


def owners_of(layout: Any) -> dict[torch.Tensor, int] | None:
    """The owner of each weight in a ``PerBufferParamLayout``; None if its shards have one length."""
    owners: dict[torch.Tensor, int] | None = getattr(layout, _OWNERS, None)
    return owners


def padding(layout: Any) -> int:
    """Elements of a buffer in which no weight lies."""
    return int(layout.bucket_indices[-1][1] - sum(layout.per_bucket_numel_unpadded)) if layout.bucket_indices else 0


def check_layout(chunk: Any, asked: str) -> None:
    """The buffers of Muon's weights must be what the model's options say, or memory would not be what was asked for.

    Args:
        chunk: under ``DistributedDataParallel``.
        asked: ``padded`` or ``decoupled``.

    Raises:
        ConfigError: with what to do.
    """
    full = getattr(chunk, "full_param_layout", None)
    layouts = [] if full is None else full.layouts.items()
    made = {owners_of(layout) is not None for key, layout in layouts if key.is_managed_by_layer_wise_optimizer}
    wanted = asked == DECOUPLED
    if made == {wanted} or (not made and not (wanted and full is None)):
        return
    how = f"by {flag('layer_wise_param_layout')} {PADDED if wanted else DECOUPLED}" if made else "without such a layout"
    raise ConfigError(
        f"{flag('layer_wise_param_layout')} {asked}: DistributedDataParallel was built {how}. Give the flag, or call "
        f"megatron_muon.install(MuonConfig(layer_wise_param_layout={asked!r})), before the model is wrapped with "
        "megatron.training.training.wrap_model_chunks_with_ddp(use_layer_wise_distributed_optimizer=True)."
    )


def with_named_owners(full: Any) -> Any:
    """The same ``FullParamLayout`` where padded; without padding, buffers of one element for each owner, at which all
    its weights are: Megatron-Core divides a weight's place by the length of a shard to find the owner."""
    from megatron.core.optimizer.param_layout import FullParamLayout, PerBufferParamLayout

    def by_owner(layout: Any) -> Any:
        if (owners := owners_of(layout)) is None:
            return layout
        ranks = layout.num_optimizer_shards
        places = {param: (owner, owner + 1, 0) for param, owner in owners.items()}
        return PerBufferParamLayout(places, [(0, ranks)], [ranks], num_optimizer_shards=ranks)

    return FullParamLayout({key: by_owner(layout) for key, layout in full.layouts.items()})


@PATCHES.around(
    "megatron.core.distributed.distributed_data_parallel:DistributedDataParallel.__init__",
    "a bucket without padding is cut where owners change, and not into shards of one length",
)
def _with_parts_of_owners(original: Original, self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    layouts = () if self.full_param_layout is None else self.full_param_layout.layouts.values()
    owners = {param: owner for layout in layouts for param, owner in (owners_of(layout) or {}).items()}
    for group in (*self.bucket_groups, *self.expert_parallel_bucket_groups):
        for number, bucket in enumerate(group.buckets):
            if bucket.params_list[0] not in owners:
                continue
            sizes = _sizes(bucket, owners, group.intra_distributed_optimizer_instance_size)
            if len(set(sizes)) > 1:
                # Megatron-Core cuts a bucket once, and keeps the list; what is there it takes as it is.
                group.has_uneven_parts = True
                group.cached_grad_buffer_shard_list[number] = bucket.grad_data.split(sizes)
                group.cached_param_buffer_shard_list[number] = bucket.param_data.split(sizes)


def _sizes(bucket: Any, owners: dict[torch.Tensor, int], ranks: int) -> list[int]:
    """The lengths of the owners' parts of a bucket, in the order of ranks. They leave nothing out."""
    starts: list[list[int]] = [[] for _ in range(ranks)]
    for param, (start, _) in bucket.param_to_index.items():
        starts[owners[param]].append(start)
    sizes, end = [0] * ranks, bucket.grad_data.numel()
    for rank in reversed(range(ranks)):
        if starts[rank]:
            sizes[rank] = end - min(starts[rank])
            end = min(starts[rank])
    return sizes


@PATCHES.around(
    f"{_GROUP}.start_grad_sync",
    "in a bucket without padding each rank gets the gradients of its own weights, as many as these are",
)
def _with_uneven_reduce_scatter(original: Original, self: Any, *args: Any, **kwargs: Any) -> None:
    with _collectives_of(self) as exchanges:
        original(self, *args, **kwargs)
    self.grad_reduce_handle = _started(self.grad_reduce_handle, exchanges)


@PATCHES.around(
    f"{_GROUP}.start_param_sync",
    "in a bucket without padding each rank sends its own weights, as many as these are",
)
def _with_uneven_all_gather(original: Original, self: Any, *args: Any, **kwargs: Any) -> None:
    with _collectives_of(self) as exchanges:
        original(self, *args, **kwargs)
    self.param_gather_handle = _started(self.param_gather_handle, exchanges)


def _started(handle: Any, exchanges: Sequence[Callable[[], Any]]) -> Any:
    """Start exchanges; the handle of all, which Megatron-Core has made for its own, or None where it has waited."""
    works = [start() for start in exchanges]
    return handle if handle is None or not works else _Works([handle, *works])


class _Works:
    """Handle of several exchanges."""

    def __init__(self, works: Sequence[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


@contextlib.contextmanager
def _collectives_of(group: Any) -> Iterator[list[Callable[[], Any]]]:
    """Within, Megatron-Core leaves out the exchange of buckets that were cut into parts of unequal length.

    It takes its collectives from two names of its module, and sets one of them anew for float32 accumulation.

    Yields:
        what starts the exchanges that were left out: outside of the context in which Megatron-Core puts those of a
        group together, as torch cannot put lists together.
    """
    left_out: list[Callable[[], Any]] = []
    if not getattr(group, "has_uneven_parts", False):
        yield left_out
        return
    from megatron.core.distributed import param_and_grad_buffer as module

    reduce_scatter, all_gather = module.dist_reduce_scatter_func, module.dist_all_gather_func
    together = module._coalescing_manager

    def uneven_reduce_scatter(mine: torch.Tensor, bucket: torch.Tensor, **how: Any) -> Any:
        if (parts := _parts_with(mine, reduced)) is None:
            return reduce_scatter(mine, bucket, **how)
        if accumulates:
            return _reduce_in_float32(mine, bucket, [part.numel() for part in parts], **how)
        return left_out.append(functools.partial(dist.reduce_scatter, mine, parts, **how))

    def uneven_all_gather(bucket: torch.Tensor, mine: torch.Tensor, **how: Any) -> Any:
        if (parts := _parts_with(mine, gathered)) is None:
            return all_gather(bucket, mine, **how)
        return left_out.append(functools.partial(dist.all_gather, parts, mine, **how))

    reduced, gathered = group.cached_grad_buffer_shard_list, group.cached_param_buffer_shard_list
    accumulates = group.ddp_config.reduce_scatter_with_fp32_accumulation
    module.dist_reduce_scatter_func, module.dist_all_gather_func = uneven_reduce_scatter, uneven_all_gather
    if all(parts is not None and len({part.numel() for part in parts}) > 1 for parts in gathered):
        # Nothing is left to put together, at which older versions of torch fail.
        module._coalescing_manager = lambda *args, **how: contextlib.nullcontext(_Works([]))
    try:
        yield left_out
    finally:
        module.dist_reduce_scatter_func, module.dist_all_gather_func = reduce_scatter, all_gather
        module._coalescing_manager = together


def _parts_with(mine: torch.Tensor, cut: Sequence[Sequence[torch.Tensor] | None]) -> list[torch.Tensor] | None:
    """The parts of the bucket of which this is one; None if its shards have one length."""
    for parts in cut:
        if parts is not None and any(part is mine for part in parts):
            return list(parts) if any(part.numel() != mine.numel() for part in parts) else None
    return None


def _reduce_in_float32(
    mine: torch.Tensor, bucket: torch.Tensor, sizes: list[int], *, op: Any, group: Any, async_op: bool
) -> Any:
    """As Megatron-Core's ``reduce_scatter_with_fp32_accumulation``: summed by the owner, in the order of ranks."""
    from megatron.core.distributed.reduce_scatter_with_fp32_accumulation import (
        _ReduceScatterWithFP32AccumulationWorkHandle,
    )

    assert op == dist.ReduceOp.SUM, "another is refused with this"
    ranks = len(sizes)
    received = bucket.new_empty(ranks * mine.numel())
    work = dist.all_to_all_single(received, bucket, [mine.numel()] * ranks, sizes, group=group, async_op=async_op)
    if not mine.numel():
        return work
    handle = _ReduceScatterWithFP32AccumulationWorkHandle(work, received, mine, ranks)
    if async_op:
        return handle
    handle.wait()
    return None
