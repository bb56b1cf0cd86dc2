"""What can become of a checkpoint while it is written, told on all ranks: storage that does not take it, and the end of
the process that writes behind a run (``--async-save --use-persistent-ckpt-worker``).
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_muon._patching import Original, Patches
from megatron_muon.agree import Ranks
from megatron_muon.checkpoint.errors import CheckpointError, raise_together
from megatron_muon.errors import size_text
from megatron_muon.plugin.within import within

PATCHES = Patches()

_SAVING = "megatron.core.dist_checkpointing"
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


# --- storage that does not take what is written -----------------------------------------------------------------------

_RANKS: ContextVar[tuple[Ranks, ...]] = ContextVar("megatron_muon_saving", default=())
"""Of the models with an optimizer of ours whose checkpoint is being saved; of others' nothing more is exchanged."""

_unmarked: dict[str, list[BaseException]] = {}
"""Folder of such a checkpoint -> why its last mark could not be written."""


def saved_together(ranks: Sequence[Ranks], folder: Any, save: Callable[[], Any]) -> Any:
    """What Megatron-Core's ``save`` gives; all ranks of the models know in the end if the last mark was written."""
    if not ranks:
        return save()
    problems = _unmarked[str(folder)] = []

    def check() -> None:
        _unmarked.pop(str(folder), None)
        _refuse(ranks, folder, problems)

    with within(_RANKS, tuple(ranks)):
        request = save()
    if request is None:
        check()
    else:
        request.finalize_fns.append(check)
    return request


@PATCHES.around(
    f"{_SAVING}.strategies.torch:TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks",
    "why a checkpoint could not be written is raised on one rank; where it cannot write the index, the others wait",
)
def _with_reasons_told(original: Original, self: Any, writer: Any, plan: Any, *args: Any, **kwargs: Any) -> Any:
    request, ranks = original(self, writer, plan, *args, **kwargs), _RANKS.get()
    if not ranks:
        return request
    finalize, write, wrapper = request.finalize_fns[0], writer.finish, plan[-1]
    problems: list[BaseException] = []

    def finish(*args: Any) -> None:
        try:
            write(*args)
        except Exception as error:  # the others come to what follows
            problems.append(error)

    def finalize_together() -> None:
        writer.finish = finish  # for now alone: it would keep the writer alive, and all that is written
        try:
            finalize()
        except CheckpointException as error:  # on all ranks; this one alone knows of which
            if wrapper.is_coordinator:
                problems.extend(failure for failure, _ in error.failures.values())
        finally:
            del writer.finish
        _refuse(ranks, writer.checkpoint_dir, problems)

    request.finalize_fns[0] = finalize_together
    return request


@PATCHES.around(
    f"{_SAVING}.core:save_config",
    "the first rank writes the mark of a whole checkpoint; if it cannot, the others wait for it for ever",
)
def _with_failure_kept(original: Original, config: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> None:
    try:
        original(config, checkpoint_dir, *args, **kwargs)
    except OSError as error:
        if str(checkpoint_dir) not in _unmarked:
            raise
        _unmarked[str(checkpoint_dir)].append(error)


def _refuse(ranks: Sequence[Ranks], folder: Any, problems: list[BaseException]) -> None:
    """All ranks of the models raise what one of them has met."""

    def check() -> None:
        if not problems:
            return
        free = ""
        with contextlib.suppress(OSError):  # an object store
            free = f"; {size_text(shutil.disk_usage(folder).free)} are free there"
        raise CheckpointError(
            f"{folder} could not be written ({'; '.join(dict.fromkeys(map(str, problems)))}{free}). It counts as no "
            "checkpoint, and those before it are what they were: make room on the disk (or give another --save), and "
            "start again from the newest of them."
        )

    work: Callable[[], None] = check
    for each in ranks:
        work = functools.partial(each.together, work)
    work()
