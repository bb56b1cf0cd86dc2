"""What a run of the launcher leaves on the machine: no process and no file, whatever ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.megatron.test_launcher import FLAGS, ROOT, SCRIPT

MARK = "MEGATRON_MUON_TEST_RUN"
WORKER = "--async-save --use-persistent-ckpt-worker --async-strategy mcore"
"""Another process for each rank, which lives as long as the run."""
TIMEOUT = 60
GRACE_S = 20


class Launched:
    """A run on two CPU ranks, all of whose processes can be found."""

    def __init__(self, folder: Path, script: Path, flags: str) -> None:
        self.mark = uuid.uuid4().hex
        self.checkpoint = folder / "checkpoint"
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        save = ["--save", str(self.checkpoint), "--save-interval", "2", "--optimizer", "muon"]
        self.process = subprocess.Popen(
            [
                *start,
                "-m",
                "megatron_muon",
                "run",
                "--device",
                "cpu",
                str(script),
                *FLAGS.split(),
                *save,
                *flags.split(),
            ],
            cwd=ROOT,
            env={**os.environ, MARK: self.mark, "TMPDIR": str(self.temporary)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_for_a_checkpoint(self) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not (self.checkpoint / "latest_checkpointed_iteration.txt").exists():
            assert self.process.poll() is None, self.process.communicate()[0][-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def ranks(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def left(self) -> list[psutil.Process]:
        """All processes of the run, those whose parent has ended too."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark:
                    found.append(process)
            except psutil.Error:  # it has just ended, or belongs to another user
                continue
        return found

    def end(self) -> str:
        """Wait for the end of the launcher and of all others; the output."""
        output, _ = self.process.communicate(timeout=TIMEOUT)
        deadline = time.monotonic() + GRACE_S
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, [" ".join(process.cmdline()) for process in left]
        return output


@pytest.fixture
def launched(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Launched]:
    script, flags = request.param
    run = Launched(tmp_path, script, flags)
    yield run
    for process in run.left():
        process.kill()
    run.process.wait()


slow = pytest.mark.slow
FAILS_LATER = Path(__file__).parent / "scripts" / "fails_later.py"
FOR_LONG = "--train-iters 100000"


@pytest.mark.parametrize(
    "launched",
    [
        (SCRIPT, "--train-iters 2"),
        pytest.param((SCRIPT, f"--train-iters 2 {WORKER}"), marks=slow),
        pytest.param((SCRIPT, "--train-iters 2 --async-save --async-strategy mcore"), marks=slow),
    ],
    indirect=True,
)
def test_a_run_that_saves(launched: Launched) -> None:
    output = launched.end()
    assert launched.process.returncode == 0, output[-4000:]
    assert "successfully saved checkpoint from iteration       2" in output
    left = [path.name.partition("_")[0] for path in launched.temporary.iterdir()]
    assert sorted(left) == ["torchelastic", "torchinductor"]  # an empty folder of torchrun's, and torch's cache


@pytest.mark.slow
@pytest.mark.parametrize("launched", [(FAILS_LATER, f"{FOR_LONG} {WORKER}")], indirect=True)
def test_a_run_that_fails(launched: Launched) -> None:
    output = launched.end()
    assert launched.process.returncode == 1 and "RuntimeError: fails later" in output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("launched", [(SCRIPT, f"{FOR_LONG} {WORKER}")], indirect=True)
def test_a_launcher_that_is_stopped(launched: Launched, number: signal.Signals) -> None:
    launched.wait_for_a_checkpoint()
    launched.process.send_signal(number)
    launched.end()


@pytest.mark.parametrize("launched", [(SCRIPT, f"{FOR_LONG} {WORKER}")], indirect=True)
def test_a_rank_that_is_killed(launched: Launched) -> None:
    """The other rank ends, and the processes that write the checkpoints of both."""
    launched.wait_for_a_checkpoint()
    launched.ranks()[1].kill()
    launched.end()
    assert launched.process.returncode == 1
