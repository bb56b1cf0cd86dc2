"""Record a Megatron training run as JSON lines, whatever its optimizer: ``--muon-log-jsonl FILE``.

The hooks in :func:`patches` are put around functions of ``megatron.training``. They write a file of lines such as::

    {"kind": "start", "iteration": 0, "train_iters": 300, "world_size": 2, "device": "cpu"}
    {"kind": "train", "iteration": 1, "iterations": 1, "losses": {"lm loss": 7.65}, "learning_rate": 2e-05, ...}
    {"kind": "valid", "iteration": 20, "set": "validation", "losses": {"lm loss": 6.31}}

* ``train`` lines come when Megatron logs (``--log-interval``, and after the first iteration of each start); their
  losses and times are averages over the ``iterations`` since the line before. ``seconds`` is the time of one iteration
  without evaluations and checkpoints, ``optimizer_seconds`` its part in the optimizer step (gradient norm and clipping
  included).
* ``valid`` lines come with each evaluation, also of the test set (``"set": "test"``).
* On resume, lines of iterations after the checkpoint, which are about to be done again, are removed.

The rank that writes is the one that prints Megatron's log: the last one, which has the loss. Values stay on the device
until Megatron itself has waited for it (its log line does), so nothing here makes the host wait once more; the
optimizer is timed with CUDA events on a GPU and with the host's clock elsewhere.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_muon._patching import Patch
from megatron_muon.monitor.metrics import rewrite_until

if TYPE_CHECKING:
    import torch

__all__ = ["Recorder", "Stopwatch", "patches"]

# torch is imported where it is used: this module is read by `megatron_muon.install()` and the command line's --help,
# which do without.


class Recorder:
    """Collects the scalars of one process and appends them to a file.

    Args:
        path: the file; folders are made.
        iteration: the iteration that training starts from. Lines of later iterations are removed.
        header: further entries of the ``start`` line.
    """

    def __init__(self, path: str | Path, iteration: int, header: dict[str, Any]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rewrite_until(self.path, iteration)
        self._stopwatch = Stopwatch()
        self._start_interval()
        self._interval_before = 0.0
        self.write("start", iteration, **header)

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

    def log(self, iteration: int, interval: float, interval_restarts: bool, **scalars: float | int | None) -> None:
        """Write the averages since the last call. The device must have been waited for.

        Args:
            iteration: the last one that counts.
            interval: seconds that Megatron's interval timer shows.
            interval_restarts: whether that timer is set to zero after this.
            **scalars: written as they are; None where there is no value.
        """
        iterations = self._advanced + self._skipped
        self.write(
            "train",
            iteration,
            iterations=iterations,
            losses={name: value.item() / self._advanced for name, value in self._sums.items()},
            skipped=self._skipped,
            seconds=(interval - self._interval_before) / max(1, iterations),
            optimizer_seconds=self._stopwatch.take() / max(1, iterations),
            **scalars,
        )
        self._interval_before = 0.0 if interval_restarts else interval
        self._start_interval()

    def write(self, kind: str, iteration: int, **values: Any) -> None:
        """Append one line. The file is opened for each, so that a killed process loses at most the line it is at."""
        line = json.dumps(_finite({"kind": kind, "iteration": iteration, **values}))
        with self.path.open("a") as file:
            file.write(line + "\n")

    @property
    def stopwatch(self) -> Stopwatch:
        """Measures the optimizer step."""
        return self._stopwatch


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


class _TimedTimer:
    """Megatron's timer of the optimizer step, and a stopwatch that runs with it."""

    def __init__(self, timer: Any, stopwatch: Stopwatch) -> None:
        self._timer = timer
        self._stopwatch = stopwatch

    def start(self, *args: Any, **kwargs: Any) -> None:
        self._timer.start(*args, **kwargs)
        self._stopwatch.start()

    def stop(self, *args: Any, **kwargs: Any) -> None:
        self._stopwatch.stop()
        self._timer.stop(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._timer, name)


