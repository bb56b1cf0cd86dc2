"""Checks of the numbers of matrices (``--muon-log-interval``), of attention logits, and of alarms."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from megatron_muon.monitor.alarms import Thresholds
from megatron_muon.monitor.doctor.run import Run, Series
from megatron_muon.monitor.doctor.words import Finding, few, finding, many
from megatron_muon.monitor.schema import STATS

_TRENDS: tuple[tuple[str, str, str, int, Callable[[float, float], bool]], ...] = (
    ("unlifted", "unlifted", "mean", 9, lambda early, late: late > 0.3 and late > 1.5 * early),
    ("rank", "stable_rank", "mean", 9, lambda early, late: late < 0.3 * early),
    ("large updates", "update_ratio", "mean", 9, lambda early, late: late > max(0.02, min(0.3, 3 * early))),
    ("defect", "defect", "mean", 9, lambda early, late: late > 0.25 and late > 1.5 * early),
    ("back and forth", "cosine", "mean", 9, lambda early, late: late < -0.2),
    ("weights grow", "spectral_norm", "largest", 30, lambda early, late: late > 3 * early > 0),
    ("tiny updates", "update_ratio", "mean", 9, lambda early, late: 0 <= late < 1e-7),
)
"""Finding, number, which of least, mean and largest, the fewest measured steps that tell, and what is odd about its
medians in the first and the last third of them. Limits are below those of alarms: a trend is told before it is an
alarm. All weights grow from their initial sizes for a while: a short run does not tell whether they stop."""

_SHARES = {"nonfinite": "nonfinite matrices", "zero_gradient": "zero gradients", "at_bound": "at bound"}
"""Numbers that are 1 for a matrix with something odd, else 0."""


def _trends(run: Run) -> Iterator[Finding]:
    first, last = run.rates["lr"].ends() if "lr" in run.rates else (1.0, 1.0)
    faster = last / first if first > 0 else 1.0
    for name, stat, part, fewest, is_odd in _TRENDS:
        ends = {
            each: numbers[stat].ends(part)
            for each, numbers in run.series.items()
            if stat in numbers and len(numbers[stat].at) >= fewest
        }
        by = faster if stat == "update_ratio" else 1.0  # ratios that follow the rate are as they were
        odd = {each: pair for each, pair in ends.items() if is_odd(by * pair[0], pair[1])}
        found = [f"{each}: {early:.2g} to {late:.2g}" for each, (early, late) in odd.items()]
        if found:
            what = f"{STATS[stat].title.lower()} ({part}), first and last third of {len(run.measured)} measured steps"
            seen = f"{what}, in {many(len(found), 'class', 'es')} of {len(ends)}: {few(found)}"
            yield finding(name, seen, limit=Thresholds().unlifted)


def _shares(run: Run) -> Iterator[Finding]:
    for stat, name in _SHARES.items():
        found: dict[str, int] = {}
        for each, numbers in run.series.items():
            since = numbers[stat].since() if stat in numbers else None
            if since is not None and (stat == "nonfinite" or sum(at >= since for at in run.measured) >= 3):
                share = numbers[stat].mean[-1]  # NaN where even that is not known
                count = max(1, round(share * run.matrices[each])) if math.isfinite(share) else run.matrices[each]
                count = min(run.matrices[each], count)
                found[f"{each}: {count} of {run.matrices[each]}"] = since
        is_dead = stat == "zero_gradient" and any("expert" in each for each in found)
        if found:
            seen = f"{STATS[stat].title.lower()}, matrices in the last measured step: {few(list(found))}"
            yield finding("dead experts" if is_dead else name, seen, at=min(found.values()))


def _alarms(run: Run) -> Iterator[Finding]:
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for alarm in run.alarms:
        kinds[alarm.get("alarm", "?")].append(alarm)
    for name, found in kinds.items():
        last, weights = found[-1], list(dict.fromkeys(each for alarm in found for each in alarm.get("weights") or ()))
        both = [last.get(each) for each in ("value", "limit")]
        known = [f"{each:.3g}" if isinstance(each, (int, float)) else str(each) for each in both]
        seen = f"told {many(len(found), 'time')}, last at {last['iteration']}: {known[0]}, limit {known[1]}"
        seen += f"; {few(weights, count=last.get('count') or 0)}" if weights else ""
        since = min(_first(alarm.get("since"), alarm["iteration"]) for alarm in found)
        text = str(last.get("text") or "")
        cause, is_split, remedy = text.partition("Usual cause: ")[2].partition(". To try: ")
        yield finding("alarm", seen, name=name, at=since, cause=cause, text=remedy.rstrip(".") if is_split else text)


def _first(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def curve_of_logits(run: Run) -> list[tuple[int, float]]:
    """Of the logged iterations, else of the measured steps."""
    series = run.rates.get("max_attention_logit", Series())
    measured = [(int(at), value) for at, value in zip(series.at, series.largest, strict=True)]
    return [(point.iteration, point.logit) for point in run.train if point.logit is not None] or measured


def _logits(run: Run) -> Iterator[Finding]:
    values = [value for _, value in curve_of_logits(run) if math.isfinite(value)]
    third = len(values) // 3
    if third >= 2 and str(run.flags.get("--qk-clip")) != "True":
        early, middle, late = max(values[:third]), max(values[third : 2 * third]), max(values[2 * third :])
        if late > 30 and late > 1.5 * middle and middle > 1.2 * early:
            yield finding("logits", f"largest of each third of the record: {early:.3g}, {middle:.3g}, {late:.3g}")


def _unmeasured(run: Run) -> Iterator[Finding]:
    if not run.measured:
        yield finding("nothing measured", "rank, defect, ratios, dead experts and times of phases are not known")
        return
    seen = {name.partition("[")[0] for name in run.series}
    muon = [name for name, who in (run.start.get("routes") or {}).items() if str(who).startswith("muon")]
    lacking = [name for name in muon if name.partition("[")[0] not in seen]
    if lacking:
        others = f"{few(lacking)}; {len(seen)} others were, in {many(len(run.measured), 'step')}"
        yield finding("unmeasured", others, classes=many(len(lacking), "class", "es"))


CHECKS = (_alarms, _shares, _trends, _logits, _unmeasured)
