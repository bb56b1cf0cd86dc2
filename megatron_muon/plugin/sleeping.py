"""Optimizer state of Megatron-Core's optimizers that sleeps while another engine has the GPU, and comes back.

Functions take an optimizer of Megatron-Core (a chain, a wrapper) or of torch, and are called on all ranks alike; no
rank waits for another in them. Weights of the model and gradient buffers are the framework's to move.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import torch

from megatron_muon.optimizers import sleeping
from megatron_muon.optimizers.joint import JointOptimizer
from megatron_muon.optimizers.sleeping import HOST, Entry, entries_in, entries_of
from megatron_muon.plugin.optimizer_state import has_own_masters, has_parts, leaves, param_states


def sleep(optimizer: Any, to: str | os.PathLike[str] = HOST) -> int:
    """Free the device of all state of an optimizer, in any layout: momentum, second moments, master weights and their
    gradients, Adam's part, CUDA graphs of the step.

    A step is refused until :func:`wake` has brought it back, with the same bits. On the host it can be saved and read
    meanwhile; in a file it cannot, and is refused by name. What loads state, or takes new weights of the model, wakes
    it. A save in the background that is under way goes on with what it has begun with; what it holds of the device is
    free when it ends. Again without harm: what has come to the device meanwhile follows.

    Args:
        optimizer: of Megatron-Core or of torch.
        to: ``"host"``: pinned memory of the host; or a folder, in which each rank writes one file. The device is freed
            when the file is on the disk and has been read back. :func:`wake` removes it.

    Returns:
        bytes that were moved from this rank's device.

    Raises:
        OSError: naming the file, if the disk is full or does not keep what is written; then nothing has changed.
    """
    for leaf in wrapped(optimizer):
        for param in () if leaf is inner_of(leaf) else _updated(leaf):
            if hasattr(param, "main_grad"):
                param.decoupled_grad = None  # Megatron-Core makes it from the buffers again before each step
    entries = [entry for entry, _ in kept(optimizer)]
    return sleeping.put_to_sleep(_inners(optimizer), entries, to, sleeping.later(wake, optimizer))


def wake(optimizer: Any) -> int:
    """Bring state to its weights' device, whoever has moved it away.

    Returns:
        bytes that were moved to this rank's device.

    Raises:
        OSError: naming the file, if it is gone or damaged; what was not read is still asleep.
    """
    return sleeping.awaken(_inners(optimizer), [entry for entry, _ in kept(optimizer)])


def wrapped(optimizer: Any) -> Iterator[Any]:
    """Optimizers of Megatron-Core, of which each has one torch optimizer; or that of torch itself, or its parts."""
    if has_parts(optimizer):
        for info in optimizer.module_infos.values():
            if info.is_active and info.optimizer is not None:
                yield from wrapped(info.optimizer)
    elif isinstance(optimizer, JointOptimizer):
        yield from optimizer.parts
    elif isinstance(optimizer, torch.optim.Optimizer):
        yield optimizer
    else:
        yield from (leaf for leaf, _ in leaves(optimizer))


def kept(optimizer: Any) -> Iterator[tuple[Entry, bool]]:
    """All that an optimizer keeps, and whether a framework's pass finds it that moves what Adam has: see
    :class:`megatron_muon.plugin.state.StateBytes`.
    """
    for leaf in wrapped(optimizer):
        if leaf is inner_of(leaf):
            yield from ((entry, entry.key in KEYS) for entry in entries_of(leaf))
        elif not _is_elsewhere(leaf):
            for held in param_states(leaf, refuse=False):
                if held.key is not None:
                    for entry in entries_in(held.inner, held.inner.state.get(held.key, {}), held.param.device):
                        yield entry, entry.key in KEYS
                if held.master is not None and not has_own_masters(leaf):
                    device = held.param.device
                    yield Entry(None, "fp32_param", held.master, device, device), held.slices is not None


KEYS = ("exp_avg", "exp_avg_sq", "master_param")
"""What the offloading passes of frameworks look for."""


def give_calls(optimizer: Any) -> None:
    """Give Megatron-Core's optimizer of a model, and each that it is a chain of, :func:`sleep` and :func:`wake`.

    Megatron-Core's own words for it, ``offload_to_cpu`` and ``restore_from_cpu``, would give float32 weights without
    masters memory of their own, out of DDP's buffers from which other ranks get them.
    """
    for part in _parts(optimizer):
        part.sleep, part.wake = functools.partial(sleep, part), functools.partial(wake, part)
        part.offload_to_cpu, part.restore_from_cpu = part.sleep, part.wake


def _parts(optimizer: Any) -> Iterator[Any]:
    yield optimizer
    for part in getattr(optimizer, "chained_optimizers", ()):
        yield from _parts(part)


def inner_of(leaf: Any) -> Any:
    """The torch optimizer of one of :func:`wrapped`."""
    return leaf if isinstance(leaf, torch.optim.Optimizer) else leaf.optimizer


def _inners(optimizer: Any) -> list[torch.optim.Optimizer]:
    return [inner_of(leaf) for leaf in wrapped(optimizer) if not _is_elsewhere(leaf)]


def _is_elsewhere(leaf: Any) -> bool:
    """Whether it is Megatron-Core's own offloading, which has a part on the host as it is."""
    return hasattr(inner_of(leaf), "sub_optimizers")


def _updated(leaf: Any) -> Iterator[Any]:
    return (param for group in leaf.optimizer.param_groups for param in group["params"])
