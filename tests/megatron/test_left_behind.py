"""What a run of the launcher leaves on the machine, no process and no file, whatever ends it; and on the screen."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.launch import FLAGS, ROOT, SCRIPT, records, train

MARK = "MEGATRON_MUON_TEST_RUN"
TIMEOUT = 180
GRACE_S = 20


class Launched:
    """A run on two CPU ranks, all of whose processes can be found."""

    def __init__(self, folder: Path, script: Path, flags: str) -> None:
        self.mark = uuid.uuid4().hex
        self.checkpoint = folder / "checkpoint"
        # Short: paths of sockets may have about 100 characters.
        self._temporary = tempfile.TemporaryDirectory(prefix="left-", dir="/tmp")
        self.temporary = Path(self._temporary.name)
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
            env={**os.environ, MARK: self.mark, "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def close(self) -> None:
        """Delete the folder for temporary files, which are looked at before."""
        self._temporary.cleanup()

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


@contextlib.contextmanager
def launching(folder: Path, script: Path, flags: str) -> Iterator[Launched]:
    run = Launched(folder, script, flags)
    try:
        yield run
    finally:
        for process in run.left():
            process.kill()
        run.process.wait()
        run.close()


@pytest.fixture
def launched(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Launched]:
    with launching(tmp_path, *request.param) as run:
        yield run


FAILS_LATER = Path(__file__).parent / "scripts" / "fails_later.py"
FOR_LONG = "--train-iters 100000"
BACKGROUND = "--async-save --async-strategy mcore"
WORKER = f"{BACKGROUND} --use-persistent-ckpt-worker"
"""Another process for each rank, which lives as long as the run."""


@pytest.mark.parametrize(
    "flags", ["", *(pytest.param(flags, marks=pytest.mark.slow) for flags in (BACKGROUND, WORKER))]
)
def test_a_run_that_saves(tmp_path: Path, flags: str) -> None:
    """In new interpreters, in which the launcher comes before Megatron; the losses are those of forked ranks."""
    training, log = "--train-iters 3 --tensor-model-parallel-size 2", tmp_path / "torchrun.jsonl"
    with launching(tmp_path, SCRIPT, f"{training} --muon-log-jsonl {log} {flags}") as run:
        output = run.end()
        assert run.process.returncode == 0, output[-4000:]
        assert "successfully saved checkpoint from iteration       2" in output
        left = [path.name.partition("_")[0] for path in run.temporary.iterdir()]
        assert set(left) <= {"torchelastic", "torchinductor"}  # an empty folder of torchrun's, and torch's cache
    if not flags:  # what upstream says of asynchronous saving is for who asks for it
        assert_no_noise(output)
        losses = [point["losses"]["lm loss"] for point in records(log)]
        assert len(losses) == 3 and losses == train(*training.split(), log=tmp_path / "forked.jsonl")


def assert_no_noise(output: str) -> None:
    """Nothing about what a machine without GPUs lacks, and the table once."""
    lines = [line for line in output.splitlines() if not re.match("  [a-z0-9_]+ [.]* ", line)]  # of the arguments
    assert [line for line in lines if re.search("warn|deprecat|not installed|CUDA runtime", line, re.I)] == [
        "WARNING:megatron.core.datasets.gpt_dataset:Unable to save MockGPTDataset indexes because path_to_cache is None"
    ] * 3
    tables = [number for number, line in enumerate(lines) if line.startswith("megatron_muon 0")]
    assert len(tables) == 1 and lines[tables[0] + 1].split()[:3] == ["weight", "count", "parameters"]
    assert len([line for line in lines if line.startswith("decoder.layers.*.mlp.linear_fc1.weight")]) == 1


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


@pytest.mark.slow
@pytest.mark.parametrize("launched", [(SCRIPT, f"{FOR_LONG} {WORKER}")], indirect=True)
def test_a_rank_that_is_killed(launched: Launched) -> None:
    """The other rank ends, and the processes that write the checkpoints of both."""
    launched.wait_for_a_checkpoint()
    launched.ranks()[1].kill()
    launched.end()
    assert launched.process.returncode == 1
