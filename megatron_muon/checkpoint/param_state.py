"""The state of each weight on a rank.

It is whole (plain and layer-wise), or a slice of the flattened weight (the distributed optimizer, which has Adam's
weights in a layer-wise run). :mod:`megatron_muon.plugin.optimizer_state` finds it in Megatron-Core's optimizers.

Checkpoints have one form of it, in whatever form (:mod:`megatron_muon.optimizers.storage`) the optimizer keeps it: the
numbers that are kept, master weights as float32, momentum as float32 or, if it is kept so, as bfloat16.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon.choices import dtype_name
from megatron_muon.optimizers import storage
from megatron_muon.optimizers.forms import INT8, PLAIN, REMAINDERS
from megatron_muon.optimizers.handled import STEP
from megatron_muon.optimizers.scalar_rows import SECOND_MOMENT, cut_second_moment, whole_second_moment
from megatron_muon.optimizers.storage import MOMENTUM, OF_FORMS, REMAINDER, Kept, master_of, momentum_of
from megatron_muon.routing.layout import layout_of

MASTER = "fp32_param"
"""State in checkpoints: the float32 master weight."""

MOMENTUM_DTYPE = "momentum_dtype"
"""Among the numbers of a weight: the form of its momentum, which a checkpoint's readers may change."""


@dataclass(frozen=True)
class Slices:
    """How a flattened weight lies on the ranks of a data-parallel group."""

    group: dist.ProcessGroup  # the ranks
    spans: tuple[tuple[int, int], ...]  # [start, stop) of each rank's elements; empty ones have start == stop

    @property
    def mine(self) -> tuple[int, int]:
        """The elements of this rank, [start, stop)."""
        return self.spans[self.group.rank()]


@dataclass(frozen=True)
class Bucket:
    """Where a flattened weight lies in the distributed optimizer's buffers."""

    domain: int  # number of the model-parallel domain
    buffer: int  # number of the buffer
    number: int  # of the bucket in it
    start: int  # first element in the bucket
    size: int  # elements of the bucket without its padding at the end


