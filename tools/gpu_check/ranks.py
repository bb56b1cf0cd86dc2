"""Ranks as processes of their own, all on one GPU (gloo) or on one each (NCCL): a function is called on every rank."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tools.bench.start import leave_with_parent, start_ranks
from tools.gpu_check.report import environment

TIMEOUT_S = 60
"""After which a rank that waits for another gives up."""


def call_on_ranks(
    function: Callable[..., Any], ranks: int, device: str, backend: str, folder: Path, *arguments: Any
) -> list[Any]:
    """Call a function on each of some ranks.

    Args:
        function: at the top of a module; what it takes and returns can be written as JSON.
        ranks: how many.
        device: ``cpu`` or ``cuda``.
        backend: of the process group.
        folder: for files.
        *arguments: of the function.

    Returns:
        what it returned, by rank.

    Raises:
        RanksError: if one fails, with its message.
    """
    own = Path(mkdtemp(prefix="call-", dir=folder))
    job = {"module": function.__module__, "function": function.__name__, "arguments": arguments}
    (own / "job.json").write_text(json.dumps(job | {"device": device, "backend": backend}))
    with mock.patch.dict(os.environ, environment()):
        start_ranks([sys.executable, "-m", __name__, str(own)], ranks, own, lambda: None, 2 * TIMEOUT_S)
    return [json.loads((own / f"result-{rank}.json").read_text()) for rank in range(ranks)]


@contextlib.contextmanager
def _joined(job: dict[str, Any], folder: Path) -> Iterator[None]:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if job["device"] == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    else:
        torch.set_num_threads(1)
    limit = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group(job["backend"], f"file://{folder / 'store'}", limit, size, rank)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _main(folder: Path) -> int:
    leave_with_parent()
    rank, job = os.environ["RANK"], json.loads((folder / "job.json").read_text())
    try:
        from megatron_muon import cpu

        with cpu.enabled() if job["device"] == "cpu" else nullcontext(), _joined(job, folder):
            result = getattr(import_module(job["module"]), job["function"])(*job["arguments"])
            (folder / f"result-{rank}.json").write_text(json.dumps(result))
            dist.barrier()
    except Exception as error:
        traceback.print_exc()
        where = traceback.format_exc().strip().splitlines()[-5:-1]
        (folder / f"failed-{rank}").write_text(f"rank {rank}: {type(error).__name__}: {error} {' '.join(where)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1])))
