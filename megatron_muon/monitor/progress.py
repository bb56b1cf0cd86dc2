"""A progress bar of a run that records JSON lines, fed from the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from megatron_muon.monitor.metrics import LOSS

__all__ = ["ProgressBar"]


class ProgressBar:
    """Shows the iteration, the losses and the time left of a run, from the file of its recorder.

    Use it as a context and call :meth:`poll` now and then.

    Args:
        path: file of ``--muon-log-jsonl``; it need not exist yet.
        total: number of iterations of the run.
        description: shown before the bar.
    """

    def __init__(self, path: str | Path, total: int, description: str) -> None:
        self._path = Path(path)
        self._position = 0
        self._identity: int | None = None
        self._losses: dict[str, str] = {}
        self._bar = tqdm(total=total, desc=description, unit="step", dynamic_ncols=True, mininterval=0, miniters=0)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def poll(self) -> None:
        """Read what was written since the last call, and redraw if that is anything."""
        changed = False
        for record in self._new_records():
            changed = True
            self._show(record)
        if changed:
            self._bar.set_postfix(self._losses, refresh=True)

    def write(self, text: str) -> None:
        """Print lines above the bar."""
        self._bar.write(text)

    def _show(self, record: dict[str, Any]) -> None:
        if record["kind"] == "start":
            # A resumed run begins where it was; the time left must not count the steps of an earlier process.
            self._bar.initial = self._bar.n = record["iteration"]
            self._bar.unpause()
            return
        if record["kind"] not in ("train", "valid"):
            return
        loss = record["losses"].get(LOSS)
        self._losses["train" if record["kind"] == "train" else record["set"]] = "nan" if loss is None else f"{loss:.3f}"
        if record["kind"] == "train":
            self._bar.n = record["iteration"]

    def _new_records(self) -> list[dict[str, Any]]:
        """Complete lines after the position, from the beginning of a new file."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            # The recorder replaces the file by a shorter one when a run resumes.
            identity = os.fstat(file.fileno()).st_ino
            if identity != self._identity:
                self._identity, self._position = identity, 0
            file.seek(self._position)
            complete, end, _ = file.read().rpartition(b"\n")
        self._position += len(complete) + len(end)
        return [json.loads(line) for line in complete.splitlines()]
