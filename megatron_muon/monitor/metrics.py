"""Read the JSON lines that ``monitor.recorder`` writes, and put a run, or one against another, into numbers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["LOSS", "WINDOW", "Metrics", "Summary", "TrainPoint", "parse_lines", "read", "rewrite_until"]
__all__ += ["smoothed", "steps_to_reach", "summarize"]

LOSS = "lm loss"
"""Megatron's name for the language-model loss."""

WINDOW = 20
"""Number of recorded points in the trailing mean of the training loss."""


@dataclass(frozen=True)
class TrainPoint:
    """What was recorded after one logged iteration.

    Attributes:
        iteration: number of iterations done.
        loss: mean loss since the previous point, in nats per token; None if it was not finite.
        learning_rate: in force, or None.
        grad_norm: global, before clipping, or None.
        seconds: time of one iteration.
        optimizer_seconds: its part in the optimizer step.
        after_start: whether it is among the first points of a process, whose times include compilation.
        max_attention_logit: the largest of the model since the previous point, or None if it was not measured.
        heads_clipped: how many times QK-clip has clipped a head since then, or None.
    """

    iteration: int
    loss: float | None
    learning_rate: float | None
    grad_norm: float | None
    seconds: float
    optimizer_seconds: float
    after_start: bool
    max_attention_logit: float | None = None
    heads_clipped: int | None = None


@dataclass
class Metrics:
    """One run.

    Attributes:
        train_iters: number of iterations it is to have, or None if that was not recorded.
        train: points in order of iteration.
        valid: validation loss by iteration; of several evaluations at one iteration the last, of several validation
            sets the first.
        starts: the ``start`` lines, as they are (:mod:`megatron_muon.monitor.schema`).
        muon: the ``muon`` lines, likewise.
        alarms: the ``alarm`` lines, likewise.
    """

    train_iters: int | None = None
    train: list[TrainPoint] = field(default_factory=list)
    valid: dict[int, float | None] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    muon: list[dict[str, Any]] = field(default_factory=list)
    alarms: list[dict[str, Any]] = field(default_factory=list)

    @property
    def iteration(self) -> int:
        """The last recorded training iteration, 0 if there is none."""
        return self.train[-1].iteration if self.train else 0


_WARM_UP_POINTS = 3


def parse_lines(lines: list[str], source: str) -> Iterator[dict[str, Any]]:
    """The records of complete lines, with their line ends. A last line that was cut off is left out.

    Raises:
        ValueError: if a line other than the last is not a JSON object.
    """
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "kind" not in record:
                raise ValueError("no JSON object with a kind")
        except ValueError as error:
            if number == len(lines):
                return
            raise ValueError(
                f"{source}, line {number}: not a record of a run ({error}). Remove the line, or record to another file."
            ) from None
        if number == len(lines) and not line.endswith("\n"):
            return
        yield record


def _records(path: Path) -> list[dict[str, Any]]:
    with path.open() as file:
        return list(parse_lines(file.readlines(), str(path)))


def read(path: str | Path) -> Metrics:
    """Read a file of ``--muon-log-jsonl``, also while it is being written.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged in the middle.
    """
    metrics = Metrics()
    since_start = 0
    validation_set = None
    for record in _records(Path(path)):
        if record["kind"] == "start":
            metrics.starts.append(record)
            metrics.train_iters = record["train_iters"]
            since_start = 0
        elif record["kind"] == "train":
            since_start += 1
            metrics.train.append(
                TrainPoint(
                    iteration=record["iteration"],
                    loss=record["losses"].get(LOSS),
                    learning_rate=record["learning_rate"],
                    grad_norm=record["grad_norm"],
                    seconds=record["seconds"],
                    optimizer_seconds=record["optimizer_seconds"],
                    after_start=since_start <= _WARM_UP_POINTS,
                    max_attention_logit=record.get("max_attention_logit"),
                    heads_clipped=record.get("heads_clipped"),
                )
            )
        elif record["kind"] == "valid" and record["set"].startswith("validation"):
            validation_set = validation_set or record["set"]
            if record["set"] == validation_set:
                metrics.valid[record["iteration"]] = record["losses"].get(LOSS)
        elif record["kind"] == "muon":
            metrics.muon.append(record)
        elif record["kind"] == "alarm":
            metrics.alarms.append(record)
    return metrics


def rewrite_until(path: Path, iteration: int) -> None:
    """Remove the records of later iterations, and a last line that was cut off. Does nothing without a file.

    The new file takes the place of the old one at once, so an interruption leaves one or the other.
    """
    if not path.exists():
        return
    kept = [record for record in _records(path) if record["iteration"] <= iteration]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
    partial.replace(path)


@dataclass(frozen=True)
class Summary:
    """One run in numbers.

    Attributes:
        steps: number of iterations done.
        final_train_loss: mean training loss of the last :data:`WINDOW` points, in nats per token.
        final_valid_loss: loss of the last evaluation, or None without one.
        seconds_per_step: median time of an iteration, without evaluations, checkpoints and the first iterations of each
            process (which compile).
        optimizer_seconds_per_step: median of the part in the optimizer step.
        optimizer_share: the ratio of the two.
    """

    steps: int
    final_train_loss: float | None
    final_valid_loss: float | None
    seconds_per_step: float
    optimizer_seconds_per_step: float
    optimizer_share: float


def smoothed(metrics: Metrics, window: int = WINDOW) -> list[tuple[int, float]]:
    """Iteration and trailing mean of the training loss, over ``window`` points or as many as there are.

    Points whose loss was not finite are left out.
    """
    points = [(point.iteration, point.loss) for point in metrics.train if point.loss is not None]
    losses = [loss for _, loss in points]
    return [(step, statistics.fmean(losses[max(0, i + 1 - window) : i + 1])) for i, (step, _) in enumerate(points)]


def summarize(metrics: Metrics) -> Summary:
    """The numbers of one run.

    Raises:
        ValueError: if no training iteration was recorded.
    """
    if not metrics.train:
        raise ValueError("no training iteration was recorded")
    timed = [point for point in metrics.train if not point.after_start] or metrics.train
    seconds = statistics.median(point.seconds for point in timed)
    optimizer = statistics.median(point.optimizer_seconds for point in timed)
    curve = smoothed(metrics)
    return Summary(
        steps=metrics.iteration,
        final_train_loss=curve[-1][1] if curve else None,
        final_valid_loss=metrics.valid[max(metrics.valid)] if metrics.valid else None,
        seconds_per_step=seconds,
        optimizer_seconds_per_step=optimizer,
        optimizer_share=optimizer / seconds if seconds else 0.0,
    )


def steps_to_reach(metrics: Metrics, baseline: Metrics) -> int | None:
    """The first step at which a run is as good as another run was at its end.

    That is the smallest iteration at which a validation loss was measured that is not above the baseline's last
    validation loss: nothing is interpolated, so the answer is a multiple of the evaluation interval. If either run has
    no evaluations, it is the smallest iteration whose trailing mean of the training loss (:func:`smoothed`, from the
    :data:`WINDOW`-th point on) is not above the baseline's last one.

    Returns:
        the iteration, or None if the run never got there.
    """
    if metrics.valid and baseline.valid:
        target = baseline.valid[max(baseline.valid)]
        curve = [(step, loss) for step, loss in sorted(metrics.valid.items()) if loss is not None]
    else:
        last = smoothed(baseline)[-1:]
        target = last[0][1] if last else None
        curve = smoothed(metrics)[WINDOW - 1 :]
    if target is None:
        return None
    return next((step for step, loss in curve if loss <= target), None)
