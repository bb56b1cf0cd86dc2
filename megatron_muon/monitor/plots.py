"""Pictures of recorded runs, of their losses and of all that was measured, and a table of numbers. Needs matplotlib."""

from __future__ import annotations

import contextlib
import csv
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_muon.monitor.metrics import WINDOW, Metrics, smoothed
from megatron_muon.monitor.sheet import HOW_TO_MEASURE, Line, Panel, panels, summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["METRICS_FILE", "find_runs", "plot_logits", "plot_losses", "plot_sheet", "write_csv"]

METRICS_FILE = "metrics.jsonl"
"""Name of a run's file of JSON lines inside its folder."""

# Okabe and Ito's palette, told apart with any colour vision; each run has a line style of its own as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
ALARM_COLOUR = "#B3261E"
_STYLES = ("-", "--", "-.", ":")

_SCALARS = ("learning_rate", "grad_norm", "seconds", "optimizer_seconds")


def _plain[**P](draw: Callable[P, None]) -> Callable[P, None]:
    """Names of runs are text: dollars in them begin no formula."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> None:
        import matplotlib

        with matplotlib.rc_context({"text.parse_math": False}):
            draw(*args, **kwargs)

    return drawn


def find_runs(paths: Sequence[Path]) -> dict[str, Path]:
    """Names and files of runs.

    Args:
        paths: files of JSON lines, folders that hold :data:`METRICS_FILE`, or folders of such folders.

    Raises:
        FileNotFoundError: if a path leads to no run.
        ValueError: if two runs have the same name.
    """
    runs: dict[str, Path] = {}
    for path in paths:
        if path.is_file():
            found = {path.resolve().parent.name if path.name == METRICS_FILE else path.stem: path}
        elif (path / METRICS_FILE).is_file():
            found = {path.resolve().name: path / METRICS_FILE}
        else:
            found = {file.parent.name: file for file in sorted(path.glob(f"*/{METRICS_FILE}"))}
        if not found:
            raise FileNotFoundError(f"{path}: no run here. A run is a folder with {METRICS_FILE}, or such a file.")
        for name in found.keys() & runs.keys():
            raise ValueError(f"two runs are called {name!r}: {runs[name]} and {found[name]}. Rename one folder.")
        runs.update(found)
    return runs


def write_csv(runs: Mapping[str, Metrics], path: Path) -> None:
    """All curves in one table: a row for each run and recorded iteration; cells without a value are empty."""
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("run", "iteration", "train_loss", "valid_loss", *_SCALARS))
        for name, run in runs.items():
            points = {point.iteration: point for point in run.train}
            for step in sorted(points.keys() | run.valid.keys()):
                point = points.get(step)
                values = [point and point.loss, run.valid.get(step), *(getattr(point, key, None) for key in _SCALARS)]
                writer.writerow((name, step, *("" if value is None else f"{value:.6g}" for value in values)))


@_plain
def plot_losses(runs: Mapping[str, Metrics], path: Path, title: str | None = None) -> None:
    """Training and validation loss over the steps, side by side with one scale; runs in the order of colours.

    The training losses are pale, with their trailing mean (:func:`metrics.smoothed`) on top.
    """
    figure = _figure(title)
    train_axes, valid_axes = figure.subplots(1, 2, sharey=True)
    for name, run, style in _styled(runs):
        _draw_train(train_axes, name, run, style)
        _draw_valid(valid_axes, run, style)
    _label_ends(valid_axes, runs)
    _finish(train_axes, "Training loss")
    _finish(valid_axes, "Validation loss")
    train_axes.set_ylabel("cross-entropy (nats per token)")
    limits = loss_limits(runs.values())
    if limits is not None:
        train_axes.set_ylim(*limits)
    if train_axes.lines:
        train_axes.legend(frameon=False)
    with replacing(path) as partial:
        figure.savefig(partial, format=path.suffix[1:])


def plot_logits(runs: Mapping[str, Metrics], threshold: float, path: Path, title: str | None = None) -> None:
    """The largest attention logit on a logarithmic scale, with QK-clip's threshold as a line, and the training loss."""
    figure = _figure(title)
    logit_axes, loss_axes = figure.subplots(1, 2)
    for name, run, style in _styled(runs):
        points = [point for point in run.train if (point.max_attention_logit or 0.0) > 0.0]
        logits = [point.max_attention_logit or 0.0 for point in points]
        logit_axes.plot([point.iteration for point in points], logits, label=name, **style)
        _draw_train(loss_axes, name, run, style)
    logit_axes.axhline(threshold, color="0.5", linewidth=0.8)
    logit_axes.set_yscale("log")
    _finish(logit_axes, "Largest attention logit")
    _finish(loss_axes, "Training loss")
    loss_axes.set_ylabel("cross-entropy (nats per token)")
    logit_axes.legend(frameon=False)
    with replacing(path) as partial:
        figure.savefig(partial, format=path.suffix[1:])


