"""Checks of starts, ends, versions, text and checkpoint."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_muon.monitor.doctor.run import Run
from megatron_muon.monitor.doctor.words import Finding, few, finding, many

_TESTED = {
    "megatron-core": ((0, 19), (0, 20), "megatron-core 0.19.x"),
    "emerging-optimizers": ((0, 3), (0, 4), "emerging-optimizers 0.3.x"),
    "torch": ((2, 6), (99,), "torch 2.6 or later"),
    "apex": ((99,), (99,), "NVIDIA's apex from its sources: that of the registry is an unrelated project"),
}
"""Package -> first version, first that is not supported, what to install (docs/compatibility.md)."""

_ROUNDING = {"--muon-momentum-dtype bf16", "--muon-momentum-dtype int8", "--grad-reduce-in-bf16 True"}
_ROUNDING |= {"--muon-ns-dtype fp16"}

_COMPARED = re.compile(
    r"--(muon-(?!log)|optimizer$|lr$|min-lr$|weight-decay$|clip-grad$|.*-parallel-size$|seed$|bf16$|qk-)"
)
"""Flags by which a checkpoint is compared with the run: others are places, or count something."""


_PLACES = re.compile(r"--(save|load|ckpt-step|muon-log-jsonl|tensorboard-dir|wandb-.*|data-cache-path)$")
"""Flags that make no difference to what is trained."""


def differing(old: Mapping[str, Any], new: Mapping[str, Any], absent: str) -> list[str]:
    """What two mappings do not have in common; ``absent`` is said of what is in one alone."""
    names = [name for name in dict.fromkeys([*old, *new]) if not _PLACES.match(name)]
    names = [name for name in names if str(old.get(name, absent)) != str(new.get(name, absent))]
    return [f"{name} {old.get(name, absent)} -> {new.get(name, absent)}" for name in names]


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two ``start`` lines: ranks, flags, versions, routes."""
    found = []
    if "world_size" in old and "world_size" in new:
        names = ("world_size", "device", "train_iters")
        found += differing({name: old.get(name) for name in names}, {name: new.get(name) for name in names}, "")
    for part, absent in (("flags", "default"), ("versions", "absent"), ("routes", "absent")):
        if old.get(part) and new.get(part):
            found += differing(old[part], new[part], absent)
    return found


def _resumes(run: Run) -> Iterator[Finding]:
    for old, new in itertools.pairwise(run.starts):
        found = changes(old, new)
        if found:
            yield finding("resumed", few(found, 8), at=new["iteration"])
    if len(run.starts) > 1 and run.means:
        yield finding("printed means", f"at iterations {few([str(at) for at in run.means])} of its text")


def _ending(run: Run) -> Iterator[Finding]:
    if run.total is None or run.state != "stopped":
        return
    saved = [*run.saved, *(run.checkpoint.get("iterations") or ())]
    kept = max((each for each in saved if each <= run.iteration), default=None)
    lost = (
        "no checkpoint is known"
        if kept is None
        else f"the last checkpoint is of {kept}, so {run.iteration - kept} are lost"
    )
    hours = run.age / 3600
    written = f"{hours:.0f} h" if hours >= 1 else f"{60 * hours:.0f} min"
    yield finding(
        "left" if run.has_left else "ended", f"last written {written} ago; {lost}", at=run.iteration, all=run.total
    )


def _damage(run: Run) -> Iterator[Finding]:
    if run.damaged:
        seen = f"lines {few([str(number) for number in run.damaged])}; left out here"
        yield finding("damage", seen, lines=many(len(run.damaged), "line"))
    pairs = itertools.pairwise(run.train)
    gaps = [
        (a.iteration, b.iteration)
        for a, b in pairs
        if not 0 < b.iteration - a.iteration <= 2 * max(a.iterations, b.iterations)
    ]
    if gaps and run.starts:
        yield finding(
            "gaps", f"the first between iterations {gaps[0][0]} and {gaps[0][1]}", gaps=many(len(gaps), "gap")
        )


def _versions(run: Run) -> Iterator[Finding]:
    for name, version in (run.start.get("versions") or {}).items():
        first, end, wanted = _TESTED.get(name.replace("_", "-"), ((0,), (99,), ""))
        number = tuple(map(int, re.findall(r"\d+", str(version))[:2]))
        if number and not first <= number < end:
            yield finding("version", f"{name} {version}", name=name, wanted=wanted)


def _precision(run: Run) -> Iterator[Finding]:
    found = sorted(_ROUNDING & {f"{name} {value}" for name, value in run.flags.items()})
    if found and not all(math.isfinite(point.loss) for point in run.train if point.loss is not None):
        yield finding("precision", ", ".join(found))


def _text(run: Run) -> Iterator[Finding]:
    if run.errors:
        first = list(dict.fromkeys(run.errors))[:3]  # ranks say the same
        yield finding("errors", " | ".join(first), lines=many(len(run.errors), "line"))
    if run.warnings:
        yield finding("warnings", " | ".join(run.warnings[:3]), warnings=many(len(run.warnings), "warning"))


def _checkpoint(run: Run) -> Iterator[Finding]:
    found = run.checkpoint
    for problem in found.get("problems") or ():
        yield finding(
            "checkpoint", problem, whole=few([str(each) for each in reversed(found["iterations"])]) or "none is"
        )
    flags = {
        name: value for name, value in (found.get("flags") or {}).items() if name in run.flags and _COMPARED.match(name)
    }
    differ = differing(flags, {name: run.flags[name] for name in flags}, "")
    if differ:
        yield finding("other flags", few(differ, 8), at=found["iteration"])
    if run.starts and found.get("iteration", 0) > run.iteration:
        yield finding("beyond", f"the record ends at {run.iteration}", at=found["iteration"])


CHECKS = (_ending, _text, _checkpoint, _resumes, _damage, _versions, _precision)
