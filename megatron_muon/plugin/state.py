"""Optimizer state in the hands of frameworks: started anew, counted, and a step without it refused.

All functions take an optimizer of Megatron-Core (a chain, a wrapper) or of torch, and are called on all ranks alike.
What moves it is in :mod:`megatron_muon.plugin.sleeping`.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.handled import STEP, refuse_elsewhere
from megatron_muon.optimizers.muon import Muon
from megatron_muon.optimizers.sleeping import zeros_for
from megatron_muon.plugin.optimizer_state import leaves
from megatron_muon.plugin.sleeping import KEYS, give_calls, inner_of, kept, wake, wrapped


@dataclass(frozen=True)
class StateBytes:
    """Bytes of optimizer state on this rank.

    Attributes:
        on_device: where the weights are, by key; ``fp32_param`` are master weights.
        elsewhere: on another device, or in a file, by key.
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
            f"{_mib(sum(self.elsewhere.values()))} elsewhere; a pass over {', '.join(KEYS)} leaves "
            f"{_mib(self.left_by_keys)}"
        )


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"


def reset(optimizer: Any) -> None:
    """Start an optimizer's state anew: the next step is the first of a fresh optimizer, from the weights as they are.

    Momentum, second moments, vectors and radii of variants, the count of steps of Adam's rows and of Adam are gone.
    Master weights, learning rates and their schedule stay. May be called at any time between steps, and repeatedly;
    what is asleep stays so.
    """
    for leaf in wrapped(optimizer):
        inner = inner_of(leaf)
        if isinstance(inner, Muon):
            inner.reset()
            continue
        for group in inner.param_groups:
            group.pop(STEP, None)
        if "adam" not in type(inner).__name__.lower():
            inner.state.clear()
            continue
        # In place: the distributed optimizer does not make state that is gone, but takes memory as it is.
        for param, state in inner.state.items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and key != "master_param":
                    state[key] = zeros_for(value, param)


def state_bytes(optimizer: Any) -> StateBytes:
    """What an optimizer keeps on this rank, where, and how much of it a framework's pass over keys would not find."""
    here: Counter[str] = Counter()
    there: Counter[str] = Counter()
    left = 0
    for entry, is_found in kept(optimizer):
        tensor: Any = entry.tensor
        size = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes  # of a DTensor this rank's part
        (here if entry.is_on_device else there)[entry.key] += size
        left += size if entry.is_on_device and not is_found else 0
    return StateBytes(dict(here), dict(there), left)


def guard(optimizer: Any, chunks: Sequence[torch.nn.Module], device: torch.device) -> Callable[[], None]:
    """Have Megatron-Core's optimizer of a model hear of new weights, and sleep when it is called.

    Returns:
        what refuses a step without its state or weights, on this rank.
    """
    give_calls(optimizer)
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
    wake(leaf)
    reload_model_params(*args, **kwargs)
    if isinstance(leaf.optimizer, Muon):
        leaf.optimizer.forget()
