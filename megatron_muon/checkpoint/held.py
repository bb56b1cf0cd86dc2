"""The state of each weight on a rank.

It is whole (plain and layer-wise), or a slice of the flattened weight (the distributed optimizer, which has Adam's
weights in a layer-wise run). :mod:`megatron_muon.plugin.optimizer_state` finds it in Megatron-Core's optimizers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon.optimizers.handled import STEP

__all__ = ["Bucket", "Held", "Slices"]


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
    def mine(self) -> tuple[int, int]:
        """This rank's elements."""
        return self.spans[self.group.rank()]


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
    def span(self) -> tuple[int, int] | None:
        """The elements of the flattened weight that this rank has, [start, stop); None if the state is whole."""
        return None if self.slices is None else self.slices.mine

    @property
    def rule(self) -> str:
        """``muon``, ``adam``, ``lion``...: what the optimizer calls itself, or a name for its class."""
        name = type(self.inner).__name__
        return getattr(self.inner, "checkpoint_rule", "adam" if "Adam" in name else name.lower())

    @property
    def numbers(self) -> dict[str, Any]:
        """Of its param group, and the optimizer's options."""
        return {**getattr(self.inner, "checkpoint_options", {}), **self.group}

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