@_plain
def plot_sheet(runs: Mapping[str, Metrics], path: Path, title: str | None = None) -> None:
    """All that was measured, a panel for each number (:func:`sheet.panels`), with the alarms on the axis of time."""
    found = panels(runs)
    alarms = [(name, alarm) for name, run in runs.items() for alarm in run.alarms]
    kinds = list(dict.fromkeys(alarm["alarm"] for _, alarm in alarms))
    rows, strip = max(1, math.ceil(len(found) / 3)), 0.6 + 0.22 * len(kinds)
    figure = _figure(None, (14, 2.7 * rows + bool(kinds) * strip + 0.8), 100)
    words = [*([title] if title else []), *(summary(name, run) for name, run in runs.items())]
    unmeasured = [name for name, run in runs.items() if not run.muon]
    words += [HOW_TO_MEASURE.format(runs=", ".join(unmeasured))] * bool(unmeasured)
    figure.suptitle("\n".join(words), fontsize="medium", x=0.01, ha="left")
    grid = figure.add_gridspec(rows + bool(kinds), 3, height_ratios=[2.7] * rows + [strip] * bool(kinds))
    styles = {name: style for name, _, style in _styled(runs)}
    end = max((run.iteration for run in runs.values()), default=0)
    for number, panel in enumerate(found):
        axes = figure.add_subplot(grid[divmod(number, 3)])
        for part, line in enumerate(panel.lines):
            if line.role != "part" or len(runs) == 1:
                _draw_line(axes, line, styles[line.run], part, len(runs) == 1)
        _finish_panel(axes, panel, [alarm["iteration"] for _, alarm in alarms], end)
        if panel.key == "loss" and (limits := loss_limits(runs.values())):
            axes.set_ylim(*limits)
    if kinds:
        _draw_alarms(figure.add_subplot(grid[rows, :]), alarms, kinds, styles, end)
    with replacing(path) as partial:
        figure.savefig(partial, format=path.suffix[1:])
        if path.suffix == ".png":  # a third of the bytes, and the same to the eye
            from PIL import Image

            Image.open(partial).convert("RGB").quantize(128, method=Image.Quantize.MAXCOVERAGE).save(partial, "PNG")


_LOOKS: Mapping[str, Mapping[str, Any]] = {
    "whole": {"linewidth": 1.6},
    "pale": {"linewidth": 0.8, "alpha": 0.25, "label": ""},
    "marked": {"linewidth": 1.0, "linestyle": ":", "marker": "o", "markersize": 2.5},
    "middle": {"linewidth": 1.6},
    "worst": {"linewidth": 1.0, "linestyle": (0, (3, 1))},
}


def _draw_line(axes: Axes, line: Line, style: Mapping[str, Any], part: int, is_only: bool) -> None:
    """A line in the look of its role: the colour says which run, the rest which line of it."""
    iterations, *columns = zip(*line.points, strict=True)
    values, low, high = ([math.nan if value is None else value for value in column] for column in columns)
    if line.role == "part":
        colour = COLOURS[part % len(COLOURS)]
        axes.fill_between(iterations, low, high, color=colour, alpha=0.75, linewidth=0, label=line.name)
        return
    label = line.name if is_only else f"{line.run}: {line.name}"
    axes.plot(iterations, values, **{**style, "label": label, **_LOOKS[line.role]})
    if line.role == "middle" and is_only:
        axes.fill_between(iterations, low, high, color=style["color"], alpha=0.12, linewidth=0)
    lost = [point.iteration for point in line.points if point.value is None]
    if lost:
        at_the_top = axes.get_xaxis_transform()
        axes.plot(lost, [0.97] * len(lost), "x", color="black", markersize=5, transform=at_the_top, label="not finite")


