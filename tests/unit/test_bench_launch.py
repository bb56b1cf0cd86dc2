"""The benchmark's own ranks: started, ended, and never waited for without a limit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.bench import start as starting
from tools.bench.start import RanksError, start_ranks


def start(folder: Path, body: str, ranks: int = 2, silence_s: float = 60) -> None:
    """Ranks that run some lines of Python."""
    code = "import os, pathlib, sys, time\nrank, folder = int(os.environ['RANK']), pathlib.Path(sys.argv[1])\n" + body
    start_ranks([sys.executable, "-c", code, str(folder)], ranks, folder, lambda: None, silence_s)


def test_ranks_know_themselves(tmp_path: Path) -> None:
    start(tmp_path, "(folder / str(rank)).write_text(os.environ['WORLD_SIZE'] + os.environ['LOCAL_RANK'])")
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["20", "21"]


def test_failure_of_one_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "GRACE_S", 1)
    body = """
(folder / f"pid-{rank}").write_text(str(os.getpid()))
if rank == 1:
    (folder / "failed-1").write_text("rank 1: out of paper")
    sys.exit(3)
time.sleep(600)
"""
    begin = time.monotonic()
    with pytest.raises(RanksError, match="rank 1: out of paper"):
        start(tmp_path, body)
    assert time.monotonic() - begin < 60
    assert not _alive(int((tmp_path / "pid-0").read_text()))


def test_failure_without_a_word(tmp_path: Path) -> None:
    with pytest.raises(RanksError, match="rank 0 of 1 ended with code 7"):
        start(tmp_path, "os._exit(7)", ranks=1)


def test_silence_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "GRACE_S", 1)
    with pytest.raises(RanksError, match="2 ranks have reported nothing for 1 s"):
        start(tmp_path, "time.sleep(600)", silence_s=1)


def test_ranks_leave_with_the_command(tmp_path: Path) -> None:
    """Killed outright, it cannot end them: they notice."""
    rank = (
        "import os, pathlib, sys, time; from tools.bench.start import leave_with_parent; "
        "leave_with_parent(); pathlib.Path(sys.argv[1], 'pid').write_text(str(os.getpid())); time.sleep(600)"
    )
    command = (
        "import pathlib, sys; from tools.bench.start import start_ranks; "
        f"start_ranks([sys.executable, '-c', {rank!r}, sys.argv[1]], 1, pathlib.Path(sys.argv[1]), lambda: None)"
    )
    parent = subprocess.Popen([sys.executable, "-c", command, str(tmp_path)], cwd=Path(__file__).parents[2])
    note = tmp_path / "pid"
    try:
        assert _within(120, lambda: note.exists() and bool(note.read_text()))
        child = int(note.read_text())
        assert _alive(child)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert _within(20, lambda: not _alive(child))


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def _alive(process: int) -> bool:
    """Whether it runs; one that has ended and that nobody has waited for yet does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    with contextlib.suppress(OSError):
        os.kill(process, 0)
        return not Path("/proc/self").exists()
    return False
