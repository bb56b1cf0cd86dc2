"""Where a rank is in its step: the phase and the chunk that it works on, kept so that what fails can say it."""

from __future__ import annotations

from megatron_muon.engine.clock import NO_CLOCK, NoClock


class Place:
    """Where this rank is in the step of one engine.

    Attributes:
        phase: the innermost that has begun, one of :data:`megatron_muon.monitor.schema.TIMES`; empty between steps.
        clock: measures phases.
    """

    def __init__(self) -> None:
        self.phase = ""
        self.clock: NoClock = NO_CLOCK

    def at(self, phase: str) -> _At:
        """A context: within, this rank is in a phase. After an exception it stays there, for who tells of it."""
        return _At(self, phase)


class _At:
    """See :meth:`Place.at`. A class, since generators take twice as long."""

    __slots__ = ("_before", "_outer", "_phase", "_place")

    def __init__(self, place: Place, phase: str) -> None:
        self._place, self._phase = place, phase

    def __enter__(self) -> None:
        place = self._place
        self._before, place.phase = place.phase, self._phase
        self._outer = place.clock.enter(self._phase)

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if failure is None:
            self._place.clock.enter(self._outer)
            self._place.phase = self._before
