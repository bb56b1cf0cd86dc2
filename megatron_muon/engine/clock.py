"""How long the phases of a step take on this rank, see :data:`megatron_muon.monitor.schema.TIMES`."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from megatron_muon.monitor.schema import TIMES

PACK, EXCHANGE, PRODUCTS, WAITING, WRITE, STEP = "pack", "exchange", "products", "waiting", "write", "step"


class NoClock:
    """Measures nothing."""

    def enter(self, name: str) -> str:
        """From now on time is that of a phase ("": of none); gives the phase until now."""
        return ""

    def add(self, **counts: float) -> None:
        """Add to the numbers of :data:`megatron_muon.monitor.schema.TIMES` that are no times."""


NO_CLOCK = NoClock()


class Clock(NoClock):
    """Measures steps: at each moment one phase, the innermost that has begun.

    Nothing waits for the device meanwhile. On a GPU phases begin and end on the current stream, which waits where a
    host on the CPU does, so the times are the device's. Not for steps that are captured in a CUDA graph.
    """

    def __init__(self, device: torch.device) -> None:
        """
        Args:
            device: where the weights are.
        """
        self._is_gpu = device.type == "cuda"
        self._phase = ""
        self._marks: list[tuple[str, Any]] = []
        self._counts: Counter[str] = Counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within, time is that of a phase, as far as it is not that of one within it.

        Args:
            name: one of :data:`megatron_muon.monitor.schema.TIMES`; ``step`` for what is in no phase of its own.
        """
        before = self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def enter(self, name: str) -> str:
        """See :meth:`NoClock.enter`."""
        before, self._phase = self._phase, name
        if name != before:
            self._marks.append((name, self._now()))
        return before

    def add(self, **counts: float) -> None:
        """See :meth:`NoClock.add`."""
        self._counts.update(counts)

    def take(self) -> dict[str, float]:
        """What has been measured since the last call, by all names of :data:`megatron_muon.monitor.schema.TIMES`.

        The device must have done it all: call this when it has been waited for. ``step`` is the time of all phases.
        """
        found: dict[str, float] = {**dict.fromkeys(TIMES, 0.0), **self._counts}
        for (name, begin), (_, end) in itertools.pairwise(self._marks):
            seconds = begin.elapsed_time(end) / 1000.0 if self._is_gpu else end - begin
            for each in {name, STEP} if name else ():
                found[each] += seconds
        self._phase = ""
        self._marks.clear()
        self._counts.clear()
        return found

    def _now(self) -> Any:
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
