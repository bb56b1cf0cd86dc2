"""The process that writes checkpoints behind a run (``--async-save --use-persistent-ckpt-worker``) may be killed."""

from __future__ import annotations

import threading
import time
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon._patching import Original, Patches
from megatron_muon.agree import Ranks
from megatron_muon.checkpoint.errors import raise_together

PATCHES = Patches()

_CALLER = "megatron.core.dist_checkpointing.strategies.async_utils:PersistentAsyncCaller"
_POLL_S = 0.1
_KILLED = 1 << 20
"""In place of 1 in the sum over the ranks whose checkpoint is not yet written: more than there are ranks."""


@PATCHES.around(f"{_CALLER}.schedule_async_call", "waits for ever for a process that was killed to copy tensors")
def _with_an_end(original: Original, self: Any, async_req: Any) -> None:
    if async_req.async_fn is None:
        return
    if self.process is None:
        self.process = self._get_process(dist.get_rank())
    if not self.process.is_alive():
        return  # all ranks are told at the next look: one alone would leave the others waiting
    self._persistent_preload_q = _Copying(self._persistent_preload_q, self.process)
    try:
        original(self, async_req)
    finally:
        del self._persistent_preload_q


class _Copying:
    """The queue by which the process is waited for while it copies tensors; the end of the process ends it."""

    def __init__(self, queue: Any, process: Any) -> None:
        self._queue, self._process = queue, process
        self.put = queue.put

    def join(self) -> None:
        waiting = threading.Thread(target=self._queue.join, daemon=True)
        waiting.start()
        while waiting.is_alive() and self._process.is_alive():
            waiting.join(_POLL_S)


@PATCHES.around(
    f"{_CALLER}.is_current_async_call_done",
    "a process that was killed is never done: the run goes on, and no checkpoint is complete from then on",
)
def _with_killed_told(original: Original, self: Any, blocking: bool = False, no_dist: bool = False) -> bool:
    if self.process is None:
        return original(self, blocking, no_dist)
    alive = True
    while self.cur_item is None:
        alive = self.process.is_alive()  # asked first: what it has told before its end counts
        try:
            self.cur_item = self._persistent_comp_q.get_nowait()
        except Empty:
            if not blocking or not alive:
                break
            time.sleep(_POLL_S)
    writing = 0 if self.cur_item is not None else 1 if alive else _KILLED
    if not no_dist:  # one sum over the run, as Megatron-Core's
        total = torch.tensor([writing], dtype=torch.int, device=torch.cuda.current_device())
        dist.all_reduce(total)
        writing = int(total)
    if writing >= _KILLED:
        _stop(self, Ranks(()) if no_dist else Ranks.of_world())
    if writing == 0:
        self.cur_item = None
    return writing == 0


def _stop(caller: Any, ranks: Ranks) -> None:
    """End what is left of the processes, and say on all ranks which were killed."""
    code = None if caller.process.is_alive() else caller.process.exitcode
    for queue in (caller._persistent_queue, caller._persistent_preload_q):
        queue.cancel_join_thread()  # nobody takes what is still in it
    caller.close(abort=True)
    raise_together(
        ranks,
        [] if code is None else [f"of rank {dist.get_rank()}: exit status {code}"],
        "Processes that write checkpoints (--use-persistent-ckpt-worker) have ended:",
        "What was being written is not complete. Look for what has ended them (exit status -9: mostly want of memory, "
        "of which --async-save takes more), and start again: the run goes on from the newest whole checkpoint.",
    )
