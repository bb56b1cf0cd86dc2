"""The sheet of one or several runs: which panels it has, and which lines they show. Drawn by ``plots`` and ``page``.

Of a number that many classes of weights have, a run shows three lines' worth: the middle of the classes, the range of
all their matrices, and the class that is worst at the end, by name.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from megatron_muon.monitor.metrics import WINDOW, Metrics, smoothed
from megatron_muon.monitor.schema import STATS, TIMES, Stat

__all__ = ["HOW_TO_MEASURE", "Line", "Panel", "Point", "panels", "short", "summary", "thin"]

HOW_TO_MEASURE = (
    "Nothing was measured of Muon's work in {runs}. It is with --muon-log-interval 10 --muon-log-jsonl FILE."
)

POINTS = 400
"""Points of a line at most, about as many as a panel has pixels to show."""

_ON_THE_SHEET = ("update_ratio", "defect", "unlifted", "stable_rank", "spectral_norm")
_SHARES = {"zero_gradient": "gradients of zeros", "at_bound": "at the bound", "nonfinite": "not finite"}
_SMALL_IS_WORST = ("stable_rank", "momentum_norm")
_PARTS = ("pack", "exchange", "products", "waiting", "write")
_PARTS_MEANING = "Means over the ranks. " + "; ".join(f"{part}: {TIMES[part]}" for part in _PARTS) + "."
_NUMBERS = 500_000  # of all classes of a page, which is then some 5 MB

_JUDGED = {
    **dict.fromkeys(("nonfinite", "dead_experts", "no_gradient", "norm_at_bound"), "shares"),
    "rank_collapse": "unlifted",
    "defect": "defect",
    "update_ratio": "update_ratio",
    "logits_growing": "logit",
}  # alarm: the panel that shows what it is about

Role = Literal["whole", "pale", "marked", "middle", "worst", "part", "class"]


class Point(NamedTuple):
    """A value at an iteration, None where it was not finite, and the range around it if there is one."""

    iteration: int
    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """A line of a panel.

    Attributes:
        run: name of its run.
        name: for the legend.
        role: what it is to the eye. A ``part`` is stacked: its value is from ``low`` to ``value``.
        points: in order of iteration.
    """

    run: str
    name: str
    role: Role
    points: Sequence[Point]


@dataclass(frozen=True)
class Panel:
    """A picture of the sheet.

    Attributes:
        key: name of its number.
        about: its title, meaning and axis. What is not above zero is left out of a logarithmic one.
        lines: in the order in which they are drawn.
        alarms: names of the alarms that were told about its number.
        limits: of these alarms.
        is_further: whether it is on the page alone, below the sheet.
    """

    key: str
    about: Stat
    lines: Sequence[Line]
    alarms: Sequence[str]
    limits: Sequence[float]
    is_further: bool


_Line = tuple[str, Role, Sequence[Point]]
_Lines = Callable[[Metrics], Iterator[_Line]]


def panels(runs: Mapping[str, Metrics], with_classes: bool = False) -> list[Panel]:
    """All panels for which there are numbers.

    Args:
        runs: by name.
        with_classes: whether to add a line for each class (and layer, if recorded), and the panels of further numbers.
    """

    def panel(key: str, title: str, meaning: str, is_logarithmic: bool, lines_of: _Lines) -> Panel:
        return _panel(runs, key, Stat(title, meaning, is_logarithmic), lines_of)

    found = [
        panel("loss", "Loss (nats per token)", "Training, with its trailing mean, and validation.", False, _losses),
        panel("rate", "Learning rate", "Of Megatron's log, and of Muon's first group.", False, _rates),
        panel("grad_norm", "Gradient norm", "Of all weights, before clipping.", True, _gradients),
        panel("logit", "Largest attention logit", "Since the point before.", True, _logits),
        *(_stat_panel(runs, stat, with_classes) for stat in _ON_THE_SHEET),
        panel("shares", "Matrices in trouble (share)", "Of the class that has most of them.", False, _shares),
        panel("time", "Time of an iteration (s)", "Without evaluations and checkpoints.", False, _times),
        panel("parts", "Muon's step (s)", _PARTS_MEANING, False, _parts),
    ]
    if with_classes:
        found += [_stat_panel(runs, stat, True) for stat in STATS if stat not in _ON_THE_SHEET]
    return [panel for panel in found if panel.lines]


def summary(name: str, run: Metrics) -> str:
    """A run in a line of words."""
    words = f"{name}: {run.iteration} of {run.train_iters or '?'} iterations"
    if run.train:
        curve = smoothed(Metrics(train=run.train[-WINDOW:]))
        words += ", loss not finite" if run.train[-1].loss is None else f", loss {curve[-1][1]:.3f}"
    count = len(run.alarms)
    return f"{words}, {count or 'no'} alarm{'' if count == 1 else 's'}"


def short(name: str) -> str:
    """A class of weights without what all of them have in common."""
    return name.removeprefix("decoder.").removeprefix("layers.").removeprefix("*.").replace(".weight", "")


def thin(points: Sequence[Point], count: int = POINTS) -> Sequence[Point]:
    """About ``count`` points at most: of each stretch the lowest, the highest and one that is not finite, and the last.

    So no spike is lost, whatever the length of the run.
    """
    if len(points) <= count:
        return points
    size = math.ceil(2 * len(points) / count)
    kept = {len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        finite = [i for i in stretch if points[i].value is not None]
        kept.update([i for i in stretch if points[i].value is None][:1])
        if finite:
            kept.add(min(finite, key=lambda i: _first(points[i].low, points[i].value)))
            kept.add(max(finite, key=lambda i: _first(points[i].high, points[i].value)))
    return [points[i] for i in sorted(kept)]


def _first(value: float | None, otherwise: float | None) -> float:
    return value if value is not None else otherwise if otherwise is not None else math.inf


def _panel(runs: Mapping[str, Metrics], key: str, about: Stat, lines_of: _Lines, is_further: bool = False) -> Panel:
    lines = []
    for name, run in runs.items():
        for title, role, points in lines_of(run):
            if about.is_logarithmic:
                points = [p for p in points if p.value is None or p.value > 0.0]
            if points:
                lines.append(Line(name, title, role, points if role == "class" else thin(points)))
    told = [alarm for run in runs.values() for alarm in run.alarms if _JUDGED.get(str(alarm["alarm"])) == key]
    limits = {a["limit"] for a in told if isinstance(a.get("limit"), float | int) and a["limit"] > 0}
    names = dict.fromkeys(str(alarm["alarm"]) for alarm in told)
    return Panel(key, about, lines, list(names), sorted(limits), is_further)


def _losses(run: Metrics) -> Iterator[_Line]:
    # The mean lags while its window fills and the loss is steep: a long run does without that part.
    curve = smoothed(run)[WINDOW - 1 if len(run.train) > 2 * WINDOW else 0 :]
    yield "each point", "pale", [Point(p.iteration, p.loss) for p in run.train]
    yield "training", "whole", [Point(*point) for point in curve]
    yield "validation", "marked", [Point(*point) for point in sorted(run.valid.items())]


def _rates(run: Metrics) -> Iterator[_Line]:
    logged = [Point(p.iteration, p.learning_rate) for p in run.train if p.learning_rate is not None]
    yield "Megatron's log", "whole", logged
    yield "Muon", "worst", [Point(m["iteration"], m["rates"]["lr"]) for m in run.muon if "lr" in m.get("rates", {})]


def _gradients(run: Metrics) -> Iterator[_Line]:
    if any(p.grad_norm is not None for p in run.train):  # else it was not computed
        yield "gradient norm", "whole", [Point(p.iteration, p.grad_norm) for p in run.train]


def _logits(run: Metrics) -> Iterator[_Line]:
    found = [(p.iteration, p.max_attention_logit) for p in run.train]
    found += [(m["iteration"], m.get("max_attention_logit")) for m in run.muon]
    yield "largest logit", "whole", [Point(*point) for point in sorted(p for p in found if p[1] is not None)]


def _times(run: Metrics) -> Iterator[_Line]:
    timed = [p for p in run.train if not p.after_start]
    yield "iteration", "whole", [Point(p.iteration, p.seconds) for p in timed]
    yield "optimizer", "worst", [Point(p.iteration, p.optimizer_seconds) for p in timed]


def _parts(run: Metrics) -> Iterator[_Line]:
    lower: dict[int, float] = {}
    for part in _PARTS:
        points = []
        for iteration, (_, mean, _) in _triples(run, "times", part):
            low = lower.get(iteration, 0.0)
            lower[iteration] = low + (mean or 0.0)
            points.append(Point(iteration, lower[iteration], low, lower[iteration]))
        yield part, "part", points
    yield "step", "whole", [Point(iteration, mean) for iteration, (_, mean, _) in _triples(run, "times", "step")]
    yield "slowest rank", "worst", [Point(iteration, last) for iteration, (*_, last) in _triples(run, "times", "step")]


def _triples(run: Metrics, group: str, name: str) -> Iterator[tuple[int, Sequence[float | None]]]:
    return ((line["iteration"], line[group][name]) for line in run.muon if name in line.get(group, {}))


def _shares(run: Metrics) -> Iterator[_Line]:
    roles: tuple[Role, ...] = ("whole", "worst", "marked")
    for (stat, title), role in zip(_SHARES.items(), roles, strict=True):
        shares = [(line["iteration"], [mean for _, mean, _ in _of_classes(line, stat)]) for line in run.muon]
        known = [(iteration, [mean for mean in means if mean is not None]) for iteration, means in shares]
        yield title, role, [Point(iteration, max(means)) for iteration, means in known if means]


def _of_classes(line: Mapping[str, Any], stat: str) -> list[Sequence[float | None]]:
    return [numbers[stat] for numbers in line.get("classes", {}).values() if stat in numbers]


def _stat_panel(runs: Mapping[str, Metrics], stat: str, with_classes: bool) -> Panel:
    sign = -1.0 if stat in _SMALL_IS_WORST else 1.0

    def lines(run: Metrics) -> Iterator[_Line]:
        members = _members(run, stat)
        if not members:
            return
        yield "middle of the classes", "middle", _middle(run, stat)
        worst = max(members, key=lambda member: _badness(members[member], sign))
        extremes = [Point(p.iteration, p.low if sign < 0 else p.high) for p in members[worst]]
        yield f"{short(worst)} (worst)", "worst", extremes
        if with_classes:
            count = _NUMBERS // (3 * len(STATS) * len(runs) * len(members))
            for member, points in members.items():
                yield member, "class", thin(points, max(20, min(count, POINTS)))

    return _panel(runs, stat, STATS[stat], lines, stat not in _ON_THE_SHEET)


def _members(run: Metrics, stat: str) -> dict[str, list[Point]]:
    """The points of each class, and of each layer if they were recorded."""
    found: dict[str, list[Point]] = defaultdict(list)
    for line in run.muon:
        for group in ("classes", "layers"):
            for name, numbers in line.get(group, {}).items():
                if stat in numbers:
                    least, mean, largest = numbers[stat]
                    found[name].append(Point(line["iteration"], mean, least, largest))
    return found


def _badness(points: Sequence[Point], sign: float) -> float:
    """How bad the last quarter of a line is; what is not finite is worst."""
    last = points[-max(1, len(points) // 4) :]
    ends = [p.low if sign < 0 else p.high for p in last]
    return max(math.inf if end is None else sign * end for end in ends)


def _middle(run: Metrics, stat: str) -> list[Point]:
    points = []
    for line in run.muon:
        triples = _of_classes(line, stat)
        finite = [[number for number in triple if number is not None] for triple in triples]
        whole = [triple for triple in finite if len(triple) == 3]
        if whole:
            least, means, largest = zip(*whole, strict=True)
            points.append(Point(line["iteration"], statistics.median(means), min(least), max(largest)))
        elif triples:
            points.append(Point(line["iteration"], None))
    return points