@dataclass(frozen=True)
class ParamState:
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
        """Of its param group, and the optimizer's options, with its own budget and the form of its momentum."""
        options = dict(getattr(self.inner, "checkpoint_options", {}))
        if options and self.key is not None and (budget := layout_of(self.key).budget) is not None:
            own = {"num_ns_steps": budget.steps, "coefficient_type": budget.coefficients}
            options |= {name: value for name, value in own.items() if value is not None}
        if options and self.momentum_dtype:
            options[MOMENTUM_DTYPE] = self.momentum_dtype
        return {**options, **self.group}

    @property
    def momentum_dtype(self) -> str:
        """The form of the momentum, by the names of options; empty if there is none."""
        kept = self._kept.get(MOMENTUM)
        if kept is None:
            return ""
        return dtype_name(kept.planes[0].dtype) if kept.form is PLAIN else kept.form.name

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """State by name, ``fp32_param`` for the master weight among it, as the optimizer keeps it; of the slice's shape
        if there are slices.
        """
        if self.key is None:
            return {}
        found = {
            name: value
            for name, value in self.inner.state[self.key].items()
            if isinstance(value, torch.Tensor) and name != STEP
        }
        return found if self.master is None else {MASTER: self.master, **found}

    @property
    def _kept(self) -> dict[str, Kept]:
        """What is kept in some form, by its name in checkpoints."""
        if self.key is None:
            return {}
        state = self.inner.state[self.key]
        found = {MASTER: master_of(self.key, state)} if REMAINDER in state else {}
        return {**found, MOMENTUM: momentum_of(state)} if MOMENTUM in state else found

    @property
    def of_forms(self) -> frozenset[str]:
        """Names of the state that checkpoints do not have, because it says numbers of others."""
        return frozenset(OF_FORMS) & self.tensors.keys()

    @property
    def states(self) -> tuple[str, ...]:
        """The names of :attr:`saved`."""
        names = [*([MASTER] if MASTER in self._kept else []), *self.tensors]
        return tuple(name for name in names if name not in OF_FORMS)

    @functools.cached_property
    def saved(self) -> dict[str, torch.Tensor]:
        """:attr:`tensors` as checkpoints have them; what is kept otherwise as a copy, until it is taken.

        In host memory, one weight after the other: float32 numbers of remainders and of int8 momentum. Of the weight's
        shape: Muon's second moment.
        """
        tensors, kept, key = self.tensors, self._kept, self.key
        found = {
            name: storage.read(kept[name]).cpu() if name in kept and kept[name].form in _DECODED else tensors[name]
            for name in self.states
        }
        second = found.get(SECOND_MOMENT)
        if second is not None and key is not None and second.shape != key.shape and layout_of(key).has_scalar_rows:
            found[SECOND_MOMENT] = whole_second_moment(key, second)
        return found

    def keep_apart(self) -> None:
        """Copy what of :attr:`saved` is the state itself and on the host, for a weight on a device.

        Writers in the background take copies of what is on a device, and share what is on the host with later steps.
        """
        for name, tensor in self.tensors.items():
            if self.saved.get(name) is tensor and tensor.device != self.param.device:
                self.saved[name] = tensor.clone()

    def read_as(self, state: str, dtype: torch.dtype) -> torch.Tensor:
        """Let momentum be read in the numbers in which it is stored: its sum is compared before it is rounded.

        Returns:
            what to read a state into, of :attr:`saved`.
        """
        found = self.saved[state]
        if state == MOMENTUM and found.dtype != dtype and dtype.is_floating_point:
            found = self.saved[state] = found.to("cpu", dtype)
        return found

    def numbers_in(self, state: str) -> torch.Tensor:
        """What a state stands for, as it is now; not to be changed."""
        kept = self._kept.get(state)
        return self.tensors[state] if kept is None else storage.read(kept)

    def take(self) -> None:
        """Make what was read into :attr:`saved` the state, and drop copies."""
        read, tensors = self.__dict__.pop("saved", {}), self.tensors
        for name, kept in self._kept.items():
            if name in read and read[name] is not tensors.get(name):
                storage.write(kept, read.pop(name))
        second = tensors.get(SECOND_MOMENT)
        if self.key is not None and second is not None and read.get(SECOND_MOMENT, second).shape != second.shape:
            cut_second_moment(self.key, read)
            second.copy_(read[SECOND_MOMENT])


_DECODED = (INT8, REMAINDERS)
"""Forms that checkpoints do not have."""


_PIECE = 1 << 22
"""Elements that are squared at once, in float64."""


def mean_squares(held: Sequence[ParamState], tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """The mean square of a state, over all slices of a weight.

    One all-reduce of a number for each weight in slices in each group: all ranks of a group must call this with the
    weights in the same order, and nothing may fail on one of them between their last exchange and this.

    Args:
        held: the weights of this rank, those of which it has no element among them.
        tensors: one for each: the state, whole or the slice; None counts nothing.

    Returns:
        float64 scalars on the weights' devices.
    """
    sums = [torch.zeros((), dtype=torch.float64, device=each.param.device) for each in held]
    for total, tensor in zip(sums, tensors, strict=True):
        for piece in () if tensor is None else tensor.reshape(-1).split(_PIECE):
            total += piece.double().square().sum()
    groups: dict[dist.ProcessGroup, list[int]] = {}
    for place, each in enumerate(held):
        if each.slices is not None:
            groups.setdefault(each.slices.group, []).append(place)
    for group, places in groups.items():
        totals = torch.stack([sums[place] for place in places])
        dist.all_reduce(totals, group=group)
        for place, total in zip(places, totals, strict=True):
            sums[place] = total
    return [
        total / (each.param if tensor is None or each.slices else tensor).numel()
        for each, tensor, total in zip(held, tensors, sums, strict=True)
    ]
