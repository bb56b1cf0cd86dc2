"""Ranks for a measurement, started by the command itself.

They meet through a file, so that no port has to be free. Nothing waits for ever: collectives have a time-out, silence
has a limit, and after the failure of one rank the others are ended; so are all if the command itself is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_muon.benchmark.accuracy import WrongUpdateError
from megatron_muon.benchmark.cases import Case
from megatron_muon.benchmark.measure import Settings, measure
from megatron_muon.benchmark.ranks import World, joined
from megatron_muon.errors import ConfigError

__all__ = ["RanksError", "launch", "start_ranks"]

SILENCE_S = 1200
"""After which ranks that report nothing count as hanging: twice the time-out of collectives."""

GRACE_S = 10
POLL_S = 0.05

_JOB, _STORE, _DONE, _ALIVE = "job", "store", "done", "alive"


class RanksError(RuntimeError):
    """A rank failed; the message tells which and why."""


@dataclass(frozen=True)
class _Job:
    """What the ranks are to do."""

    cases: tuple[Case, ...]
    settings: Settings
    device: str


def launch(
    ranks: int, cases: Sequence[Case], settings: Settings, device: str, done: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Measure cases on ranks of their own.

    Args:
        ranks: how many processes to start.
        cases: that take so many.
        settings: of the measurement.
        device: ``cpu`` or ``cuda``.
        done: is called with each entry of the document as it comes.

    Returns:
        all entries.

    Raises:
        RanksError: if a rank fails or none reports for :data:`SILENCE_S`.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        (folder / _JOB).write_bytes(pickle.dumps(_Job(tuple(cases), settings, device)))
        found: list[dict[str, Any]] = []

        def watch() -> None:
            for path in _new(folder, len(found)):
                found.append(json.loads(path.read_text()))
                done(found[-1])

        start_ranks([sys.executable, "-m", __name__, name], ranks, folder, watch)
        watch()
        return found


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
        return (folder / _ALIVE).stat().st_mtime
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


def _new(folder: Path, known: int) -> list[Path]:
    """Results that have come since, in order."""
    found = sorted(folder.glob(f"{_DONE}-*.json"))
    return found[known:]


def _leave_with_parent() -> None:
    """End this process when the one that started it is gone."""

    def wait() -> None:
        while os.read(0, 1):  # not sys.stdin: its lock would be held when this process ends
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _rank(folder: Path) -> None:
    """Body of one rank."""
    _leave_with_parent()
    rank = os.environ["RANK"]
    job: _Job = pickle.loads((folder / _JOB).read_bytes())
    number = 0

    def done(entry: dict[str, Any]) -> None:
        nonlocal number
        if rank == "0":
            unfinished = folder / "unfinished"
            unfinished.write_text(json.dumps(entry))
            unfinished.rename(folder / f"{_DONE}-{number:04}.json")
        number += 1

    try:
        with joined(job.device, job.settings.threads, str(folder / _STORE)) as world:
            measure(job.cases, job.settings, _Reporting(**vars(world), folder=folder), done)
    except (ConfigError, WrongUpdateError) as error:  # all ranks raise these alike
        (folder / f"failed-{rank}").write_text(str(error))
        raise SystemExit(1) from None
    except Exception as error:
        (folder / f"failed-{rank}").write_text(f"rank {rank}: {type(error).__name__}: {error}")
        raise


@dataclass(frozen=True)
class _Reporting(World):
    """Ranks whose first tells the command that it is alive."""

    folder: Path

    def barrier(self) -> None:
        """See :class:`World`; every step passes here."""
        if self.rank == 0:
            (self.folder / _ALIVE).touch()
        super().barrier()


if __name__ == "__main__":
    _rank(Path(sys.argv[1]))
