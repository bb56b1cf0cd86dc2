"""The process that writes checkpoints behind the training: ``--async-save --use-persistent-ckpt-worker``.

It is started anew, without this package, and selects a GPU first of all. Tensors come to it as they are if they are not
on a GPU, in memory that it shares with the training, which goes on to change them.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from megatron_muon._patching import Patch

__all__ = ["PATCHES", "run"]

_STRATEGIES = "megatron.core.dist_checkpointing.strategies"
_LOOP = f"{_STRATEGIES}.async_utils:PersistentAsyncCaller.async_loop"

_replaced: dict[str, Callable[..., None]] = {}
"""Target -> Megatron-Core's own function."""


def run(*args: Any, **kwargs: Any) -> None:
    """Body of the process: what Megatron-Core does in it, with the redirects.

    It is in the place of Megatron-Core's function because a process that is started anew looks its body up by name, and
    finds there what has not been replaced.
    """
    importlib.import_module(_LOOP.partition(":")[0])
    cpu = importlib.import_module("megatron_muon.cpu")
    cpu.install()
    _replaced[_LOOP](*args, **kwargs)


def _with_redirects(original: Callable[..., None]) -> staticmethod[..., None]:
    _replaced[_LOOP] = original
    return staticmethod(run)


def _with_copies(original: Callable[..., list[Any]]) -> staticmethod[..., list[Any]]:
    @functools.wraps(original)
    def preload_tensors(write_buckets: list[Any], non_blocking: bool = True) -> list[Any]:
        buckets = original(write_buckets, non_blocking)
        return [
            (file, key, (numbers, [(item, _own(tensor)) for item, tensor in tensors]))
            for file, key, (numbers, tensors) in buckets
        ]

    return staticmethod(preload_tensors)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.is_shared() else tensor


PATCHES: list[Patch] = [
    Patch(
        _LOOP,
        _with_redirects,
        "the process that writes checkpoints starts without redirects, and divides by the number of GPUs",
    ),
    Patch(
        f"{_STRATEGIES}.filesystem_async:FileSystemWriterAsync.preload_tensors",
        _with_copies,
        "copies tensors from the GPU, so that training may go on; those of the CPU it passes on as they are, and the "
        "process would write what training makes of them meanwhile",
    ),
]
