"""What can be wrong with a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_muon.agree import Ranks

SHOWN = 12


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used as asked; the message says why and what to do."""


def raise_together(ranks: Ranks, problems: Iterable[str], title: str, way_out: str = "") -> None:
    """Put the problems of all ranks together, a line each, and raise the same error on all; they must call this.

    Raises:
        CheckpointError: if any rank has a problem.
    """
    found = sorted(set().union(*ranks.gather(lambda: list(problems))))

    def fail() -> None:
        more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        lines = [title, *(f"  {problem}" for problem in [*found[:SHOWN], *more]), way_out]
        raise CheckpointError("\n".join(filter(None, lines)))

    if found:
        ranks.together(fail)


def some(names: Iterable[str]) -> str:
    """Names for a line of a message: the first of them, each once."""
    found = sorted(set(names))
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
