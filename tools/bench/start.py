"""Processes that are the ranks of a measurement: started, watched, and ended.

Nothing waits for ever: silence has a limit, and after the failure of one rank the others are ended; so are all if the
command itself is killed. Only the standard library is imported here.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["ALIVE", "RanksError", "leave_with_parent", "start_ranks"]

SILENCE_S = 1200
"""After which ranks that report nothing count as hanging: twice the time-out of collectives."""

GRACE_S = 10
POLL_S = 0.05

ALIVE = "alive"
"""File that ranks touch as a sign of life."""


class RanksError(RuntimeError):
    """A rank failed; the message tells which and why."""


def start_ranks(
    command: Sequence[str], ranks: int, folder: Path, watch: Callable[[], None], silence_s: float = SILENCE_S
) -> None:
    """Run a command on every rank until all have ended.

    Args:
        command: the same for all; the environment tells them apart, as a launcher's does.
        ranks: how many.
        folder: a file ``alive`` that they touch is a sign of life; a file ``failed-RANK`` tells why one failed.
        watch: is called often.
        silence_s: how long to wait for a sign of life.

    Raises:
        RanksError: if one fails or all are silent.
    """
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            mine = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            variables = {**os.environ, **{key: str(value) for key, value in mine.items()}}
            # Their standard input ends when this process does, and they with it.
            processes.append(subprocess.Popen(command, env=variables, stdin=subprocess.PIPE))
        _wait(processes, folder, watch, silence_s)
    finally:
        _end(processes)


def _wait(
    processes: Sequence[subprocess.Popen[bytes]], folder: Path, watch: Callable[[], None], silence_s: float
) -> None:
    begin = time.time()
    while True:
        codes = [process.poll() for process in processes]
        watch()
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            raise RanksError(_reason(folder, failed, codes))
        if all(code == 0 for code in codes):
            return
        if time.time() - max(begin, _last_sign(folder)) > silence_s:
            raise RanksError(f"{len(processes)} ranks have reported nothing for {silence_s:.0f} s: they hang")
        time.sleep(POLL_S)


def _last_sign(folder: Path) -> float:
    """When the ranks were last seen alive."""
    try:
        return (folder / ALIVE).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _reason(folder: Path, failed: Sequence[int], codes: Sequence[int | None]) -> str:
    """What the first rank that failed wrote; others fail because it did."""
    deadline = time.time() + GRACE_S / 5
    while time.time() < deadline:
        notes = sorted(folder.glob("failed-*"), key=lambda path: path.stat().st_mtime_ns)
        if notes:
            return notes[0].read_text()
        time.sleep(POLL_S)
    return f"rank {failed[0]} of {len(codes)} ended with code {codes[failed[0]]}; its messages are above"


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait a little for those that are leaving, then end the others."""
    clean = all(process.poll() == 0 for process in processes)
    for process in processes:
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
    deadline = time.time() + (0 if clean else GRACE_S)
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.time()))
        if process.poll() is None:
            process.kill()
            process.wait()


def leave_with_parent() -> None:
    """End this process when the one that started it is gone."""

    def wait() -> None:
        while os.read(0, 1):  # not sys.stdin: its lock would be held when this process ends
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
