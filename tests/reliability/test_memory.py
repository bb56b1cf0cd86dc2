"""Memory that does not suffice in the middle of a step: the rank says what lowers it, and the others hear of it."""

from __future__ import annotations

import contextlib
import io
import resource
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megatron_muon import Muon
from megatron_muon.engine import watcher
from tests.launch import launch
from tests.pool import RankPool
from tests.reliability.steps import Fault, step_of

LIMIT = 3.0
SCRIPT = str(Path(__file__).with_name("steps.py"))


def ends() -> tuple[list[str], str, float]:
    """The notes of what ends a step on this rank, what is printed meanwhile, and its seconds."""
    step, printed = step_of("owner", LIMIT, Fault("memory", 0.0)), io.StringIO()
    dist.barrier()
    start = time.monotonic()
    with (
        patch.object(watcher, "_ASK", 0.3),
        contextlib.redirect_stderr(printed),
        pytest.raises(RuntimeError) as failure,
    ):
        step()
    found = [*failure.value.__notes__], printed.getvalue(), time.monotonic() - start
    dist.barrier()
    return found


def test_a_rank_out_of_memory_says_what_lowers_it_and_the_others_hear_of_it(pool: RankPool) -> None:
    """Its process lives on here, so that no connection ends: the others give up when their time is over."""
    first, second, third = pool.run(ends, 3)
    notes, printed, seconds = second
    assert notes[0].startswith("Muon: rank 1 was in phase pack of chunk 2 of 3 (mode owner") and seconds < LIMIT
    for word in (
        "--muon-chunk-mb, now 0.001",
        "--muon-offload",
        "--muon-momentum-dtype",
        "plan --memory-gb N",
        "0.00586 MiB",
    ):
        assert word in notes[1]
    assert notes[2].startswith("Muon: the step had begun, 9 of 9 weights are not done") and not printed
    said = "rank 1 was in phase pack of chunk 2 of 3"
    for notes, printed, seconds in (first, third):
        assert seconds < 2 * LIMIT
        assert notes[1].startswith(f"Muon: another rank failed before: {said}") and "can't allocate memory" in notes[1]
        assert f"another rank has failed in the step: {said}" in printed and printed.count("\n") == 1


def test_processes_end_at_once_when_one_has_no_memory() -> None:
    """Long before their group gives up, with its reason in the log of each."""
    start = time.monotonic()
    result = launch(SCRIPT, "owner", "memory", "600", ranks=3)
    assert result.returncode != 0 and time.monotonic() - start < 200, result.stderr
    assert result.stderr.count("Muon: another rank failed before: rank 1 was in phase pack of chunk 2 of 3") == 2


def within(megabytes: int) -> list[str]:
    """A step of 64 MiB in a process that may take a little more than it has."""
    param = torch.nn.Parameter(torch.zeros(4096, 4096))
    param.grad = torch.zeros_like(param)
    optimizer = Muon([param], ns_dtype="fp32")
    optimizer.prepare()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), hard))
    try:
        with pytest.raises(RuntimeError, match="can't allocate memory") as failure:
            optimizer.step()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    return [*failure.value.__notes__]


def test_a_process_with_a_limit(pool: RankPool) -> None:
    """Momentum fits beside the weight; the first batch does not."""
    ((where, lower, *_),) = pool.run(within, 1, 96)
    assert (
        where.startswith("Muon: rank 0 was in phase ")
        and "chunk 1 of 1 (mode local; matrices: 1 of 4096 x 4096)" in where
    )
    assert "64 MiB of matrices" in lower and "--muon-chunk-mb, now 4 " in lower
