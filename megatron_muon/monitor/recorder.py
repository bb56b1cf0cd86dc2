"""Record a Megatron training run as JSON lines, whatever its optimizer: ``--muon-log-jsonl FILE``.

The hooks in :mod:`megatron_muon.plugin.recording` feed a :class:`Recorder`. It writes a file of lines such as::

    {"kind": "start", "iteration": 0, "train_iters": 300, "world_size": 2, "device": "cpu"}
    {"kind": "train", "iteration": 1, "iterations": 1, "losses": {"lm loss": 7.65}, "learning_rate": 2e-05, ...}
    {"kind": "valid", "iteration": 20, "set": "validation", "losses": {"lm loss": 6.31}}

* ``train`` lines come when Megatron logs (``--log-interval``, and after the first iteration of each start); their
  losses and times are averages over the ``iterations`` since the line before. ``seconds`` is the time of one iteration
  without evaluations and checkpoints, ``optimizer_seconds`` its part in the optimizer step (gradient norm and clipping
  included).
* ``muon`` and ``alarm`` lines tell of Muon's steps, see :mod:`megatron_muon.monitor.schema`, which also says what a
  ``start`` line has.
* ``valid`` lines come with each evaluation, also of the test set (``"set": "test"``).
* On resume, lines of iterations after the checkpoint, which are about to be done again, are removed.

The rank that writes is the one that prints Megatron's log: the last one, which has the loss. Values stay on the device
until Megatron itself has waited for it (its log line does), so nothing here makes the host wait once more; the
optimizer is timed with CUDA events on a GPU and with the host's clock elsewhere.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_muon.monitor.metrics import rewrite_until

if TYPE_CHECKING:
    import torch

__all__ = ["Recorder", "Stopwatch"]

# torch is imported where it is used: this module is read by `megatron_muon.install()` and the command line's --help,
# which do without.


class Recorder:
    """Collects the scalars of one process and appends them to a file.

    Attributes:
        stopwatch: measures the optimizer step.

    Args:
        path: the file; folders are made.
        iteration: the iteration that training starts from. Lines of later iterations are removed.
        header: further entries of the ``start`` line.
        beside: another model's lines are in the file, which count for themselves: nothing is removed.
    """

    def __init__(self, path: str | Path, iteration: int, header: dict[str, Any], *, beside: bool = False) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not beside:
            rewrite_until(self.path, iteration)
        self.stopwatch = Stopwatch()
        self._start_interval()
        self._interval_before = 0.0
        self._is_open = True
        self._append("start", iteration, **header)

    def _start_interval(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._advanced = 0
        self._skipped = 0

    def add(self, losses: dict[str, torch.Tensor], skipped: bool) -> None:
        """Take note of one iteration, without waiting for the device.

        Args:
            losses: by name, scalars on the device; those of skipped iterations do not count.
            skipped: whether the optimizer left the weights alone (overflow).
        """
        if skipped:
            self._skipped += 1
            return
        self._advanced += 1
        for name, value in losses.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def log(self, iteration: int, interval: float, interval_restarts: bool, **scalars: Any) -> None:
        """Write the averages since the last call. The device must have been waited for.

        Args:
            iteration: the last one that counts.
            interval: seconds that Megatron's interval timer shows.
            interval_restarts: whether that timer is set to zero after this.
            **scalars: written as they are (numbers, or numbers by name); None where there is no value.
        """
        iterations = self._advanced + self._skipped
        self.write(
            "train",
            iteration,
            iterations=iterations,
            losses={name: value.item() / self._advanced for name, value in self._sums.items()},
            skipped=self._skipped,
            seconds=(interval - self._interval_before) / max(1, iterations),
            optimizer_seconds=self.stopwatch.take() / max(1, iterations),
            **scalars,
        )
        self._interval_before = 0.0 if interval_restarts else interval
        self._start_interval()

    def write(self, kind: str, iteration: int, **values: Any) -> None:
        """Append one line. If that fails, the run goes on without a record: other ranks are in the next iteration."""
        try:
            if self._is_open:
                self._append(kind, iteration, **values)
        except OSError as error:
            self._is_open = False
            print(f"megatron_muon: WARNING --muon-log-jsonl {self.path}: {error}; nothing more is recorded", flush=True)

    def _append(self, kind: str, iteration: int, **values: Any) -> None:
        """The file is opened for each line, so that a killed process loses at most the line it is at."""
        line = json.dumps(_finite({"kind": kind, "iteration": iteration, **values}))
        with self.path.open("a") as file:
            file.write(line + "\n")


class Stopwatch:
    """Adds up the time between :meth:`start` and :meth:`stop` without making the host wait for the device."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._started = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        """Begin an interval."""
        import torch

        if torch.cuda.is_initialized():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            self._events.append((begin, end))
        else:
            self._started = time.perf_counter()

    def stop(self) -> None:
        """End the interval."""
        import torch

        if torch.cuda.is_initialized():
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._started

    def take(self) -> float:
        """Seconds since the last call. On a GPU, call it when the device has been waited for."""
        seconds = self._seconds + sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        self._seconds = 0.0
        self._events.clear()
        return seconds


def _finite(value: Any) -> Any:
    """The value with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
