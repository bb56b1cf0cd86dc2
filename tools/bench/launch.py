"""A measurement on ranks that the command starts itself; they meet through a file, so that no port has to be free."""

from __future__ import annotations

import json
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_muon.errors import ConfigError
from tools.bench.accuracy import WrongUpdateError
from tools.bench.cases import Case
from tools.bench.measure import Settings, measure
from tools.bench.ranks import World, joined
from tools.bench.start import ALIVE, leave_with_parent, start_ranks

__all__ = ["launch"]

_JOB, _STORE, _DONE = "job", "store", "done"


@dataclass(frozen=True)
class _Job:
    """What the ranks are to do."""

    cases: tuple[Case, ...]
    settings: Settings
    device: str


def launch(
    ranks: int, cases: Sequence[Case], settings: Settings, device: str, done: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Measure cases on ranks of their own.

    Args:
        ranks: how many processes to start.
        cases: that take so many.
        settings: of the measurement.
        device: ``cpu`` or ``cuda``.
        done: is called with each entry of the document as it comes.

    Returns:
        all entries.

    Raises:
        RanksError: if a rank fails, or none reports for long.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        (folder / _JOB).write_bytes(pickle.dumps(_Job(tuple(cases), settings, device)))
        found: list[dict[str, Any]] = []

        def watch() -> None:
            for path in _new(folder, len(found)):
                found.append(json.loads(path.read_text()))
                done(found[-1])

        start_ranks([sys.executable, "-m", __name__, name], ranks, folder, watch)
        watch()
        return found


def _new(folder: Path, known: int) -> list[Path]:
    """Results that have come since, in order."""
    found = sorted(folder.glob(f"{_DONE}-*.json"))
    return found[known:]


def _rank(folder: Path) -> None:
    """Body of one rank."""
    leave_with_parent()
    rank = os.environ["RANK"]
    job: _Job = pickle.loads((folder / _JOB).read_bytes())
    number = 0

    def done(entry: dict[str, Any]) -> None:
        nonlocal number
        if rank == "0":
            unfinished = folder / "unfinished"
            unfinished.write_text(json.dumps(entry))
            unfinished.rename(folder / f"{_DONE}-{number:04}.json")
        number += 1

    try:
        with joined(job.device, job.settings.threads, str(folder / _STORE)) as world:
            measure(job.cases, job.settings, _Reporting(**vars(world), folder=folder), done)
    except (ConfigError, WrongUpdateError) as error:  # all ranks raise these alike
        (folder / f"failed-{rank}").write_text(str(error))
        raise SystemExit(1) from None
    except Exception as error:
        (folder / f"failed-{rank}").write_text(f"rank {rank}: {type(error).__name__}: {error}")
        raise


@dataclass(frozen=True)
class _Reporting(World):
    """Ranks whose first tells the command that it is alive."""

    folder: Path

    def barrier(self) -> None:
        """See :class:`World`; every step passes here."""
        if self.rank == 0:
            (self.folder / ALIVE).touch()
        super().barrier()


if __name__ == "__main__":
    _rank(Path(sys.argv[1]))
