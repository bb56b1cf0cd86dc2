"""The optimizer state of each weight, found in the optimizers that Megatron-Core wraps around ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_muon.checkpoint.errors import CheckpointError
from megatron_muon.checkpoint.param_state import Bucket, ParamState, Slices
from megatron_muon.optimizers.sleeping import refuse_reading


def has_parts(optimizer: Any) -> bool:
    """Whether it is MIMO's, of several models: each has come through the factory with its own process groups."""
    return hasattr(optimizer, "module_infos")


def has_own_masters(leaf: Any) -> bool:
    """Whether the inner optimizer keeps the master weights, in its state and in a form of its own."""
    return bool(getattr(leaf.config, "use_precision_aware_optimizer", False))


def leaves(optimizer: Any, owned: bool = False) -> Iterator[tuple[Any, bool]]:
    """Each optimizer that is no chain of others, and whether each of its weights is on one data-parallel rank only."""
    owned = owned or type(optimizer).__name__ == "LayerWiseDistributedOptimizer"
    parts = getattr(optimizer, "chained_optimizers", None)
    if parts is None:
        if not getattr(optimizer, "is_stub_optimizer", False):
            yield optimizer, owned
        return
    for part in parts:
        yield from leaves(part, owned)


def param_states(optimizer: Any, *, create: bool = False, refuse: bool = True) -> list[ParamState]:
    """State of all weights that this rank has any of; ``create`` makes what does not exist yet, before the first step.

    For weights in slices, those of which the rank has no element are listed too: the ranks of a group gather them
    together.

    Raises:
        CheckpointError: see ``refuse``.
        ConfigError: likewise, if state is asleep in a file.
    """
    found: list[ParamState] = []
    for leaf, owned in leaves(optimizer):
        if refuse:
            refuse_reading(leaf.optimizer)
        if refuse and has_own_masters(leaf):
            raise CheckpointError(
                "--use-precision-aware-optimizer keeps master weights in a form that Muon's checkpoints do not have: "
                "leave it off for the first run from such a checkpoint, save, and turn it on then."
            )
        if type(leaf).__name__ == "DistributedOptimizer":
            if create and (missing := _without_state(leaf.optimizer)):
                leaf.load_state_dict(leaf.state_dict())
                for state in (leaf.optimizer.state[param] for param in missing):
                    # Megatron-Core makes it of memory as it is, for a checkpoint to fill: here it may be saved.
                    torch._foreach_zero_([value for value in state.values() if isinstance(value, torch.Tensor)])
            found += _in_slices(leaf)
        else:
            if create and leaf.init_state_fn is not None:
                leaf.init_state_fn(leaf.optimizer, leaf.config)
            found += _whole(leaf, owned)
    return found


def _without_state(inner: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [param for group in inner.param_groups for param in group["params"] if not inner.state.get(param)]


def _whole(leaf: Any, owned: bool) -> Iterator[ParamState]:
    inner = leaf.optimizer
    if not hasattr(leaf, "float16_groups"):
        for group in inner.param_groups:
            for param in group["params"]:
                yield ParamState(param, inner, group, param, None, owned=owned)
        return
    lists = zip(
        inner.param_groups, leaf.float16_groups, leaf.fp32_from_float16_groups, leaf.fp32_from_fp32_groups, strict=True
    )
    for group, params, masters, own in lists:
        for param, master in zip(params, masters, strict=True):
            copy = None if master is param else master  # its master is kept as a remainder
            yield ParamState(param, inner, group, master, copy, owned=owned)
        for param in own:
            yield ParamState(param, inner, group, param, None, owned=owned)


def _in_slices(leaf: Any) -> Iterator[ParamState]:
    for index, buffer in enumerate(leaf.buffers):
        group = buffer.data_parallel_group
        for param, (start, stop, bucket_number) in buffer.param_index_map.items():
            if not param.requires_grad:
                continue
            bucket = buffer.buckets[bucket_number]
            place = Bucket(
                leaf.data_parallel_group_idx, index, bucket_number, start - bucket.offset, bucket.numel_unpadded
            )
            slices = Slices(group, _spans(start, stop, bucket.offset, bucket.grad_data.numel(), group.size()))
            where = leaf.model_param_group_index_map.get(param)
            if where is None:
                yield ParamState(param, leaf.optimizer, {}, None, None, slices, bucket=place)
                continue
            members = leaf.optimizer.param_groups[where[0]]
            main = members["params"][where[1]]
            own = param.dtype == torch.float32
            yield ParamState(param, leaf.optimizer, members, main, None if own else main, slices, bucket=place)


def _spans(start: int, stop: int, offset: int, length: int, ranks: int) -> tuple[tuple[int, int], ...]:
    """The elements of a parameter at [start, stop) of a buffer that each rank's shard of the bucket covers."""
    size = length // ranks
    cuts = [(offset + rank * size, offset + (rank + 1) * size) for rank in range(ranks)]
    found = []
    for low, high in cuts:
        first, last = max(start, low), min(stop, high)
        found.append((first - start, last - start) if last > first else (0, 0))
    return tuple(found)
