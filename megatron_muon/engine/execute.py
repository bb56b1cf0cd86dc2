"""Carries out a plan, chunk after chunk: pack, exchange, orthogonalize, unpack.

The exchange of the next chunk, and the return of the last one, are under way while a chunk is computed: as asynchronous
collectives, which NCCL runs on a stream of its own. What other data-parallel ranks orthogonalize for this one is
awaited last: they may be at it for as long as this rank is at its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megatron_muon.engine.callbacks import Flops, Read, Solve, Write
from megatron_muon.engine.exchange import Counters, Exchange
from megatron_muon.engine.plan import Plan
from megatron_muon.engine.tasks import TASKS, Run, Task, Wire
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer

__all__ = ["execute", "visit"]


def execute(
    plan: Plan,
    orthogonalizer: Orthogonalizer,
    exchanges: Mapping[str, Exchange],
    wire: Wire,
    local_dtype: torch.dtype,
    counters: Counters,
    read: Read | Sequence[Read],
    write: Write,
    solve: Solve | None = None,
    solve_flops: Flops | None = None,
) -> None:
    """Orthogonalize everything in a plan, or do with it what ``solve`` does.

    Args:
        plan: the same on all ranks of each group.
        orthogonalizer: the iteration.
        exchanges: collectives of each group, by its name.
        wire: dtypes of what is sent.
        local_dtype: in which matrices that are not sent are packed.
        counters: to be increased.
        read: called for each chunk before it is exchanged; with ``solve``, one for each tensor that it wants.
        write: called for each chunk when it is done.
        solve: what to compute of whole matrices; only for plans in which each has an owner.
        solve_flops: what that takes, for the counters.
    """
    reads = (read,) if callable(read) else tuple(read)
    run = Run(plan, orthogonalizer, wire, local_dtype, counters, reads, write, exchanges, solve, solve_flops)
    tasks = (TASKS[chunk.mode](run, chunk) for chunk in plan.chunks)
    late: list[Task] = []
    previous: Task | None = None
    task = next(tasks, None)
    if task is not None:
        task.start()
    while task is not None:
        following = next(tasks, None)
        if following is not None:
            following.start()
        task.compute()
        if previous is not None:
            previous.finish()
        if task.is_late:
            late.append(task)
        previous, task = None if task.is_late else task, following
    if previous is not None:
        previous.finish()
    for task in late:
        task.finish()


def visit(
    plan: Plan,
    orthogonalizer: Orthogonalizer,
    exchanges: Mapping[str, Exchange],
    wire: Wire,
    local_dtype: torch.dtype,
    counters: Counters,
    look: Write,
) -> None:
    """Show all matrices of a plan, chunk after chunk, without orthogonalizing anything.

    Args:
        plan: as of :func:`execute`.
        orthogonalizer: as of :func:`execute`.
        exchanges: as of :func:`execute`.
        wire: as of :func:`execute`.
        local_dtype: of the batches that ``look`` is given. They have shape, dtype and device of those that
            :func:`execute` hands out, but take no memory: they are views of one element, without meaning.
        counters: to be increased by what ``look`` sends.
        look: called for each chunk, on all ranks of its group.
    """
    run = Run(plan, orthogonalizer, wire, local_dtype, counters, (), look, exchanges)
    for chunk in plan.chunks:
        task = TASKS[chunk.mode](run, chunk)
        task.unpack(task.blanks(local_dtype))
