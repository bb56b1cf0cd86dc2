"""A run as the doctor reads it: tolerant of what is damaged, being written, or of an older version."""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from megatron_muon.monitor.metrics import LOSS
from megatron_muon.monitor.plots import METRICS_FILE

_FRESH = 3
"""First points of a process: their times include compilation."""


@dataclass(slots=True)
class Point:
    """A logged iteration. A number that was not recorded is None; one that is not finite is NaN."""

    iteration: int
    loss: float | None = None
    rate: float | None = None
    norm: float | None = None
    seconds: float = 0.0
    optimizer: float | None = None
    iterations: int = 1
    skipped: int = 0
    memory: float | None = None
    logit: float | None = None
    is_fresh: bool = False


class Series:
    """One number of the measured steps: its least, mean and largest of all matrices or ranks; NaN if not finite."""

    def __init__(self) -> None:
        self._values = array("d")  # iteration, least, mean, largest, and again

    def add(self, iteration: int, value: Any) -> None:
        """One entry of a line: a number, or least, mean and largest."""
        least, mean, largest = value if type(value) is list else (value, value, value)
        try:
            self._values.extend((iteration, least, mean, largest))
        except TypeError:  # null; what came before it has been taken
            del self._values[len(self._values) // 4 * 4 :]
            self._values.extend((iteration, _number(least), _number(mean), _number(largest)))

    @property
    def at(self) -> array[float]:
        """The iterations."""
        return self._values[::4]

    @property
    def mean(self) -> array[float]:
        """Of the matrices or ranks."""
        return self._values[2::4]

    @property
    def largest(self) -> array[float]:
        """Of the matrices or ranks."""
        return self._values[3::4]

    def ends(self, part: str = "mean") -> tuple[float, float]:
        """Median of the finite values of the first third, and of the last."""
        values = [value for value in getattr(self, part) if math.isfinite(value)]
        third = max(1, len(values) // 3)
        return (median(values[:third]), median(values[-third:])) if values else (math.nan, math.nan)

    def since(self) -> int | None:
        """The iteration from which on the mean has not been zero; None if it is zero now."""
        number = max((n for n, value in enumerate(self.mean) if value == 0), default=-1) + 1
        return int(self.at[number]) if number < len(self.at) else None


@dataclass
class Run:
    """All that is known of one run.

    Attributes:
        name: of it.
        age: seconds since something was written.
        starts: the ``start`` lines; those without flags have Megatron's arguments from the text of the same start.
        train: logged iterations, from the record, or from the text of a run without one.
        valid: iteration and loss of evaluations.
        series: class of weights -> name of a number -> its values.
        damaged: numbers of lines that are not records.
        checkpoint: what :mod:`megatron_muon.commands.doctor` reads of the folder; empty without one.
        text_lines: how many lines of text were read.
        warnings: of this package, in the text.
        errors: lines of the text.
        saved: iterations of checkpoints, by the text.
        means: iterations whose printed loss is the mean since a start.
    """

    name: str
    age: float = math.inf
    starts: list[dict[str, Any]] = field(default_factory=list)
    train: list[Point] = field(default_factory=list)
    valid: list[tuple[int, float]] = field(default_factory=list)
    alarms: list[dict[str, Any]] = field(default_factory=list)
    measured: list[int] = field(default_factory=list)
    matrices: dict[str, int] = field(default_factory=dict)
    series: dict[str, dict[str, Series]] = field(default_factory=dict)
    times: dict[str, Series] = field(default_factory=dict)
    rates: dict[str, Series] = field(default_factory=dict)
    damaged: list[int] = field(default_factory=list)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    text_lines: int = 0
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)
    means: list[int] = field(default_factory=list)
    _printed: list[Point] = field(default_factory=list)
    _arguments: list[dict[str, str]] = field(default_factory=list)  # of each start, by the text
    _total: int | None = None
    _exits: bool = False  # by the text, since its last iteration
    _since: int = 0  # lines of iterations since the last start

    @property
    def iteration(self) -> int:
        """The last that is known."""
        return self.train[-1].iteration if self.train else 0

    @property
    def start(self) -> dict[str, Any]:
        """The last."""
        return self.starts[-1] if self.starts else {"flags": self._arguments[-1]} if self._arguments else {}

    @property
    def total(self) -> int | None:
        """How many iterations it is to have."""
        return self.start.get("train_iters", self._total)

    @property
    def state(self) -> str:
        """``finished``, ``running`` or ``stopped``."""
        if self.total is not None and self.iteration + self._interval > self.total:  # no further line was due
            return "finished"
        pace = [point.seconds * point.iterations for point in self.train if not point.is_fresh] or [0.0]
        return "running" if self.age < max(300.0, 20 * median(pace)) else "stopped"

    @property
    def _interval(self) -> int:
        return self.train[-1].iterations if self.train else 1

    @property
    def has_left(self) -> bool:
        """Whether it has ended where Megatron was told to end: by a flag, or by a signal that it waits for."""
        with contextlib.suppress(TypeError, ValueError):  # None, or none
            every = int(self.flags["--exit-interval"]) if "--exit-interval" in self.flags else 0
            if every > 0 and -(-self.iteration // every) * every < self.iteration + self._interval:
                return self.iteration > 0
        return self._exits

    @property
    def flags(self) -> Mapping[str, Any]:
        """Of the last process."""
        return self.start.get("flags") or {}

    @cached_property
    def losses(self) -> list[tuple[int, float]]:
        """Iteration and loss, where that is finite."""
        return [(p.iteration, p.loss) for p in self.train if p.loss is not None and math.isfinite(p.loss)]

    def _take(self, record: dict[str, Any]) -> None:
        kind, iteration = record["kind"], int(record["iteration"])
        if kind == "start":
            self.starts.append(record)
            self._since = 0
        elif kind == "train":
            self._since += 1
            losses = record["losses"]
            name = LOSS if LOSS in losses else next(iter(losses), None)
            point = Point(iteration, None if name is None else _number(losses[name]), record.get("learning_rate"))
            point.norm = record.get("grad_norm")
            point.seconds, point.optimizer = record.get("seconds") or 0.0, record.get("optimizer_seconds")
            point.iterations, point.skipped = record.get("iterations") or 1, record.get("skipped") or 0
            point.memory, point.logit = record.get("peak_memory_bytes"), record.get("max_attention_logit")
            point.is_fresh = self._since <= _FRESH
            self.train.append(point)
        elif kind == "valid" and record["set"].startswith("validation"):
            self.valid.append((iteration, _number(record["losses"].get(LOSS))))
        elif kind == "alarm":
            self.alarms.append(record)
        elif kind == "muon":
            self._take_measured(iteration, record)

    def _take_measured(self, iteration: int, record: dict[str, Any]) -> None:
        self.measured.append(iteration)
        for name, numbers in record.get("classes", {}).items():
            self.matrices[name] = numbers.pop("matrices", 1)
            kept = self.series.setdefault(name, {})
            for stat, value in numbers.items():
                if stat not in kept:
                    kept[stat] = Series()
                kept[stat].add(iteration, value)
        for target in ("times", "rates"):
            for name, value in record.get(target, {}).items():
                getattr(self, target).setdefault(name, Series()).add(iteration, value)
        if record.get("max_attention_logit") is not None:
            self.rates.setdefault("max_attention_logit", Series()).add(iteration, record["max_attention_logit"])


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def read(path: Path, logs: Iterable[Path] = (), now: float | None = None) -> Run:
    """A run from a file of JSON lines, from the text of a run, or from a folder with either.

    Args:
        path: the file or folder.
        logs: further files of text.
        now: the time, in seconds since 1970.

    Raises:
        OSError: if it cannot be read.
        ValueError: if there is nothing of a run in it.
    """
    record = path if path.is_file() else path / METRICS_FILE
    texts = list(logs)
    if path.is_dir():
        texts += [each for each in sorted(path.iterdir()) if each.suffix in (".log", ".out") or each.name == "log"]
        inside = [each.parent.name for each in sorted(path.glob(f"*/{METRICS_FILE}"))]
        if inside and not record.is_file():
            raise ValueError(f"{path}: a folder of runs ({', '.join(inside)}). Give one of them, or two.")
        if not record.is_file() and not texts and not any(path.glob("*/iter_*")) and not any(path.glob("iter_*")):
            raise FileNotFoundError(
                f"{path}: no run here. A run is a folder with {METRICS_FILE}, a log (*.log, *.out) or checkpoints, or "
                "such a file."
            )
    elif not _is_record(path):
        record, texts = path.with_name(METRICS_FILE + ".none"), [path, *texts]
    run = Run(
        path.resolve().name if path.is_dir() else path.resolve().parent.name if path.name == METRICS_FILE else path.stem
    )
    if record.is_file():
        _read_record(run, record)
    for text in texts:
        _read_text(run, text)
    run.train = run.train or run._printed
    for start, flags in zip(run.starts, run._arguments, strict=False):
        if len(run.starts) == len(run._arguments):
            start.setdefault("flags", flags)
    files = [each for each in (record, *texts) if each.is_file()]
    if path.is_file() and not run.starts and not run.train and not run.errors:
        raise ValueError(f"{path}: nothing of a run in it. Give a file of --muon-log-jsonl, or the text of a run.")
    if files:
        run.age = (time.time() if now is None else now) - max(each.stat().st_mtime for each in files)
    return run


def _is_record(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == b"{" or path.suffix == ".jsonl"


def _read_record(run: Run, path: Path) -> None:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                break  # is being written, or was cut off
            try:
                run._take(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                run.damaged.append(number)


_ITERATION = re.compile(r"iteration +(\d+)/ *(\d+) \|(.*)")
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_BEFORE = re.compile(r"(?:\[\w+\]: ?|\d+: |\d{4}-\d\d-\d\d[T ][\d:.,]+(?:Z|[+-][\d:]+)? )*")
"""What launchers put before a line: ``[default0]:``, ``[rank0]: ``, ``0: `` of srun, or the time."""
_FLAG = re.compile(r"^ *(\w+) \.{2,} (.*)$")
_SAVED = re.compile(r"successfully saved checkpoint from iteration +(\d+)")
_ERRORS = re.compile(
    r"megatron_muon: error|^[\w.]*(Error|Exception)\b|out of memory|SIGKILL|exitcode +: -?[1-9]"
    "|Watchdog caught"
)


def _read_text(run: Run, path: Path) -> None:
    run._since = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            run.text_lines += 1
            line = _COLOUR.sub("", line) if "\x1b" in line else line
            before = _BEFORE.match(line)
            rest = line[before.end() :] if before else line
            if found := _ITERATION.search(line):
                run._since += 1
                run._total, run._exits = int(found[2]), False
                run._printed.append(_point(int(found[1]), found[3], run._since))
                _count_iterations(run)
                if run._since == 2:
                    run.means.append(int(found[1]))
            elif "--- arguments ---" in line:
                run._since = 0
                run._arguments.append({})
            elif "exiting program a" in line:  # at iteration, after minutes, after receiving a signal
                run._exits = True
            elif run._arguments and (found := _FLAG.match(rest)):
                run._arguments[-1]["--" + found[1].replace("_", "-")] = found[2].strip()
            elif found := _SAVED.search(line):
                run.saved.append(int(found[1]))
            elif "megatron_muon: WARNING" in line or rest.startswith("WARNING "):
                run.warnings.append(line.strip()[:300])
            elif _ERRORS.search(rest):
                run.errors.append(line.strip()[:300])


def _count_iterations(run: Run) -> None:
    """A printed line does not say how many iterations it is of: as many as are between two of one start."""
    if run._since > 1:
        before, last = run._printed[-2:]
        last.iterations = max(1, last.iteration - before.iteration)
        if run._since == 2:
            before.iterations = max(1, min(last.iterations, before.iteration))


def _point(iteration: int, text: str, since: int) -> Point:
    """One of Megatron's lines; it leaves out a loss that is not finite."""
    cells = {key.strip(): value.strip() for key, _, value in (cell.rpartition(":") for cell in text.split("|"))}

    def of(name: str) -> float | None:
        try:
            return float(cells[name])
        except (KeyError, ValueError):
            return None

    loss = of(LOSS)
    if loss is None and of("number of nan iterations"):
        loss = math.nan
    skipped = int(of("number of skipped iterations") or 0)
    seconds = (of("elapsed time per iteration (ms)") or 0.0) / 1000
    return Point(
        iteration, loss, of("learning rate"), of("grad norm"), seconds, skipped=skipped, is_fresh=since <= _FRESH
    )
