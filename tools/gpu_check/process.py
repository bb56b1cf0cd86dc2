"""The processes of a part: started, watched, ended with all that they have started, and started again after a fault.

Only the standard library is imported here.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.gpu_check.report import FAILED, UNFINISHED, environment, repository

START = "(start)"
"""Name of the item that stands for a part whose items are not known: it did not get so far."""

POLL_S = 0.05
GRACE_S = 5.0
MARGIN_S = 4.0
"""The child is told to begin nothing so long before it would be ended."""


@dataclass
class PartRun:
    """A part that runs within some seconds.

    Attributes:
        module: that has its ``items``.
        device: ``cpu`` or ``cuda``.
        seconds: that it may take.
        by_budget: whether it is the whole command's time that ends then, not the part's own.
        patience: factor on the limits of items.
        log: gets what its processes print.
        found: is called with the name and the result of each item, as they come.
    """

    module: str
    device: str
    seconds: float
    by_budget: bool
    patience: float
    log: Path
    found: Callable[[str, dict[str, Any]], None]
    done: list[str] = field(default_factory=list)
    later: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def run(self, done: Sequence[str], later: Sequence[str] = ()) -> None:
        """Run the items that are not done, some after all others; each, whatever happens, gets a result."""
        self.done, self.later = list(done), list(later)
        deadline = time.time() + self.seconds
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
            folder = Path(name)
            while True:
                known = len(self.done)
                code, late = self._once(folder, deadline)
                left = [each for each in self.names if each not in self.done]
                if not self.names and START not in self.done:
                    reason = f"its process ended with {_code(code)} before its first item"
                    self._end(START, self._late() if late else _failed(f"{reason}: {self._tail()}"))
                if late or not left or len(self.done) == known:
                    break
        for each in left:
            why = "no time was left" if late else f"its process ended with {_code(code)} before: {self._tail()}"
            self._end(each, {"state": UNFINISHED if late else FAILED, "reason": why})

    def _end(self, item: str, result: dict[str, Any]) -> None:
        self.done.append(item)
        self.found(item, result)

    def _late(self, seconds: float = math.inf) -> dict[str, Any]:
        """Of what was under way for so long: it has failed if it took most of the part's time, not what came last."""
        if self.by_budget or seconds < self.seconds / 2:
            return {"state": UNFINISHED, "reason": "no time was left"}
        return _failed(f"the part was still at it after its {self.seconds:.0f} s")

    def _once(self, folder: Path, deadline: float) -> tuple[int | None, bool]:
        """One process: its exit code, and whether the time was over."""
        job, lines = folder / "job.json", folder / "lines"
        lines.write_text("")
        content = {"module": self.module, "device": self.device, "deadline": deadline - MARGIN_S}
        content |= {"folder": str(folder), "done": self.done, "later": self.later, "lines": str(lines)}
        job.write_text(json.dumps(content))
        with self.log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tools.gpu_check.child", str(job)],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment(),
                cwd=repository(),
                start_new_session=True,
            )
        reader, late = _Lines(lines, self.patience), False
        try:
            while (code := process.poll()) is None:
                self._take(reader)
                late = time.time() > deadline
                if late or reader.is_over_limit:
                    break
                time.sleep(POLL_S)
        finally:
            end_all(process)
        self._take(reader)
        if reader.current:
            if code is None and late:
                result = self._late(reader.elapsed)
            elif code is None:
                result = _failed(f"still at it after its {reader.limit:.0f} s: {self._tail()}")
            else:
                result = _failed(f"its process ended with {_code(code)}: {self._tail()}")
            self._end(reader.current, result)
        return code, late

    def _take(self, reader: _Lines) -> None:
        for event in reader.new():
            if event["event"] == "items":
                self.names = event["names"]
            elif event["event"] == "end":
                self._end(event["item"], event["result"])

    def _tail(self) -> str:
        text = self.log.read_text(errors="replace").strip().splitlines()
        return " | ".join(text[-6:])[-1500:]


class _Lines:
    """Events that a child has written since they were last asked for.

    Attributes:
        current: the item that it is at; empty between items.
        limit: seconds of it.
    """

    def __init__(self, path: Path, patience: float) -> None:
        self._path, self._patience, self._place, self._begin = path, patience, 0, 0.0
        self.current, self.limit = "", 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the item was begun."""
        return time.time() - self._begin

    @property
    def is_over_limit(self) -> bool:
        """Whether the item takes longer than it may."""
        return bool(self.current) and self.elapsed > self.limit

    def new(self) -> list[dict[str, Any]]:
        """Whole lines, as objects."""
        with self._path.open("rb") as file:
            file.seek(self._place)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._place += len(whole)
        events = [json.loads(line) for line in whole.splitlines()]
        for event in events:
            if event["event"] == "begin":
                self.current, self.limit, self._begin = event["item"], self._patience * event["limit"], time.time()
            elif event["event"] == "end":
                self.current = ""
        return events


def _failed(reason: str) -> dict[str, Any]:
    return {"state": FAILED, "reason": reason}


def _code(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {-code} ({signal.Signals(-code).name})"
    return f"code {code}"


def end_all(process: subprocess.Popen[bytes]) -> None:
    """End a process, if it is still there, and everything that it has started: asked first, then killed."""
    others = {} if process.poll() is not None else _descendants(process.pid)
    if process.poll() is None:
        _signal(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # it leads a session of its own
    for each, start in others.items():
        if _is_same(each, start):
            _signal(each, signal.SIGKILL)
    process.wait()


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _descendants(pid: int) -> dict[int, str]:
    """Processes below one, with the time when each was started; nothing where the system does not tell."""
    parents: dict[int, tuple[int, str]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = path.read_text().rpartition(")")[2].split()
            parents[int(path.parent.name)] = int(fields[1]), fields[19]
    found, wanted = {}, [pid]
    while wanted:
        parent = wanted.pop()
        for child, (its, start) in parents.items():
            if its == parent and child not in found:
                found[child] = start
                wanted.append(child)
    return found


def _is_same(pid: int, start: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19] == start
    except (OSError, IndexError):
        return False
