"""Checks of time and memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from megatron_muon.monitor.doctor.run import Run
from megatron_muon.monitor.doctor.words import Finding, finding


def _steps(run: Run) -> Iterator[Finding]:
    points = [point for point in run.train if not point.is_fresh and point.seconds > 0]
    seconds, quarter = [point.seconds for point in points], len(points) // 4
    if quarter < 10:
        return
    early, late, usual = median(seconds[:quarter]), median(seconds[-quarter:]), median(seconds)
    if late > 1.2 * early:
        seen = f"median {early:.3g} s in the first quarter of the record, {late:.3g} s in the last"
        yield finding("slower", f"{seen}: {late / early:.2f} times")
    slow = [point for point in points if point.seconds > 2 * usual]
    lost = sum((point.seconds - usual) * point.iterations for point in slow)
    lost /= sum(point.seconds * point.iterations for point in points)
    if lost > 0.05:
        seen = f"usual {usual:.3g} s a step, largest {max(seconds):.3g} s, first at {slow[0].iteration}"
        yield finding(
            "slow lines", f"{seen}; {lost:.0%} of all time is lost there", count=f"{len(slow)} of {len(points)}"
        )
    shares = [point.optimizer / point.seconds for point in points if point.optimizer is not None]
    if shares and median(shares) > 0.25:
        seen = f"median of {len(shares)} lines; a step takes {usual:.3g} s"
        yield finding("share", seen, share=median(shares))


def _phases(run: Run) -> Iterator[Finding]:
    def of(name: str, part: str = "mean") -> float:
        values = [value for value in getattr(run.times.get(name), part, ()) if math.isfinite(value)]
        return median(values) if values else 0.0

    step, work, waiting, exchange, chunks = map(of, ("step", "products", "waiting", "exchange", "chunks"))
    uneven = of("products", "largest") / work if work else 1.0
    if step and waiting > 0.15 * step:
        seen = f"mean over the ranks {waiting:.3g} s of {step:.3g} s, {of('waiting', 'largest'):.3g} s on the one that "
        seen += f"waits most; Newton-Schulz takes {work:.3g} s in the mean, {uneven:.2f} times that on the busiest rank"
        yield finding("waiting", seen, share=waiting / step)
    elif work > 0.2 * step and uneven > 1.3:
        seen = (
            f"Newton-Schulz takes {work:.3g} s of {step:.3g} s in the mean, {uneven:.2f} times that on the busiest rank"
        )
        yield finding("uneven", seen)
    if step and exchange > 0.3 * step:
        seen = f"mean over the ranks {exchange:.3g} s of {step:.3g} s; a rank sends {of('bytes') / 2**20:.4g} MiB in "
        seen += f"{of('collectives'):.0f} collectives for {chunks:.0f} chunks"
        yield finding("one chunk" if 0 < chunks < 1.5 else "exchange", seen, share=exchange / step)


def _memory(run: Run) -> Iterator[Finding]:
    peaks = [point.memory for point in run.train if point.memory is not None and not point.is_fresh]
    middle, last = (peaks[len(peaks) // 2], peaks[-1]) if len(peaks) >= 20 else (0.0, 0.0)
    if last > 1.03 * middle:
        yield finding("memory", f"{middle / 2**30:.3g} GiB at half of the record, {last / 2**30:.3g} GiB at its end")


CHECKS = (_steps, _phases, _memory)
