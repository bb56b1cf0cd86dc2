"""All checks of a run, and their words."""

from __future__ import annotations

import textwrap
from typing import Any

from megatron_muon.monitor.doctor import history, losses, matrices, times
from megatron_muon.monitor.doctor.run import Run
from megatron_muon.monitor.doctor.words import SEVERITIES, Finding, many

_WIDTH = 110


def examine(run: Run) -> list[Finding]:
    """What is odd, the gravest first."""
    checks = (*losses.CHECKS, *history.CHECKS, *matrices.CHECKS, *times.CHECKS)
    found = [finding for check in checks for finding in check(run)]
    return sorted(found, key=lambda each: SEVERITIES.index(each.severity))


def looked_at(run: Run) -> dict[str, int]:
    """What was looked at, and for what -> how many there were."""
    points = run.train
    return {
        "losses (finite, falling, spikes)": sum(point.loss is not None for point in points),
        "evaluation(s) (finite, falling)": len(run.valid),
        "gradient norms (growth, clipping)": sum(point.norm is not None for point in points),
        "learning rates (jumps)": sum(point.rate is not None for point in points),
        "steps (skipped, gaps, early end)": sum(point.iterations for point in points),
        "times of steps (drift, slow ones, optimizer's share)": sum(point.seconds > 0 for point in points),
        "peaks of memory (growth)": sum(point.memory is not None for point in points),
        "attention logits (growth)": len(matrices.curve_of_logits(run)),
        "measured steps of Muon (alarms, rank, defect, ratios, zeros, weights)": len(run.measured) if run.series else 0,
        "classes of weights": len(run.series),
        "times of phases (waiting, exchange, balance)": len(run.times["step"].at) if "step" in run.times else 0,
        "start(s) (changed settings)": len(run.starts),
        "flags": len(run.flags),
        "versions": len(run.start.get("versions") or {}),
        "lines of text (errors, warnings)": run.text_lines,
        "checkpoints (whole, flags)": len(run.checkpoint.get("iterations") or ()),
    }


def plain(run: Run, findings: list[Finding]) -> dict[str, Any]:
    """For ``--json``."""
    return {
        "run": run.name,
        "state": run.state,
        "iteration": run.iteration,
        "train_iters": run.total,
        "findings": [vars(each) for each in findings],
        "looked_at": looked_at(run),
    }


def render(run: Run, findings: list[Finding]) -> str:
    """As text."""
    of = f" of {run.total}" if run.total else ""
    world = f", {many(run.start['world_size'], 'rank')}" if "world_size" in run.start else ""
    lines = [f"{run.name}: iteration {run.iteration}{of}, {run.state}; {many(len(run.starts), 'start')}{world}"]
    for number, each in enumerate(findings, start=1):
        lines += ["", f"{number}. {each.severity.upper()}: {each.title}"]
        for label, words in (("seen", each.seen), ("cause", each.cause), ("do", each.action)):
            first = f"   {label + ':':7}"
            lines += textwrap.wrap(
                words, _WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False
            )
    counts = looked_at(run)
    seen = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    lacking = ", ".join(name.partition(" (")[0] for name, count in counts.items() if not count)
    lines += [""] if findings else ["", "Nothing odd was found."]
    for words in (f"Looked at: {seen}.", f"Nothing there of: {lacking}." if lacking else ""):
        lines += textwrap.wrap(words, _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)
