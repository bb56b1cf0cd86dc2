"""Optimizer state in the hands of frameworks: started anew, moved to the host and back, counted.

All functions take an optimizer of Megatron-Core (a chain, a wrapper) or of torch, and are called on all ranks alike.
Weights of the model and gradient buffers are the framework's to move; master weights are the optimizer's.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.handled import STEP, refuse_elsewhere
from megatron_muon.optimizers.muon import Muon
from megatron_muon.plugin.optimizer_state import has_own_masters, has_parts, leaves, param_states

_KEYS = ("exp_avg", "exp_avg_sq", "master_param")
"""What the offloading passes of frameworks look for."""


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


class _Entry(NamedTuple):
    """A tensor of state, in the state of its weight or (None) a master weight; the weight's device; who finds it."""

    state: dict[str, Any] | None
    key: str
    tensor: torch.Tensor
    home: torch.device
    is_found: bool

    @property
    def is_home(self) -> bool:
        return self.tensor.device == self.home


def reset(optimizer: Any) -> None:
    """Start an optimizer's state anew: the next step is the first of a fresh optimizer, from the weights as they are.

    Momentum, second moments, vectors and radii of variants, the count of steps of Adam's rows and of Adam are gone.
    Master weights, learning rates and their schedule stay. May be called at any time between steps, and repeatedly.
    """
    for leaf in _wrapped(optimizer):
        inner = leaf if leaf is optimizer else leaf.optimizer
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

    A step is refused until :func:`wake` has brought it back, with the same bits. A model on CPU processes has its
    state at home on the host: it is copied there, and steps go on.

    Returns:
        bytes that were moved from this rank's device.
    """
    for leaf in _wrapped(optimizer):
        graph = getattr(leaf if leaf is optimizer else leaf.optimizer, "graph", None)
        if graph is not None:
            graph.release()
    return _move([(entry, torch.device("cpu")) for entry in _entries(optimizer) if entry.is_home])


def wake(optimizer: Any) -> int:
    """Bring state to its weights' device, whoever has moved it away.

    Returns:
        bytes that were moved to this rank's device.
    """
    return _move([(entry, entry.home) for entry in _entries(optimizer) if not entry.is_home])


def state_bytes(optimizer: Any) -> StateBytes:
    """What an optimizer keeps on this rank, where, and how much of it a framework's pass over keys would not find."""
    here: Counter[str] = Counter()
    there: Counter[str] = Counter()
    left = 0
    for entry in _entries(optimizer):
        (here if entry.is_home else there)[entry.key] += entry.tensor.nbytes
        left += entry.tensor.nbytes if entry.is_home and not entry.is_found else 0
    return StateBytes(dict(here), dict(there), left)


def guard(optimizer: Any, chunks: Sequence[torch.nn.Module], device: torch.device) -> Callable[[], None]:
    """Have Megatron-Core's optimizer of a model hear of new weights.

    Returns:
        what refuses a step without its state or weights, on this rank.
    """
    parts = [leaf for leaf, _ in leaves(optimizer)]
    for leaf in parts:
        leaf.reload_model_params = functools.partial(_reload, leaf, leaf.reload_model_params)

    def check() -> None:
        _check_buffers(chunks)
        for leaf in parts:
            if isinstance(leaf.optimizer, Muon):
                leaf.optimizer.refuse_step(device)
            else:
                refuse_elsewhere(leaf.optimizer, device)

    return check


def _check_buffers(chunks: Sequence[torch.nn.Module]) -> None:
    for chunk in chunks:
        config: Any = getattr(chunk, "ddp_config", None)
        if config is None or not config.use_distributed_optimizer or config.reuse_grad_buf_for_mxfp8_param_ag:
            continue
        parts: Any = chunk
        for buffer in (*parts.buffers, *parts.expert_parallel_buffers):
            memory = buffer.param_data.untyped_storage().data_ptr()
            for param in buffer.params:
                is_plain = type(param.data) is torch.Tensor and param.dtype == buffer.param_data.dtype
                if is_plain and param.untyped_storage().data_ptr() != memory:
                    name = next(name for name, each in chunk.named_parameters() if each is param)
                    raise ConfigError(
                        f"{name}: its memory is no longer in DistributedDataParallel's buffer, from which the other "
                        "ranks get it: do not replace .data, but move buffers (offload_to_cpu and reload_from_cpu)."
                    )


def _reload(leaf: Any, reload_model_params: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    reload_model_params(*args, **kwargs)
    if isinstance(leaf.optimizer, Muon):
        leaf.optimizer.forget()


def _wrapped(optimizer: Any) -> Iterator[Any]:
    """Optimizers of Megatron-Core, of which each has one torch optimizer; or that of torch itself."""
    if has_parts(optimizer):
        for info in optimizer.module_infos.values():
            if info.is_active and info.optimizer is not None:
                yield from _wrapped(info.optimizer)
    elif isinstance(optimizer, torch.optim.Optimizer):
        yield optimizer
    else:
        yield from (leaf for leaf, _ in leaves(optimizer))


def _entries(optimizer: Any) -> Iterator[_Entry]:
    for leaf in _wrapped(optimizer):
        if leaf is optimizer:
            states = [(state, param.device) for param, state in leaf.state.items()]
        elif hasattr(leaf.optimizer, "sub_optimizers"):
            continue  # Megatron-Core's own offloading, which has a part on the host as it is
        else:
            states = []
            for held in param_states(leaf, refuse=False):
                if held.key is not None:
                    states.append((held.inner.state.get(held.key, {}), held.param.device))
                if held.master is not None and not has_own_masters(leaf):
                    yield _Entry(None, "fp32_param", held.master, held.param.device, held.slices is not None)
        for state, device in states:
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and key != STEP:
                    yield _Entry(state, key, value, device, key in _KEYS)


@torch.no_grad()
def _move(entries: list[tuple[_Entry, torch.device]]) -> int:
    """Give each the memory of a copy on the device beside it."""
    for entry, device in entries:
        is_down = device.type == "cpu" and entry.tensor.device.type == "cuda"
        copy = torch.empty_like(entry.tensor, device=device, pin_memory=is_down)
        copy.copy_(entry.tensor, non_blocking=is_down)
        if entry.state is not None:
            entry.state[entry.key] = copy
        else:
            entry.tensor.grad = None  # Megatron-Core copies the gradients again before each step
            entry.tensor.data = copy
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # copies are under way; this is between steps
        torch.cuda.empty_cache()
    return sum(entry.tensor.nbytes for entry, _ in entries)