def _finish_panel(axes: Axes, panel: Panel, alarms: Sequence[int], end: int) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    # Told apart by sign and weight, not by colour alone.
    _finish(axes, "   ".join((panel.about.title, *(f"\u25b2 {name}" for name in panel.alarms))))
    axes.set_xlabel("")
    if panel.alarms:
        axes.set_title(axes.get_title(loc="left"), loc="left", fontsize="medium", fontweight="bold", color=ALARM_COLOUR)
    axes.set_xlim(0, 1.02 * max(1, end))
    for limit in panel.limits:
        axes.axhline(limit, color="black", linewidth=0.7, linestyle="--", label="limit of the alarm")
    if panel.about.is_logarithmic and any(p.value is not None for line in panel.lines for p in line.points):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        if high < 1000 * low:
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    for iteration in sorted(set(alarms)):
        axes.axvline(iteration, color="0.35", linewidth=0.7, linestyle=":")
    handles, labels = axes.get_legend_handles_labels()
    unique = {label: handle for handle, label in zip(handles, labels, strict=True) if label}
    axes.legend(unique.values(), unique.keys(), fontsize="x-small", framealpha=0.75, edgecolor="none")


def _draw_alarms(
    axes: Axes,
    alarms: Sequence[tuple[str, Mapping[str, Any]]],
    kinds: Sequence[str],
    styles: Mapping[str, Mapping[str, Any]],
    end: int,
) -> None:
    """A row for each kind of alarm: from when it was so to when it was told."""
    for name, alarm in alarms:
        y, since = kinds.index(alarm["alarm"]), alarm.get("since", alarm["iteration"])
        axes.plot([since, alarm["iteration"]], [y, y], color=styles[name]["color"], linewidth=4, alpha=0.4)
        axes.plot([alarm["iteration"]], [y], "^", color=styles[name]["color"], markersize=6)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.set_xlim(0, 1.02 * max(1, end))
    _finish(axes, "\u25b2 Alarms: since when, and when they were told")
    axes.set_xlabel("iteration")


def _figure(title: str | None, size: tuple[float, float] = (10, 4.2), dpi: int = 150) -> Figure:
    # Imported here, as matplotlib takes a second; Figure instead of pyplot needs no display and leaves no state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=dpi)
    if title:
        figure.suptitle(title, fontsize="medium")
    return figure


def _styled(runs: Mapping[str, Metrics]) -> Iterator[tuple[str, Metrics, dict[str, Any]]]:
    """Each run with its name, colour and style of lines."""
    for (name, run), colour, line in zip(
        runs.items(), itertools.cycle(COLOURS), itertools.cycle(_STYLES), strict=False
    ):
        yield name, run, {"color": colour, "linestyle": line}


def _draw_train(axes: Axes, name: str, run: Metrics, style: Mapping[str, Any]) -> None:
    points = [(point.iteration, point.loss) for point in run.train if point.loss is not None]
    if points:
        axes.plot(*zip(*points, strict=True), color=style["color"], alpha=0.25, linewidth=0.8)
        # The mean lags while its window fills and the loss is steep: a long run does without that part.
        curve = smoothed(run)[WINDOW - 1 if len(points) > 2 * WINDOW else 0 :]
        axes.plot(*zip(*curve, strict=True), label=name, linewidth=1.8, **style)


def _draw_valid(axes: Axes, run: Metrics, style: Mapping[str, Any]) -> None:
    points = _valid_points(run)
    if points:
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.8, **style)


def _valid_points(run: Metrics) -> list[tuple[int, float]]:
    return [(step, loss) for step, loss in sorted(run.valid.items()) if loss is not None]


def _label_ends(axes: Axes, runs: Mapping[str, Metrics]) -> None:
    """Name and value at the end of each validation curve: the lowest below its point and the highest above."""
    ends = {name: _valid_points(run)[-1] for name, run in runs.items() if _valid_points(run)}
    order = sorted(ends, key=lambda name: ends[name][1])
    colours = dict(zip(runs, itertools.cycle(COLOURS), strict=False))
    for name, end in ends.items():
        below, above = name == order[0] != order[-1], name == order[-1] != order[0]
        axes.annotate(
            f"{name} {end[1]:.3f}",
            end,
            xytext=(6, 0),
            textcoords="offset points",
            va="top" if below else "bottom" if above else "center",
            color=colours[name],
        )


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize="medium")
    axes.set_xlabel("step")
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def loss_limits(runs: Collection[Metrics]) -> tuple[float, float] | None:
    """Vertical limits without the steep beginning, which would flatten the part where runs differ."""
    losses = [point.loss for run in runs for point in run.train if point.loss is not None]
    losses += [loss for run in runs for loss in run.valid.values() if loss is not None]
    late = [p.loss for run in runs for p in run.train if p.loss is not None and p.iteration >= run.iteration / 20]
    if not losses or not late:
        return None
    low, high = min(losses), max(late)
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` that takes its place when the context ends well, so that no half-written file remains."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
