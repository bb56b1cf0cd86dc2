"""Checks of losses, gradients, rates and skipped steps."""

from __future__ import annotations

import contextlib
import itertools
import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from statistics import median

from megatron_muon.monitor.doctor.matrices import curve_of_logits
from megatron_muon.monitor.doctor.run import Run
from megatron_muon.monitor.doctor.words import Finding, finding, many
from megatron_muon.monitor.metrics import WINDOW

_NORMAL = 1.4826 / math.sqrt(2)
"""Median of the steps between values with normal noise, to its standard deviation."""

RISEN = 1.1
"""Times the first loss, above which all of a short run's second half is out of order."""


def scatter(values: Sequence[float]) -> float:
    """Standard deviation of the noise from one value to the next, whatever their trend and outliers."""
    steps = [abs(b - a) for a, b in itertools.pairwise(values)]
    return _NORMAL * median(steps) if steps else 0.0


def levels(values: Sequence[float]) -> list[float]:
    """The median of each value and those before it, :data:`WINDOW` in all."""
    kept: list[float] = []
    found = []
    for number, value in enumerate(values):
        insort(kept, value)
        if number >= WINDOW:
            del kept[bisect_left(kept, values[number - WINDOW])]
        found.append(kept[len(kept) // 2])
    return found


def _not_finite(run: Run) -> Iterator[Finding]:
    losses = [(point.iteration, point.loss) for point in run.train if point.loss is not None] + run.valid
    bad = sorted(iteration for iteration, loss in losses if not math.isfinite(loss))
    if bad:
        last = [f"the last finite one is {loss:.4g} at {at}. " for at, loss in run.losses if at < bad[0]][-1:]
        seen = f"{len(bad)} of {len(losses)} losses are NaN or infinite; {''.join(last)}{_before(run, bad[0])}"
        yield finding("not finite", seen, at=bad[0])


def _course(run: Run) -> Iterator[Finding]:
    losses = [loss for _, loss in run.losses]
    if len(losses) < 2 * WINDOW:
        lowest = min(losses[len(losses) // 2 :], default=math.nan)
        if len(losses) >= 4 and lowest > RISEN * losses[0]:
            seen = f"{losses[0]:.4g} at first, {lowest:.4g} at least in the second half of {len(losses)}"
            yield finding("risen", seen)
        return
    course = levels(losses)
    best = min(range(len(course)), key=course.__getitem__)
    noise = scatter(losses[: best + 1]) if best >= 5 else 0.03 * abs(course[best])
    if course[-1] > course[best] + max(4 * noise, 0.03 * abs(course[best])):
        at = run.losses[best][0]
        seen = f"median of {WINDOW} losses: {course[best]:.4g} at {at}, {course[-1]:.4g} at {run.losses[-1][0]}. "
        yield finding("diverged", seen + _before(run, at), at=at)
    elif course[-1] >= course[WINDOW - 1] - scatter(losses):
        yield finding(
            "flat", f"median of {WINDOW} losses: {course[WINDOW - 1]:.4g} at first, {course[-1]:.4g} at the end"
        )


def _spikes(run: Run) -> Iterator[Finding]:
    losses = [loss for _, loss in run.losses]
    course, noise = levels(losses), scatter(losses)
    peaks: list[int] = []
    for number in range(5, len(losses)):
        if losses[number] > course[number - 1] + max(8 * noise, 0.05 * abs(course[number - 1])):
            if not peaks or number - peaks[-1] > 5:
                peaks.append(number)
            elif losses[number] > losses[peaks[-1]]:
                peaks[-1] = number
    # What does not come back is no spike.
    peaks = [peak for peak in peaks if min(losses[peak : peak + 5 * WINDOW]) < (losses[peak] + course[peak - 1]) / 2]
    if peaks:
        worst = max(peaks, key=lambda peak: losses[peak] - course[peak - 1])
        at = run.losses[worst][0]
        seen = f"{losses[worst]:.4g}, where {course[worst - 1]:.4g} was usual with a noise of {noise:.2g}. "
        yield finding("spikes", seen + _before(run, at), at=at, spikes=many(len(peaks), "spike"))


def _before(run: Run, iteration: int) -> str:
    """What the record says of the step before an iteration."""
    past = [point for point in run.train if point.iteration < iteration]
    said, norms = [], [point.norm for point in past if point.norm is not None]
    usual = median(norms[-WINDOW - 1 : -1]) if len(norms) > 1 else math.inf
    if norms and norms[-1] > 2 * usual:
        said.append(f"gradient norm {norms[-1]:.3g}, {usual:.3g} was usual")
    if past and past[-1].skipped:
        said.append(many(past[-1].skipped, "skipped step"))
    logits = [(at, value) for at, value in curve_of_logits(run) if at < iteration]
    if logits and logits[-1][1] > max(2 * logits[0][1], 30.0):
        said.append(f"largest attention logit {logits[-1][1]:.3g} at {logits[-1][0]}, {logits[0][1]:.3g} at first")
    near = [alarm for alarm in run.alarms if 0 <= iteration - alarm["iteration"] < 100]
    said += [f"alarm {alarm.get('alarm')} at {alarm['iteration']}" for alarm in near[-2:]]
    said += [f"a start at {each['iteration']}" for each in run.starts if 0 < iteration - each["iteration"] <= 5]
    return f"Before it: {', '.join(said) or 'nothing odd in the record'}."


def _skipped(run: Run) -> Iterator[Finding]:
    found = [point for point in run.train if point.skipped]
    count, every = sum(point.skipped for point in found), sum(point.iterations for point in run.train)
    if found:
        seen = f"first at iteration {found[0].iteration}, last at {found[-1].iteration}"
        yield finding("many skipped" if count > 0.05 * every else "skipped", seen, count=count, all=every)


def _gradients(run: Run) -> Iterator[Finding]:
    norms = [point.norm for point in run.train if point.norm is not None]
    tenth = len(norms) // 10
    if tenth < 2:
        return
    early, late = median(norms[tenth : 3 * tenth]), median(norms[-tenth:])
    if late > 3 * early > 0:
        yield finding("gradients grow", f"median {early:.3g} in the second and third tenth, {late:.3g} in the last")
    limit = 0.0
    with contextlib.suppress(TypeError, ValueError):  # None, which Megatron takes for none
        limit = float(run.flags.get("--clip-grad", 1.0))
    share = sum(norm > limit for norm in norms) / len(norms)
    if limit > 0 and share > 0.9:
        seen = (
            f"the norm is above --clip-grad {limit:g} in {share:.0%} of {len(norms)} lines; median {median(norms):.3g}"
        )
        yield finding("clipped", seen)


def _jumps(run: Run) -> Iterator[Finding]:
    decay = run.rates.get("weight_decay")
    curves = {
        "--lr": [(point.iteration, point.rate) for point in run.train if point.rate is not None],
        "--weight-decay": list(zip(map(int, decay.at), decay.mean, strict=True)) if decay else [],
    }
    for flag, curve in curves.items():
        warm = next((n for n, (a, b) in enumerate(itertools.pairwise(curve)) if b[1] <= a[1]), len(curve))
        limit = 0.2 * max((value for _, value in curve), default=0.0)
        found = [(a, b) for a, b in itertools.pairwise(curve[warm:]) if abs(b[1] - a[1]) > limit]
        if flag == "--lr" and run.flags.get("--lr-decay-style") == "WSD":  # falls within a few lines, and is to
            found = [(a, b) for a, b in found if b[1] > a[1] or _is_after_resume(run, b[0])]
        if found and len(curve) >= WINDOW:
            (_, old), (at, new) = found[0]
            seen = f"from {old:.3g} to {new:.3g}{', after a resume' if _is_after_resume(run, at) else ''}"
            yield finding("jump", seen + (f"; {len(found)} in all" if len(found) > 1 else ""), flag=flag, at=at)


def _is_after_resume(run: Run, iteration: int) -> bool:
    return any(0 < iteration - start["iteration"] <= 10 for start in run.starts[1:])


def _evaluation(run: Run) -> Iterator[Finding]:
    losses = [(iteration, loss) for iteration, loss in run.valid if math.isfinite(loss)]
    if len(run.train) > 2 * WINDOW and not run.valid and run.starts:
        yield finding("no evaluation", f"{run.iteration} iterations")
    elif len(losses) > 3:
        at, best = min(losses, key=lambda pair: pair[1])
        if losses[-1][1] > 1.03 * best:
            yield finding("overfitting", f"{best:.4g} at {at}, {losses[-1][1]:.4g} at {losses[-1][0]}", at=at)


CHECKS = (_not_finite, _course, _spikes, _skipped, _gradients, _jumps, _evaluation)