class _Hooks:
    """The functions around Megatron's. One object for all, as they share the recorder and the evaluation's context."""

    def __init__(self) -> None:
        self.recorder: Recorder | None = None
        self.evaluated: list[dict[str, torch.Tensor]] = []

    def around_train(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def train(*args: Any, **kwargs: Any) -> Any:
            self.recorder = _recorder()
            return original(*args, **kwargs)

        return train

    def around_training_log(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def training_log(*args: Any, **kwargs: Any) -> Any:
            recorder = self.recorder
            if recorder is None:
                return original(*args, **kwargs)
            values = signature.bind(*args, **kwargs).arguments
            recorder.add(values["loss_dict"], bool(values["skipped_iter"]))
            iteration, is_first = values["iteration"], values.get("is_first_iteration", False)
            if iteration % _megatron_args().log_interval and not is_first:
                return original(*args, **kwargs)
            # Megatron is about to read this timer in the same way, with the same wait for the device.
            interval = _megatron_timers()("interval-time").elapsed(reset=False)
            result = original(*args, **kwargs)
            recorder.log(
                iteration,
                interval,
                interval_restarts=not is_first,
                learning_rate=values["learning_rate"],
                grad_norm=values["grad_norm"],
                consumed_samples=_megatron_args().consumed_train_samples,
                peak_memory_bytes=_peak_memory(),
            )
            return result

        return training_log

    def around_evaluate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self.recorder is not None and result[0]:
                self.evaluated.append(result[0])
            return result

        return evaluate

    def around_evaluate_and_print_results(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def evaluate_and_print_results(*args: Any, **kwargs: Any) -> Any:
            self.evaluated.clear()
            result = original(*args, **kwargs)
            if self.recorder is not None:
                values = signature.bind(*args, **kwargs).arguments
                for name, losses in zip(self._set_names(values["prefix"]), self.evaluated, strict=False):
                    # Megatron has printed these numbers, so they are on the host's side already.
                    scalars = {key: value.item() for key, value in losses.items()}
                    self.recorder.write("valid", values["iteration"], set=name, losses=scalars)
            return result

        return evaluate_and_print_results

    def _set_names(self, prefix: str) -> list[str]:
        kind = "test" if prefix.endswith("test set") else "validation"
        if not _megatron_args().multiple_validation_sets:
            return [kind]
        names = _megatron_args().validation_set_names or range(len(self.evaluated))
        return [f"{kind}-{name}" for name in names]

    def around_timers(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(timers: Any, name: str, *args: Any, **kwargs: Any) -> Any:
            timer = original(timers, name, *args, **kwargs)
            if name != "optimizer" or self.recorder is None:
                return timer
            return _TimedTimer(timer, self.recorder.stopwatch)

        return call


def patches() -> list[Patch]:
    """The hooks that record a run of ``megatron.training.pretrain`` when ``--muon-log-jsonl`` names a file.

    Only the last rank writes, so on a cluster the file is on its machine.
    """
    hooks = _Hooks()
    training = "megatron.training.training"
    return [
        Patch(f"{training}:train", hooks.around_train, "the file is begun, or cut to the resumed iteration"),
        Patch(f"{training}:training_log", hooks.around_training_log, "losses and times of logged iterations"),
        Patch(f"{training}:evaluate", hooks.around_evaluate, "the losses of an evaluation"),
        Patch(
            f"{training}:evaluate_and_print_results",
            hooks.around_evaluate_and_print_results,
            "the iteration and data set of an evaluation",
        ),
        Patch("megatron.core.timers:Timers.__call__", hooks.around_timers, "the time of the optimizer step"),
    ]


def _megatron_args() -> Any:
    return sys.modules["megatron.training.global_vars"].get_args()


def _megatron_timers() -> Any:
    return sys.modules["megatron.training.global_vars"].get_timers()


def _recorder() -> Recorder | None:
    """What records the training that begins, or None on ranks that do not write and without the flag."""
    import torch

    args = _megatron_args()
    last_rank = torch.distributed.get_world_size() - 1
    if not args.muon_log_jsonl or torch.distributed.get_rank() != last_rank:
        return None
    return Recorder(
        args.muon_log_jsonl,
        args.iteration,
        {
            "train_iters": args.train_iters,
            "world_size": args.world_size,
            "device": "cuda" if torch.cuda.is_initialized() else "cpu",
        },
    )


def _peak_memory() -> int:
    """Bytes: allocated on the GPU, or of the process where there is none."""
    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _finite(value: Any) -> Any:
    """The value with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
