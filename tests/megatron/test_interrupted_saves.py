"""``kill -9`` while a run saves: what is left is never taken for more than it is, and the run goes on, bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "scripts" / "interrupted_saves.py"


def trials(folder: Path, number: int, seed: int, *flags: str, limit: float) -> dict[str, Any]:
    """Run the script; its report."""
    line = [sys.executable, str(SCRIPT), str(folder), str(number), str(seed), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(line, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    try:
        output, _ = process.communicate(timeout=limit)
    finally:  # its runs, and what they have started, are in its session
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, output[-6000:]
    return json.loads((folder / "report.json").read_text())


def check(report: dict[str, Any], number: int) -> None:
    """The uninterrupted run's losses, every one, from runs of which each but the last was killed."""
    assert len(report["straight"]) == report["iterations"]
    assert report["killed"] == report["straight"]
    assert len(report["resumed"]) == number + 1
    assert report["resumed"][-1] > 0


@pytest.mark.slow
def test_killed_while_saving(tmp_path: Path) -> None:
    report = trials(tmp_path, 4, 1, limit=180)
    check(report, 4)
    assert report["hits"] >= 1


LAYER_WISE = "--use-distributed-optimizer --bf16"
OVERLAP = f"{LAYER_WISE} --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 4096"
ASYNC = "--async-save --use-persistent-ckpt-worker --async-strategy mcore"
RUNS = {
    "plain": "",
    "layer_wise": LAYER_WISE,
    "overlap": OVERLAP,
    "background": ASYNC,
    "overlap_background": f"{OVERLAP} {ASYNC}",
}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_killed_twenty_times_while_saving(tmp_path: Path, run: str) -> None:
    """With overlap in several buckets, and with a process that writes behind the run and ends with it."""
    report = trials(tmp_path, 20, 2, *RUNS[run].split(), limit=600)
    print(f"{report['hits']} of 20 kills hit a save; a save takes {report['typical_save_s']:.3f} s")
    check(report, 20)
    assert report["hits"] >= 3
