"""A pool of gloo ranks that live as long as the test session.

Importing torch and Megatron-Core takes seconds per process; a test that starts its own ranks pays them each time. Here
a test sends a function to ranks that are already there, and which were forked from a process that has imported all
(:mod:`tests.preload`)::

    def losses(steps):              # top level of the test module, runs on every rank
        ...
    results = pool.run(losses, 2, 10)   # [result of rank 0, result of rank 1]

Nothing waits for ever: collectives, a call and the shutdown have time-outs, and after a failure the ranks are replaced.
No ports are fixed: ranks meet through a file.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

COLLECTIVE_TIMEOUT_S = 60
CALL_TIMEOUT_S = 180
GRACE_S = 3
THREADS = 150
"""Ranks with more are replaced: each training call leaves some of gloo's behind, which wake up all the time."""


class RankError(AssertionError):
    """A function raised on a rank; the message holds the remote traceback."""


class RankPool:
    """Ranks 0 .. n-1, started when first needed."""

    def __init__(self, *, forked: bool = True, preload: str = "tests.preload") -> None:
        """
        Args:
            forked: from the process that all pools share; if not, ranks import everything by themselves, under the
                environment and the paths that there are when they start.
            preload: the module that this process imports, if no pool has started it before.
        """
        self._context: Any = multiprocessing.get_context("forkserver" if forked else "spawn")
        if forked:
            self._context.set_forkserver_preload([preload])
        self._workers: list[tuple[Any, Connection]] = []
        self._calls = 0

    def run(
        self, function: Callable[..., Any], world_size: int, *args: Any, timeout: float = CALL_TIMEOUT_S, **kwargs: Any
    ) -> list[Any]:
        """Call ``function(*args, **kwargs)`` on every rank of a new process group.

        Args:
            function: importable by name (top level of a module).
            world_size: number of ranks.
            timeout: seconds until the call counts as hanging.

        Returns:
            what it returned, by rank.

        Raises:
            RankError: with the traceback of the first rank that failed.
            TimeoutError: naming the ranks that did not answer.
        """
        self._start(world_size)
        self._calls += 1
        with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
            store = str(Path(folder) / "store")
            payload = pickle.dumps((function, args, kwargs, store, world_size))
            connections = [connection for _, connection in self._workers[:world_size]]
            for connection in connections:
                connection.send_bytes(payload)
            return self._collect(connections, timeout)

    def close(self) -> None:
        """End the ranks: politely, then by force."""
        for _, connection in self._workers:
            with contextlib.suppress(OSError):
                connection.send_bytes(b"")
        deadline = time.monotonic() + GRACE_S
        for process, connection in self._workers:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
            connection.close()
        self._workers = []

    def _start(self, world_size: int) -> None:
        if any(not process.is_alive() or _threads(process.pid) > THREADS for process, _ in self._workers):
            self.close()
        while len(self._workers) < world_size:
            mine, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs, len(self._workers)))
            process.start()
            theirs.close()
            self._workers.append((process, mine))

    def _collect(self, connections: list[Connection], timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        pending = dict(enumerate(connections))
        while pending and time.monotonic() < deadline:
            for connection in wait(list(pending.values()), timeout=max(0.0, deadline - time.monotonic())):
                rank = next(number for number, candidate in pending.items() if candidate is connection)
                try:
                    ok, value = pickle.loads(connection.recv_bytes())
                except EOFError:
                    ok, value = False, "the process ended"
                del pending[rank]
                (results if ok else failures)[rank] = value
                if not ok:  # the others may wait for it in a collective
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if pending:
            self._kill()
        if failures:
            rank, text = next(iter(failures.items()))
            raise RankError(f"rank {rank} of {len(connections)} failed:\n{text}")
        if pending:
            raise TimeoutError(f"ranks {sorted(pending)} of {len(connections)} did not answer within {timeout} s")
        return [results[rank] for rank in range(len(connections))]

    def _kill(self) -> None:
        for process, connection in self._workers:
            process.kill()
            process.join()
            connection.close()
        self._workers = []


def _threads(pid: int) -> int:
    """How many threads a process has; 0 where the system does not tell."""
    tasks = Path(f"/proc/{pid}/task")
    return sum(1 for _ in tasks.iterdir()) if tasks.is_dir() else 0


def _serve(connection: Connection, rank: int) -> None:
    """Body of one rank: run functions until an empty message."""
    import torch

    from megatron_muon import cpu

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    cpu.install()
    while True:
        try:
            payload = connection.recv_bytes()
        except EOFError:
            return
        if not payload:
            return
        try:
            answer = (True, _call(rank, payload))
        except BaseException:  # SystemExit included: the parent must hear of it
            answer = (False, traceback.format_exc())
        sys.stdout.flush()
        connection.send_bytes(pickle.dumps(answer))


def _call(rank: int, payload: bytes) -> Any:
    import torch
    import torch.distributed as dist

    import megatron_muon

    function, args, kwargs, store, world_size = pickle.loads(payload)
    os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    try:
        torch.manual_seed(0)
        result = function(*args, **kwargs)
        dist.barrier()
        return result
    finally:
        megatron_muon.uninstall()
        _forget_megatron()
        dist.destroy_process_group()
        gc.collect()  # models hold process groups in cycles, and each group has threads that wake up


def _forget_megatron() -> None:
    """Drop Megatron's process-wide state, so that the next call starts as a new process would."""
    if "megatron.core.parallel_state" in sys.modules:
        from megatron.core import num_microbatches_calculator, parallel_state

        parallel_state.destroy_model_parallel()
        num_microbatches_calculator.unset_num_microbatches_calculator()
    if "megatron.training.global_vars" in sys.modules:
        from megatron.training import global_vars

        global_vars.destroy_global_vars()
