"""Optimizer state in the hands of frameworks: started anew, moved to the host and back, counted.

All functions take an optimizer of Megatron-Core (a chain, a wrapper) or of torch, and are called on all ranks alike.
Weights of the model and gradient buffers are the framework's to move; master weights are the optimizer's.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_muon.checkpoint.held import STEP
from megatron_muon.optimizers.handled import refuse_elsewhere
from megatron_muon.optimizers.muon import Muon
from megatron_muon.plugin.optimizer_state import held_by, leaves

__all__ = ["StateBytes", "guard", "reset", "sleep", "state_bytes", "wake"]

_KEYS = ("exp_avg", "exp_avg_sq", "master_param")
"""What the offloading passes of frameworks look for."""

_MASTER = "fp32_param"


@dataclass(frozen=True)
class StateBytes:
    """Bytes of optimizer state on this rank.

    Attributes:
        on_device: where the weights are, by key; ``fp32_param`` are master weights.
        elsewhere: on another device, by key.
        left_by_keys: of ``on_device``, what a pass leaves that moves ``exp_avg``, ``exp_avg_sq`` and ``master_param``,
            and master weights of the distributed optimizer, as frameworks do for Adam.
    """

    on_device: dict[str, int]
    elsewhere: dict[str, int]
    left_by_keys: int

    def __str__(self) -> str:
        text = ", ".join(f"{name} {_mib(size)}" for name, size in self.on_device.items()) or "nothing"
        return (
            f"{_mib(sum(self.on_device.values()))} MiB with the weights ({text}), "
            f"{_mib(sum(self.elsewhere.values()))} elsewhere; a pass over {', '.join(_KEYS)} leaves "
            f"{_mib(self.left_by_keys)}"
        )


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"


@dataclass(frozen=True)
class _Place:
    """A tensor of state.

    Attributes:
        key: in the state.
        tensor: that is there now.
        is_found: whether the passes of frameworks move it.
        device: of the weight.
        replace: puts another in its place.
    """

    key: str
    tensor: torch.Tensor
    is_found: bool
    device: torch.device
    replace: Callable[[torch.Tensor], None]


def reset(optimizer: Any) -> None:
    """Start an optimizer's state anew: the next step is the first of a fresh optimizer, from the weights as they are.

    Momentum, second moments, vectors and radii of variants, the count of steps of Adam's rows and of Adam are gone.
    Master weights, learning rates and their schedule stay. May be called at any time between steps, and repeatedly.
    """
    for inner in _inner(optimizer):
        if isinstance(inner, Muon):
            inner.reset()
            continue
        for group in inner.param_groups:
            group.pop(STEP, None)
        if "adam" not in type(inner).__name__.lower():
            inner.state.clear()
            continue
        # In place: the distributed optimizer does not make state that is gone, but takes memory as it is.
        for state in inner.state.values():
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and key != "master_param":
                    value.zero_()


def sleep(optimizer: Any) -> int:
    """Move all state of an optimizer to the host: momentum, second moments, master weights, Adam's part, in any layout.

    A step is refused until :func:`wake` has brought it back, with the same bits. What is on the host stays there.

    Returns:
        bytes that were moved from this rank's device.
    """
    return _move([place for place in _places(optimizer) if place.tensor.device == place.device], torch.device("cpu"))


def wake(optimizer: Any) -> int:
    """Bring state to its weights' device, whoever has moved it away.

    Returns:
        bytes that were moved to this rank's device.
    """
    return _move([place for place in _places(optimizer) if place.tensor.device != place.device], None)


def state_bytes(optimizer: Any) -> StateBytes:
    """What an optimizer keeps on this rank, where, and how much of it a framework's pass over keys would not find."""
    here: Counter[str] = Counter()
    there: Counter[str] = Counter()
    left = 0
    for place in _places(optimizer):
        is_here = place.tensor.device == place.device
        (here if is_here else there)[place.key] += place.tensor.nbytes
        left += place.tensor.nbytes if is_here and not place.is_found else 0
    return StateBytes(dict(here), dict(there), left)


def guard(optimizer: Any, device: torch.device) -> None:
    """Have each part of Megatron-Core's optimizer refuse a step without its state, and hear of new weights.

    Args:
        optimizer: of a model.
        device: of the model.
    """
    for leaf, _ in leaves(optimizer):
        leaf.prepare_grads = functools.partial(_prepare, leaf, leaf.prepare_grads, device)
        leaf.reload_model_params = functools.partial(_reload, leaf, leaf.reload_model_params)


def _prepare(leaf: Any, prepare_grads: Callable[[], bool], device: torch.device) -> bool:
    refuse_elsewhere(leaf.optimizer, device)
    return prepare_grads()


def _reload(leaf: Any, reload_model_params: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    reload_model_params(*args, **kwargs)
    if isinstance(leaf.optimizer, Muon):
        leaf.optimizer.forget()


def _inner(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    """The torch optimizers inside."""
    if isinstance(optimizer, torch.optim.Optimizer):
        yield optimizer
    else:
        for leaf, _ in leaves(optimizer):
            yield leaf.optimizer


def _places(optimizer: Any) -> Iterator[_Place]:
    if isinstance(optimizer, torch.optim.Optimizer):
        for param, state in optimizer.state.items():
            yield from _states(state, param.device)
        return
    for held in held_by(optimizer):
        if held.key is None:
            continue
        if held.master is not None:
            replace = functools.partial(setattr, held.master, "data")
            yield _Place(_MASTER, held.master, held.slices is not None, held.param.device, replace)
        yield from _states(held.inner.state.get(held.key, {}), held.param.device)


def _states(state: dict[str, Any], device: torch.device) -> Iterator[_Place]:
    for key, value in list(state.items()):
        if isinstance(value, torch.Tensor) and key != STEP:
            yield _Place(key, value, key in _KEYS, device, functools.partial(state.__setitem__, key))


@torch.no_grad()
def _move(places: list[_Place], target: torch.device | None) -> int:
    """Replace tensors by copies on ``target``; None for each one's own device."""
    for place in places:
        if place.key == _MASTER:
            place.tensor.grad = None  # Megatron-Core copies the gradients again before each step
        device = target or place.device
        pinned = device.type == "cpu" and place.device.type == "cuda"
        copy = torch.empty_like(place.tensor, device=device, pin_memory=pinned)
        place.replace(copy.copy_(place.tensor.detach(), non_blocking=pinned))
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # copies are under way; this is between steps
        torch.cuda.empty_cache()
    return sum(place.tensor.nbytes for place in places)
