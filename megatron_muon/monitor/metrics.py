"""Read the JSON lines that ``monitor.recorder`` writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["LOSS", "Metrics", "TrainPoint", "parse_lines", "read", "rewrite_until"]

LOSS = "lm loss"
"""Megatron's name for the language-model loss."""


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
    """

    train_iters: int | None = None
    train: list[TrainPoint] = field(default_factory=list)
    valid: dict[int, float | None] = field(default_factory=dict)

    @property
    def iteration(self) -> int:
        """The last recorded training iteration, 0 if there is none."""
        return self.train[-1].iteration if self.train else 0


_WARM_UP_POINTS = 3


def parse_lines(lines: list[str], source: str) -> Iterator[dict[str, Any]]:
    """The records of complete lines. A last line that was cut off is left out.

    Args:
        lines: with their line ends.
        source: named in errors.

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
