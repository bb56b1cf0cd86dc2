"""Who tells of a refusal: one rank, in one message without a traceback, whatever has started the script."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType

from megatron_muon.agree import ranks_with
from megatron_muon.checkpoint.errors import CheckpointError
from megatron_muon.errors import ConfigError

REFUSALS = (ConfigError, CheckpointError)
"""Errors that say what is wrong and what to do: the lines of code that lead to them say nothing more."""


def tell(error: BaseException) -> None:
    """Print an error that ends this process, if no other rank does."""
    seconds = _seconds_before_telling(error)
    if seconds is not None:
        time.sleep(seconds)
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" on rank {rank}"
        print(f"megatron_muon: error{where}: {error}", file=sys.stderr, flush=True)


def _seconds_before_telling(error: BaseException) -> float | None:
    """When this rank prints an error, so that it is seen once; None if another rank prints it.

    Of ranks that have agreed on it, the first does. Otherwise nobody knows who else has it: rank 0 prints at once, then
    the first rank of each machine, then the others. By then torchrun has ended them, unless it was theirs alone.
    """
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    if rank != min(ranks_with(error), default=rank):
        return None
    if rank == 0:
        return 0.0
    return 2.0 if local_rank == 0 else 4.0


class _Telling:
    """In the place of ``sys.excepthook``, which Python calls for an error that nobody has caught.

    torch.distributed puts one of its own around it. So it stays where it is, and does nothing when it is off.
    """

    def __init__(self) -> None:
        self._is_on = False
        self._previous: Callable[..., object] | None = None

    def turn(self, on: bool) -> None:
        """Whether refusals are told by one rank; all other errors are as ever."""
        self._is_on = on
        if on and self._previous is None:
            self._previous, sys.excepthook = sys.excepthook, self._hook

    def _hook(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if self._is_on and isinstance(error, REFUSALS):
            tell(error)
        else:
            (self._previous or sys.__excepthook__)(kind, error, trace)


TELLING = _Telling()
