"""What differs between two runs."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_muon.monitor.doctor.history import changes, differing
from megatron_muon.monitor.doctor.losses import scatter
from megatron_muon.monitor.doctor.run import Run
from megatron_muon.monitor.doctor.words import few
from megatron_muon.monitor.metrics import WINDOW


def compare(a: Run, b: Run) -> list[str]:
    """In sentences: settings, where losses part, alarms."""
    return [*_settings(a, b), *_losses(a, b), *_alarms(a, b)]


def _settings(a: Run, b: Run) -> Iterator[str]:
    yield from changes(a.start, b.start)
    lacking = [name for name in ("flags", "versions", "routes") if not a.start.get(name) or not b.start.get(name)]
    if lacking:
        yield f"not compared, as not both have them: {', '.join(lacking)}"
    for part in ("flags", "settings"):
        if a.checkpoint.get(part) and b.checkpoint.get(part):
            found = differing(a.checkpoint[part], b.checkpoint[part], "absent")
            yield from (f"checkpoint: {each}" for each in found[:40])


def _losses(a: Run, b: Run) -> Iterator[str]:
    other = {point.iteration: point for point in b.train}
    pairs = [(point, other[point.iteration]) for point in a.train if point.iteration in other]
    if not pairs:
        yield "no iteration has a loss in both"
        return
    if any(x.iterations != y.iterations for x, y in pairs[1:]):
        yield "their lines are means over different --log-interval: losses are compared where both have one"
    same = [x.loss == y.loss or (x.loss != x.loss and y.loss != y.loss) for x, y in pairs]
    if all(same):
        yield f"all {len(pairs)} losses that both have are equal, bit for bit"
        return
    x, y = pairs[same.index(False)]
    yield f"losses differ in bits from iteration {x.iteration} on: {x.loss} and {y.loss}" + (
        f"; the {same.index(False)} before are equal" if same.index(False) else ", the first that both have"
    )
    theirs = dict(b.losses)
    finite = [(at, theirs[at] - loss) for at, loss in a.losses if at in theirs]
    noise = scatter([loss for _, loss in a.losses])
    size = min(WINDOW, len(finite))
    limit, total = 3 * noise * math.sqrt(2 / max(1, size)), 0.0
    for number, (at, difference) in enumerate(finite):
        total += difference - (finite[number - size][1] if number >= size else 0.0)
        if number >= size - 1 and abs(total / size) > limit:
            yield (
                f"losses part beyond noise at iteration {at}: those of {b.name} are {total / size:+.3g} in the mean of "
                f"{size} (noise of one loss {noise:.2g}, limit {limit:.2g})"
            )
            return
    yield f"losses do not part beyond noise: the mean difference of {size} losses stays within {limit:.2g}"


def _alarms(a: Run, b: Run) -> Iterator[str]:
    for run, other in ((a, b), (b, a)):
        only = {alarm.get("alarm", "?") for alarm in run.alarms} - {alarm.get("alarm", "?") for alarm in other.alarms}
        if only:
            yield f"alarms that only {run.name} had: {few(sorted(only))}"
