"""Runs that are made once: trained, kept as JSON under a name that follows from their setting, read again later."""

from __future__ import annotations

import hashlib
import io
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tools.results import arithmetic, corpus
from tools.results.model import Setting, Training

FORMAT = 2
"""Raised when the same setting would give another record."""

LAST = 10
"""The training loss of a run is the mean of so many last steps."""

GROWTH = 2
"""Rates that a sweep adds beyond its grid, one at a time, while the best one is at the end."""

DIVERGED = 5.0
"""A loss so far above that of the first step ends a run."""

Watch = Callable[[Training, dict[str, Any]], None]
"""Called after each step; adds to the extra values of the record."""


class AlarmError(Exception):
    """A run that is to be healthy has raised an alarm. The message has the setting, and the words of the alarm."""


@dataclass(frozen=True)
class Record:
    """What a run gave.

    Attributes:
        valid_loss: at the end; infinity if the run diverged.
        train_loss: mean of the last steps; likewise.
        losses: of every step.
        seconds: of a step, the median.
        optimizer_seconds: of it in the optimizer.
        extra: what the run's watch found.
        alarms: what was said of the work of its optimizer.
    """

    valid_loss: float
    train_loss: float
    losses: list[float]
    seconds: float
    optimizer_seconds: float
    extra: dict[str, Any]
    alarms: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Context:
    """How the experiments of a command run.

    Attributes:
        runs: folder of the records.
        seeds: how many seeds each sweep has, from :attr:`seed` on.
        seed: the first one.
        steps: of each training; None for the experiment's own number.
        quick: whether to try everything with sizes that show nothing.
        fresh: whether to make runs again that have a record.
        alarms: in every so many-th step Muon's work is measured; 0: never. An alarm ends the command, unless it is of
            a rate that is not the best of its sweep: the ends of a sweep are there to be too high.
    """

    runs: Path
    seeds: int = 1
    seed: int = 1234
    steps: int | None = None
    quick: bool = False
    fresh: bool = False
    alarms: int = 0

    def setting(self, steps: int, **values: Any) -> Setting:
        """A setting with the number of steps, the seed and the sizes of this command."""
        if self.quick:
            values |= {"batch": 2, "length": 32, "valid_batches": 1}
            steps = 3
        interval = 0 if values.get("optimizer") == "adam" else self.alarms
        return Setting(steps=self.steps or steps, seed=self.seed, alarm_interval=interval, **values)

    def record(self, setting: Setting, watch: Watch | None = None) -> Record:
        """The record of a run, which is made if there is none."""
        name = watch.__name__ if watch else ""
        content = self.cached({"setting": asdict(setting), "watch": name}, lambda: asdict(train(setting, watch)))
        values = {**content, **{key: _number(content[key]) for key in ("valid_loss", "train_loss")}}
        return Record(**values)

    def cached(self, inputs: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``make`` returned for these inputs, now or earlier."""
        path = self._made(inputs, ".json", lambda: json.dumps({"inputs": inputs, "result": to_json(make())}).encode())
        return json.loads(path.read_text())["result"]

    def kept(self, inputs: dict[str, Any], make: Callable[[], Any]) -> Any:
        """The same of tensors, in lists and dictionaries."""

        def stored() -> bytes:
            file = io.BytesIO()
            torch.save(make(), file)
            return file.getvalue()

        return torch.load(self._made(inputs, ".pt", stored))

    def _made(self, inputs: dict[str, Any], suffix: str, make: Callable[[], bytes]) -> Path:
        key = json.dumps({"format": FORMAT, **inputs}, sort_keys=True)
        path = self.runs / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}{suffix}"
        if not path.exists() or self.fresh:
            content = make()
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_bytes(content)
            partial.replace(path)
        return path

    def records(self, setting: Setting, watch: Watch | None = None) -> list[Record]:
        """The records of a setting, one for each seed.

        Raises:
            AlarmError: if one has an alarm.
        """
        found = self._records(setting, watch)
        be_healthy(setting, [alarm for each in found for alarm in each.alarms])
        return found

    def _records(self, setting: Setting, watch: Watch | None) -> list[Record]:
        return [self.record(replace(setting, seed=self.seed + number), watch) for number in range(self.seeds)]

    def sweep(self, setting: Setting, rates: Sequence[float], watch: Watch | None = None) -> Sweep:
        """Records by learning rate. While the best rate is at the end of the grid, the grid grows.

        Raises:
            AlarmError: if a run of the best rate has an alarm.
        """
        found = {rate: self._records(replace(setting, rate=rate), watch) for rate in rates}
        for _ in range(0 if self.quick else GROWTH):
            sweep = Sweep(found)
            side = arithmetic.is_at_end(sweep.losses)
            if side == 0:
                break
            rate = max(found) * 2 if side > 0 else min(found) / 2
            found[rate] = self._records(replace(setting, rate=rate), watch)
        result = Sweep(dict(sorted(found.items())))
        best = result.records[result.best]
        be_healthy(replace(setting, rate=result.best), [alarm for each in best for alarm in each.alarms])
        return result


@dataclass(frozen=True)
class Sweep:
    """Records of all seeds by learning rate."""

    records: dict[float, list[Record]]

    @property
    def losses(self) -> dict[float, float]:
        """Validation loss by learning rate, the mean over the seeds."""
        return {rate: _mean([each.valid_loss for each in found]) for rate, found in self.records.items()}

    @property
    def train_losses(self) -> dict[float, float]:
        """Training loss, likewise."""
        return {rate: _mean([each.train_loss for each in found]) for rate, found in self.records.items()}

    @property
    def best(self) -> float:
        """The rate of the grid with the lowest validation loss."""
        return arithmetic.best(self.losses)

    @property
    def best_loss(self) -> float:
        """The lowest validation loss."""
        return self.losses[self.best]

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the validation loss between the seeds, at the best rate; None if there is one seed."""
        losses = [each.valid_loss for each in self.records[self.best]]
        return statistics.stdev(losses) if len(losses) > 1 else None

    @property
    def seconds(self) -> float:
        """Of a step, the median of all runs."""
        return statistics.median(each.seconds for found in self.records.values() for each in found)

    @property
    def optimizer_seconds(self) -> float:
        """Of a step in the optimizer, likewise."""
        return statistics.median(each.optimizer_seconds for found in self.records.values() for each in found)

    def as_json(self) -> dict[str, Any]:
        """For the file of numbers."""
        return {
            "valid_loss": {f"{rate:.6g}": [each.valid_loss for each in found] for rate, found in self.records.items()},
            "train_loss": {f"{rate:.6g}": [each.train_loss for each in found] for rate, found in self.records.items()},
            "best_rate": self.best,
            "deviation_between_seeds": self.deviation,
            "interpolated_rate": arithmetic.interpolated(self.losses),
            "seconds_per_step": self.seconds,
            "optimizer_seconds_per_step": self.optimizer_seconds,
        }


def train(setting: Setting, watch: Watch | None = None) -> Record:
    """Make a run, and say on standard error how it went."""
    begin = time.perf_counter()
    training = Training(setting, corpus.load())
    losses: list[float] = []
    seconds: list[float] = []
    optimizer: list[float] = []
    extra: dict[str, Any] = {}
    for _ in range(setting.steps):
        before = time.perf_counter()
        losses.append(training.advance())
        seconds.append(time.perf_counter() - before)
        optimizer.append(training.optimizer_seconds)
        if not math.isfinite(losses[-1]) or losses[-1] > losses[0] + DIVERGED:
            break
        if watch is not None:
            watch(training, extra)
    finished = len(losses) == setting.steps
    valid = _number(training.validate()) if finished else math.inf
    result = Record(
        valid_loss=valid,
        train_loss=_mean(losses[-LAST:]) if math.isfinite(valid) else math.inf,
        losses=[round(loss, 5) for loss in losses],
        # The first step makes what later ones find there.
        seconds=statistics.median(seconds[1:] or seconds),
        optimizer_seconds=statistics.median(optimizer[1:] or optimizer),
        extra=extra,
        alarms=training.alarms,
    )
    for alarm in result.alarms:
        print(f"{describe(setting)}: {alarm}", file=sys.stderr)
    print(
        f"{describe(setting)}: validation loss {valid:.4f}, {1000 * result.seconds:.0f} ms a step "
        f"({1000 * result.optimizer_seconds:.0f} in the optimizer), {time.perf_counter() - begin:.0f} s",
        file=sys.stderr,
        flush=True,
    )
    return result


def be_healthy(setting: Setting, alarms: Sequence[str]) -> None:
    """Raise :class:`AlarmError` if a setting's runs have any."""
    if alarms:
        raise AlarmError(f"{describe(setting)}: {alarms[0]}")


def describe(setting: Setting) -> str:
    """A setting in a few words."""
    options = " ".join(f"{name.removeprefix('muon_')}={value}" for name, value in setting.options.items())
    words = [f"{setting.optimizer} {setting.width}x{setting.layers} rate {setting.rate:.4g}", options]
    return " ".join(filter(None, [*words, f"seed {setting.seed}"]))


def to_json(value: Any) -> Any:
    """The same with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: to_json(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None) -> float:
    return math.inf if value is None or not math.isfinite(value) else value


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
