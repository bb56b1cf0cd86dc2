"""The process that writes checkpoints behind the training: ``--async-save --use-persistent-ckpt-worker``.

It is started anew, without this package, and selects a GPU first of all. Tensors come to it as they are if they are not
on a GPU, in memory that it shares with the training, which goes on to change them. It waits for work for ever.

What has been written is told through a queue that Megatron-Core keeps in one process more for each rank, also where the
rank itself writes. That process imports all that the rank has, and nothing ends it if the rank is killed.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import queue
import tempfile
import threading
from collections.abc import Callable
from multiprocessing.reduction import DupFd
from typing import Any

import torch

from megatron_muon._patching import Original, Patches

PATCHES = Patches()

_STRATEGIES = "megatron.core.dist_checkpointing.strategies"
_LOOP = f"{_STRATEGIES}.async_utils:PersistentAsyncCaller.async_loop"

_replaced: dict[str, Callable[..., None]] = {}
"""Target -> Megatron-Core's own function."""


def run(*args: Any, **kwargs: Any) -> None:
    """Body of the process: what Megatron-Core does in it, with the redirects.

    It is in the place of Megatron-Core's function because a process that is started anew looks its body up by name, and
    finds there what has not been replaced.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    importlib.import_module(_LOOP.partition(":")[0])
    cpu = importlib.import_module("megatron_muon.cpu")
    cpu.install()
    _replaced[_LOOP](*args, **kwargs)


def _end_with_parent() -> None:
    """A checkpoint is complete when its training says so: without it nothing is worth finishing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class ResultsQueue:
    """A queue between a training process and the one that writes a checkpoint for it, which may be itself.

    What is put in waits in a file without a name: writing never waits for reading, and no process is needed. It can be
    inherited by a forked process and sent to any other.
    """

    def __init__(self, file: Any = None) -> None:
        self._file = file or tempfile.TemporaryFile()  # noqa: SIM115  as long as the queue
        self._read = 0

    def put(self, item: Any) -> None:
        """Append ``item``; one process at a time."""
        self._file.seek(0, os.SEEK_END)
        pickle.dump(item, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """The next item; raises ``queue.Empty`` if there is none."""
        self._file.seek(self._read)
        try:
            item = pickle.load(self._file)
        except EOFError:
            raise queue.Empty from None
        self._read = self._file.tell()
        return item

    def __reduce__(self) -> Any:
        return _received, (DupFd(self._file.fileno()),)


def _received(file: Any) -> ResultsQueue:
    return ResultsQueue(os.fdopen(file.detach(), "r+b"))


@PATCHES.around(
    f"{_STRATEGIES}.filesystem_async:get_write_results_queue",
    "starts a process with all imports of the rank, 770 MB, which stays for ever when the rank is killed",
)
def _without_manager(original: Original, mp_mode: str = "spawn") -> ResultsQueue:
    # A new one for each checkpoint: nothing has to be emptied.
    return ResultsQueue()


@PATCHES.making(
    _LOOP,
    "the process that writes checkpoints starts without redirects, divides by the number of GPUs, and stays when "
    "its training is killed",
)
def _with_redirects(original: Callable[..., None]) -> staticmethod[..., None]:
    _replaced[_LOOP] = original
    return staticmethod(run)


@PATCHES.around(
    f"{_STRATEGIES}.filesystem_async:FileSystemWriterAsync.preload_tensors",
    "copies tensors from the GPU, so that training may go on; those of the CPU it passes on as they are, and the "
    "process would write what training makes of them meanwhile",
)
def _with_copies(original: Original, write_buckets: list[Any], non_blocking: bool = True) -> list[Any]:
    buckets = original(write_buckets, non_blocking)
    return [
        (file, key, (numbers, [(item, _own(tensor)) for item, tensor in tensors]))
        for file, key, (numbers, tensors) in buckets
    ]


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.is_shared() else tensor
