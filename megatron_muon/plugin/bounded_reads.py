"""What a rank reads of a checkpoint of ours takes the memory of its own state, and a piece of bounded size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from megatron_muon._patching import Original, Patches

__all__ = ["PATCHES", "in_pieces"]

PATCHES = Patches()

_IN_PIECES: ContextVar[bool] = ContextVar("megatron_muon_reads_in_pieces", default=False)


@contextlib.contextmanager
def in_pieces() -> Iterator[None]:
    """Readers that are made within it read large parts in pieces."""
    token = _IN_PIECES.set(True)
    try:
        yield
    finally:
        _IN_PIECES.reset(token)


@PATCHES.around(
    "megatron.core.dist_checkpointing.strategies.torch:_get_filesystem_reader",
    "torch's reader makes a whole stored part for each rank that needs some rows of it",
)
def _with_pieces(original: Original, *args: Any, **kwargs: Any) -> Any:
    found = original(*args, **kwargs)
    if _IN_PIECES.get():
        from megatron_muon.checkpoint.pieces import read_in_pieces

        read_in_pieces(found)
    return found
