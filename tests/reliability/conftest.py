"""What holds after every fault: no process is left."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Iterator

import psutil
import pytest

from tests.pool import RankPool

LIMIT_S = 10
"""In which what a rank has started is to end when the rank has."""
_HELPERS = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")
_PR_SET_CHILD_SUBREAPER = 36


def _left(pool: RankPool, before: set[psutil.Process]) -> list[psutil.Process]:
    """What the test has started and what runs on: children of ranks that are gone, too, which are ours then."""
    this, found = psutil.Process(), []
    ranks = {process.pid for process, _ in pool._workers}
    for process in set(this.children(recursive=True)) - before:
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = process.ppid()
            is_helper = any(name in " ".join(process.cmdline()) for name in _HELPERS)
            is_over = process.status() == psutil.STATUS_ZOMBIE
            if not (is_over or process.pid in ranks or (is_helper and parent in {this.pid, *ranks})):
                found.append(process)
    return found


@pytest.fixture(autouse=True)
def no_process_is_left(pool: RankPool) -> Iterator[None]:
    """Whatever the ranks of a test have started has ended with them."""
    before = set(psutil.Process().children(recursive=True))
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
        deadline = time.monotonic() + LIMIT_S
        while (left := _left(pool, before)) and time.monotonic() < deadline:
            time.sleep(0.1)
        told = [" ".join(process.cmdline())[:200] for process in left if process.is_running()]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        assert not told, f"processes are left: {told}"
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
