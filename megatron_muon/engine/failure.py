"""What an exception within a step says of where it happened, and how the other ranks learn why they wait in vain.

They hear of it without a message of their own: who fails writes to the store by which the processes have met, and who
fails later, or waits for long, looks there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon.engine.place import Place

_OF_CPU = "DefaultCPUAllocator"
_NO_STORE = RuntimeError, ValueError, AttributeError
"""Its process has ended, this one has left the others, or torch calls it otherwise: none may hide what has failed."""


def explain(place: Place, error: Exception, chunk_mb: float) -> None:
    """Add notes to what is raised within a step, and tell the other ranks of it.

    Args:
        place: where this rank is.
        error: gets notes: rank, phase, chunk, for whom it waits; of memory, what lowers it; what another rank of its
            groups has raised before.
        chunk_mb: value in force of ``--muon-chunk-mb``.
    """
    own = f"rank {_rank()} was in {place}"
    error.add_note(f"Muon: {own}.")
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _OF_CPU in str(error):
        error.add_note(
            f"Muon: out of memory in a chunk of which this rank works on {place.bytes / 2**20:.3g} MiB of matrices (in "
            "float32; up to three chunks are in memory at once). What lowers it: a smaller --muon-chunk-mb, now "
            f"{chunk_mb:g} (a chunk has one matrix at the least); --muon-offload, which keeps state on the host; "
            "--muon-momentum-dtype, which keeps it in fewer bits. python -m megatron_muon plan --memory-gb N says what "
            "each saves in this run, and what fits."
        )
    if first := first_failure(place):
        error.add_note(f"Muon: another rank failed before: {first}")
        return
    with contextlib.suppress(*_NO_STORE):
        for key in _keys(place):
            _store().set(key, f"{own}, {type(error).__name__}: {str(error).partition('\n')[0]}")


def first_failure(place: Place) -> str:
    """What the first rank that failed in this step has said; empty if none has, or the store does not answer."""
    with contextlib.suppress(*_NO_STORE):
        for key in _keys(place):
            if _store().check([key]):
                return str(_store().get(key).decode())
    return ""


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _keys(place: Place) -> Iterator[str]:
    """By which the ranks of each group tell each other of a failure in this step."""
    for group in place.groups:
        yield f"megatron_muon/failed/{group.group_name}/{place.step}"


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
