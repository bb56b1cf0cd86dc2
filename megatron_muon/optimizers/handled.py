"""State that others handle: frameworks replace it, zero it by name, and move it to the host and back, between steps."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_muon.errors import ConfigError, sizes
from megatron_muon.orthogonalize.kernels import is_capturing

STEP = "step"
"""Name of the count of updates, in state and in param groups. It is no tensor like a weight, and stays on the host."""

ASLEEP: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""Optimizers whose state sleeps: :class:`megatron_muon.optimizers.sleeping.Sleep` of each."""


class HostReads:
    """What a step reads from the device on the host: what a CUDA graph of it cannot do.

    Attributes:
        count: so far, in this process.
        forbidden: whether a step is being captured.
    """

    count: ClassVar[int] = 0
    forbidden: ClassVar[bool] = False

    @classmethod
    def note(cls, what: str) -> None:
        """Take note of one.

        Raises:
            RuntimeError: if a step is being captured.
        """
        cls.count += 1
        if cls.forbidden:
            raise RuntimeError(f"a captured step reads {what} on the host, which would be the same in every replay")

    @classmethod
    @contextlib.contextmanager
    def none(cls) -> Iterator[None]:
        """Within, nothing may be read."""
        cls.forbidden = True
        try:
            yield
        finally:
            cls.forbidden = False


class TensorVersions:
    """Tells which tensors somebody else has replaced or written to since they were recorded.

    It compares identities and version counters, which come out the same on all ranks that have been handled alike.
    Writes that bypass autograd, through ``.data``, are not noticed.
    """

    def __init__(self) -> None:
        self._versions = WeakTensorKeyDictionary()

    def record(self, tensors: Iterable[torch.Tensor]) -> None:
        """Record tensors as they are now."""
        for tensor in tensors:
            self._versions[tensor] = tensor._version

    def follow(self, tensor: torch.Tensor, view: torch.Tensor) -> None:
        """From now on a view stands for a tensor that was recorded."""
        if tensor in self._versions:
            self._versions[view] = self._versions[tensor]

    def have_changed(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Whether any of them is not as it was recorded."""
        return any(self._versions.get(tensor) != tensor._version for tensor in tensors)


def refuse_asleep(optimizer: Any) -> None:
    """Refuse a step whose state is asleep.

    Raises:
        ConfigError: naming the call that brings it back.
    """
    if (sleep := ASLEEP.get(optimizer)) is not None:
        raise ConfigError(
            f"{type(optimizer).__name__} is to step, but its state is asleep {sleep}: call wake() of the optimizer, or "
            "megatron_muon.wake(optimizer), before the step."
        )


def refuse_elsewhere(optimizer: Any, device: torch.device | None = None) -> None:
    """Refuse a step whose state is not where its weights are; looks at no values.

    Args:
        optimizer: with its state.
        device: where the weights that are updated and all their state must be, but for state that lives on the host;
            None: state where its weight is.

    Raises:
        ConfigError: naming the call that brings it back.
    """
    refuse_asleep(optimizer)
    state_of, windows = optimizer.state.get, getattr(optimizer, "windows", None)
    on_host = () if windows is None else windows.names
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param in params:
        wanted = device or param.device
        if device is not None and param.device != wanted:
            raise _elsewhere(optimizer, "master weight", param, wanted)
        for name, value in (state_of(param) or {}).items():
            if isinstance(value, torch.Tensor) and value.device != wanted and name != STEP:
                if name in on_host and value.device.type == "cpu":
                    continue
                raise _elsewhere(optimizer, name, value, wanted)


def _elsewhere(optimizer: Any, name: str, tensor: torch.Tensor, wanted: torch.device) -> ConfigError:
    return ConfigError(
        f"{type(optimizer).__name__} is to step on {wanted}, but the {name} of a weight, {sizes(tensor.shape)}, is on "
        f"{tensor.device}: call megatron_muon.wake(optimizer) before the step."
    )


def refuse_capture(optimizer: Any) -> None:
    """Refuse a step that others capture: its numbers would be those of this step for ever.

    Raises:
        ConfigError: naming the way out.
    """
    first = next((param for group in optimizer.param_groups for param in group["params"]), None)
    if first is not None and is_capturing(first.device):
        raise ConfigError(
            f"{type(optimizer).__name__}.step() within a CUDA graph: learning rate, weight decay and count of steps "
            "would be those of this step in all replays. Call megatron_muon.optimizers.graph.capture(optimizer), and "
            "optimizer.step() outside of graphs."
        )
