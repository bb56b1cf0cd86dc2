"""The state of each weight, found in the optimizers that Megatron-Core wraps around ours.

A weight's state is whole on a rank (plain and layer-wise), or a slice of the flattened weight (the distributed
optimizer, which has Adam's weights in a layer-wise run). This is the only file of the room that knows these classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon.checkpoint.errors import CheckpointError

__all__ = ["Bucket", "Held", "Slices", "held_by", "leaves"]

STEP = "step"


@dataclass(frozen=True)
class Slices:
    """How a flattened weight lies on the ranks of a data-parallel group.

    Attributes:
        group: the ranks.
        spans: [start, stop) of each rank's elements; empty ones have start == stop.
    """

    group: dist.ProcessGroup
    spans: tuple[tuple[int, int], ...]

    @property
    def rank(self) -> int:
        """This rank in ``group``."""
        return self.group.rank()

    @property
    def mine(self) -> tuple[int, int]:
        """This rank's elements."""
        return self.spans[self.rank]

    @property
    def holders(self) -> list[int]:
        """Ranks in ``group`` that have a part."""
        return [rank for rank, (start, stop) in enumerate(self.spans) if stop > start]

    @property
    def owner(self) -> int:
        """The rank that has most of it, the first of several: it saves the weight."""
        return max(self.holders, key=lambda rank: (self.spans[rank][1] - self.spans[rank][0], -rank))


@dataclass(frozen=True)
class Bucket:
    """Where a flattened weight lies in the distributed optimizer's buffers.

    Attributes:
        domain: number of the model-parallel domain.
        buffer: number of the buffer.
        number: of the bucket in it.
        start: first element in the bucket.
        size: elements of the bucket without its padding at the end.
    """

    domain: int
    buffer: int
    number: int
    start: int
    size: int


@dataclass(frozen=True)
class Held:
    """The optimizer state of one weight on this rank.

    Attributes:
        param: the model's parameter.
        inner: the torch optimizer that updates it.
        group: its param group in ``inner``.
        key: what ``inner.state`` knows it by; None for a weight of which this rank has no slice.
        master: the float32 copy (or its slice); None if the weight itself is what is updated.
        slices: None if the state is whole on this rank.
        owned: whether no other data-parallel rank has this state (layer-wise).
        bucket: where it lies in a buffer, if there are slices.
    """

    param: torch.nn.Parameter
    inner: torch.optim.Optimizer
    group: dict[str, Any]
    key: torch.Tensor | None
    master: torch.Tensor | None
    slices: Slices | None = None
    owned: bool = False
    bucket: Bucket | None = None

    @property
    def rule(self) -> str:
        """``muon``, ``adam``, ``lion``...: what the optimizer calls itself, or a name for its class."""
        name = type(self.inner).__name__
        return getattr(self.inner, "checkpoint_rule", "adam" if "Adam" in name else name.lower())

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """State by name, ``fp32_param`` for the master weight among it; of the slice's shape if there are slices."""
        if self.key is None:
            return {}
        found = {
            name: value
            for name, value in self.inner.state[self.key].items()
            if isinstance(value, torch.Tensor) and name != STEP
        }
        return found if self.master is None else {"fp32_param": self.master, **found}


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


def held_by(optimizer: Any, *, create: bool = False) -> list[Held]:
    """State of all weights that this rank has any of.

    For weights in slices, those of which the rank has no element are listed too: the ranks of a group gather them
    together.

    Args:
        optimizer: of Megatron-Core, a chain or not.
        create: make state that does not exist yet, as before the first step.

    Raises:
        CheckpointError: for optimizers that keep master weights in a form of their own.
    """
    found: list[Held] = []
    for leaf, owned in leaves(optimizer):
        if getattr(leaf.config, "use_precision_aware_optimizer", False):
            raise CheckpointError(
                "--use-precision-aware-optimizer keeps master weights in a form that Muon's checkpoints do not have: "
                "leave it off for the first run from such a checkpoint, save, and turn it on then."
            )
        if type(leaf).__name__ == "DistributedOptimizer":
            if create and _lacks_state(leaf.optimizer):
                leaf.load_state_dict(leaf.state_dict())
            found += _in_slices(leaf)
        else:
            if create and leaf.init_state_fn is not None:
                leaf.init_state_fn(leaf.optimizer, leaf.config)
            found += _whole(leaf, owned)
    return found


def _lacks_state(inner: torch.optim.Optimizer) -> bool:
    return any(not inner.state.get(param) for group in inner.param_groups for param in group["params"])


def _whole(leaf: Any, owned: bool) -> Iterator[Held]:
    inner = leaf.optimizer
    if not hasattr(leaf, "float16_groups"):
        for group in inner.param_groups:
            for param in group["params"]:
                yield Held(param, inner, group, param, None, owned=owned)
        return
    lists = zip(
        inner.param_groups,
        leaf.float16_groups,
        leaf.fp32_from_float16_groups,
        leaf.fp32_from_fp32_groups,
        strict=True,
    )
    for group, params, masters, own in lists:
        for param, master in zip(params, masters, strict=True):
            yield Held(param, inner, group, master, master, owned=owned)
        for param in own:
            yield Held(param, inner, group, param, None, owned=owned)


def _in_slices(leaf: Any) -> Iterator[Held]:
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
                yield Held(param, leaf.optimizer, {}, None, None, slices, bucket=place)
                continue
            members = leaf.optimizer.param_groups[where[0]]
            main = members["params"][where[1]]
            own = param.dtype == torch.float32
            yield Held(param, leaf.optimizer, members, main, None if own else main, slices, bucket=place)


def _spans(start: int, stop: int, offset: int, length: int, ranks: int) -> tuple[tuple[int, int], ...]:
    """The elements of a parameter at [start, stop) of a buffer that each rank's shard of the bucket covers."""
    size = length // ranks
    cuts = [(offset + rank * size, offset + (rank + 1) * size) for rank in range(ranks)]
    found = []
    for low, high in cuts:
        first, last = max(start, low), min(stop, high)
        found.append((first - start, last - start) if last > first else (0, 0))
    return tuple(found)
