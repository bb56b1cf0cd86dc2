"""The numbers of a run, and of one run against another."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from megatron_muon.monitor.metrics import Metrics

__all__ = ["WINDOW", "Summary", "smoothed", "steps_to_reach", "summarize"]

WINDOW = 20
"""Number of recorded points in the trailing mean of the training loss."""


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
