"""Megatron scripts, unedited, through the launcher: under ``torchrun``, or quicker in ranks that have imported all.

``torchrun`` starts three interpreters for two ranks, and each imports torch and Megatron for seconds. :func:`launch`
runs the same command line in new processes that are forked from one that has imported them (:mod:`tests.preload`), with
the variables and the store that ``torchrun`` gives: for tests of what a run prints, writes and computes. What only new
interpreters can show (the order of imports, how a process ends) is for :func:`torchrun`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "pretrain_gpt.py"
FLAGS = (
    "--num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --seq-length 32 --max-position-embeddings 32 --position-embedding-type rope "
    "--normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights "
    "--micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --min-lr 1e-4 --lr-decay-iters 6 --lr-decay-style cosine "
    "--eval-iters 1 --eval-interval 100 --log-interval 1 --mock-data --tokenizer-type NullTokenizer --vocab-size 127 "
    "--attention-dropout 0 --hidden-dropout 0 --num-workers 0"
)
TIMEOUT = 240
GRACE_S = 5
"""That the others have when one has failed; they may wait for it in a collective."""

Result = subprocess.CompletedProcess[str]


def torchrun(*arguments: str, ranks: int = 2) -> Result:
    """``torchrun ... -m megatron_muon run`` on CPU ranks."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    line = [*start, "-m", "megatron_muon", "run", "--device", "cpu", *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(line, cwd=ROOT, **pipes)
    try:
        output, errors = process.communicate(timeout=TIMEOUT)
    finally:  # after a time-out torchrun and its ranks, which are in sessions of their own
        if process.poll() is None:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.kill()
            process.wait()
    return subprocess.CompletedProcess(line, process.returncode, output, errors)


def launch(*arguments: str, ranks: int = 2) -> Result:
    """``python -m megatron_muon run --device cpu ARGUMENTS`` on ranks that are forked.

    Returns:
        the greatest exit status, and the output of all ranks, that of rank 0 first.
    """
    from torch.distributed import TCPStore

    line = ["run", "--device", "cpu", *arguments]
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    # As torchrun's agent does, which holds the store of its ranks.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        places = [(Path(folder) / f"{rank}.out", Path(folder) / f"{rank}.err") for rank in range(ranks)]
        for place in places:
            for path in place:
                path.touch()
        processes = [
            context.Process(target=_run, args=(line, rank, ranks, store.port, place))
            for rank, place in enumerate(places)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        output, errors = (
            "".join(place[kind].read_text() for place in places if place[kind].exists()) for kind in (0, 1)
        )
    status = max(abs(process.exitcode) for process in processes)
    return subprocess.CompletedProcess(line, status, output, errors)


def _wait(processes: list[Any]) -> None:
    """Until all have ended, or one has failed, or the time is over."""
    deadline = time.monotonic() + TIMEOUT
    pending = {process.sentinel: process for process in processes}
    while pending and time.monotonic() < deadline:
        for sentinel in wait(list(pending), timeout=max(0.0, deadline - time.monotonic())):
            process = pending.pop(sentinel)  # type: ignore[call-overload]
            process.join()
            if process.exitcode != 0:
                deadline = min(deadline, time.monotonic() + GRACE_S)


def _run(line: list[str], rank: int, ranks: int, port: int, places: tuple[Path, Path]) -> None:
    """Body of one rank: the command line, with an end as Python gives it to a program."""
    import torch

    from megatron_muon import cli

    for number, place in enumerate(places, 1):
        os.dup2(os.open(place, os.O_WRONLY), number)
    torch.set_num_threads(1)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    os.environ.update(MASTER_ADDR="localhost", TORCHELASTIC_USE_AGENT_STORE="True")
    status = 0
    try:
        cli.main(line)
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def check(result: Result) -> str:
    """The output of a run that has ended well."""
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def records(log: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of a kind of a log of ``--muon-log-jsonl``; training steps, unless others are asked for."""
    return [line for line in map(json.loads, log.read_text().splitlines()) if line["kind"] == kind]


def train(*flags: str, log: Path, script: Path = SCRIPT, run: Any = launch) -> list[float]:
    """Train with the flags of this module and ``flags``; the training losses of the log."""
    check(run(str(script), *FLAGS.split(), "--optimizer", "muon", "--muon-log-jsonl", str(log), *flags))
    return [point["losses"]["lm loss"] for point in records(log)]
