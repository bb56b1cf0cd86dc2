"""Where a run of Adam with the distributed optimizer keeps each weight's state: in flat buckets, at its own layout.

By default Megatron-Core saves these buckets as they are. Which elements are which weight's follows from the order and
sizes of the weights and from the sizes of the buckets, so that another optimizer at the same tensor and pipeline
parallel sizes can read them, whatever they come from (``--ddp-bucket-size``, ``--ddp-num-buckets``, a framework's own).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from megatron_muon.checkpoint.param_state import Bucket
from megatron_muon.checkpoint.stored import Stored
from megatron_muon.routing.predicate import is_expert_parallel


def buckets_of_adam(chunks: Sequence[torch.nn.Module], stored: Stored, groups: Any) -> dict[torch.nn.Parameter, Bucket]:
    """The place of every weight in the buckets of a checkpoint.

    Returns:
        empty if the buckets are not those that Adam has at this layout.
    """
    if not stored.buckets or not _same_layout(stored.common.get("args"), groups):
        return {}
    for size in _bucket_sizes(stored, {groups.mp.rank(), (groups.tp_ep_pp or groups.mp).rank()}):
        found = dict(_places(chunks, groups, None if groups.pp.rank() > 0 else size))
        if found and all(stored.bucket_key(bucket, "exp_avg") for bucket in set(found.values())):
            return found
    return {}


def _same_layout(args: Any, groups: Any) -> bool:
    sizes = {"tensor_model_parallel_size": groups.tp.size(), "pipeline_model_parallel_size": groups.pp.size()}
    return all(getattr(args, name, size) == size for name, size in sizes.items())


def _bucket_sizes(stored: Stored, domains: set[int]) -> list[int | None]:
    """What the bucket size may have been: one bucket for all, or the smallest bucket that was closed by it.

    A bucket is closed as soon as it has that many elements. So each has fewer without its last weight, and the smallest
    closed one gives the same buckets as the size that was asked for. What is left over at the end, and embeddings that
    are shared, may be smaller.
    """
    found = {size for size, bucket in stored.bucket_keys if bucket.domain in domains}
    return [None, *sorted(found)]


def _places(
    chunks: Sequence[torch.nn.Module], groups: Any, bucket_size: int | None
) -> Iterator[tuple[torch.nn.Parameter, Bucket]]:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    unpadded = SimpleNamespace(pad_buckets_for_high_nccl_busbw=False)
    for experts, domain in ((False, groups.mp.rank()), (True, (groups.tp_ep_pp or groups.mp).rank())):
        buffer = 0
        for number, chunk in enumerate(chunks):
            by_dtype: dict[torch.dtype, list[torch.nn.Parameter]] = {}
            for param in chunk.parameters():
                if param.requires_grad and is_expert_parallel(param) == experts:
                    by_dtype.setdefault(param.dtype, []).append(param)
            for params in by_dtype.values():
                size = bucket_size if number == 0 else None
                layout = DistributedOptimizer._compute_per_buffer_param_layout(params, size, 1, unpadded)
                for param, (start, _, bucket) in layout.param_index_map.items():
                    first, length = layout.bucket_indices[bucket][0], layout.per_bucket_numel_unpadded[bucket]
                    yield param, Bucket(domain, buffer, bucket, start - first, length)
                buffer += 1
