"""Tells of a step that hangs, before process groups give up: where this rank is in it, and for whom it waits.

When a collective's time is over, gloo raises in those that wait, and NCCL ends the process; neither knows of chunks. So
a thread looks, once in a while, whether each step that sends anything goes on.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist

from megatron_muon.engine.failure import first_failure
from megatron_muon.engine.place import Place

_SHARE = 0.75
"""Of the time-out, after which it is told where a rank is."""

_ASK = 4.0
"""Seconds in one place after which a rank asks whether another has failed; again after twice as long, and so on."""


def limit_of(groups: Iterable[dist.ProcessGroup], device: torch.device) -> float:
    """Seconds in one place after which it is told, before the first of some groups gives up; 0 if none tells when."""
    found = []
    for group in groups:
        with contextlib.suppress(AttributeError, RuntimeError):  # not all backends have options
            found.append(group._get_backend(device).options._timeout.total_seconds())
    return _SHARE * min(found, default=0.0)


@dataclass
class _Stay:
    """For how long a rank is in one place.

    Attributes:
        moves: as of :class:`megatron_muon.engine.place.Place`.
        since: when it was first seen there.
        ask: seconds after which it asks for failures of others.
        is_told: whether this has been told.
    """

    moves: int
    since: float
    ask: float
    is_told: bool = False


class Watcher:
    """Watches all steps of this process, by a thread that ends when there are no optimizers any more."""

    def __init__(self) -> None:
        self._places: WeakSet[Place] = WeakSet()
        self._stays: WeakKeyDictionary[Place, _Stay] = WeakKeyDictionary()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def watch(self, place: Place) -> None:
        """From now on look at the steps of one engine."""
        if self._thread is not None and self._thread.is_alive() and place in self._places:
            return
        with self._lock:
            self._places.add(place)
            if self._thread is None or not self._thread.is_alive():  # in a forked process it is not
                self._thread = threading.Thread(target=self._run, name="megatron_muon watcher", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while (period := self._look()) > 0.0:
            time.sleep(period)

    def _look(self) -> float:
        """Look at all places; seconds until the next look, 0 if there are none."""
        with self._lock:
            places = list(self._places)
            if not places:
                self._thread = None
                return 0.0
        for place in places:
            with contextlib.suppress(RuntimeError, ValueError, KeyError):  # its groups may be destroyed meanwhile
                self._look_at(place)
        return min(_ASK / 2, *(max(place.limit / 16, 0.05) for place in places))

    def _look_at(self, place: Place) -> None:
        now, stay = time.monotonic(), self._stays.get(place)
        if stay is None or stay.moves != place.moves:
            self._stays[place] = _Stay(place.moves, now, _ASK)
            return
        seconds = now - stay.since
        if stay.is_told or (not place.parts and place.left is None):
            return
        told = ""
        if seconds >= stay.ask:
            stay.ask = 2 * seconds
            if first := first_failure(place):
                told = f"another rank has failed in the step: {first}. This rank is in {place}."
        if not told and seconds >= place.limit:
            stay.is_told = True
            told = _late(place, seconds)
        if told and place.moves == stay.moves:
            stay.is_told = True
            print(f"megatron_muon: rank {dist.get_rank()}: {told}", file=sys.stderr, flush=True)


def _late(place: Place, seconds: float) -> str:
    """What is told of a step that does not go on; empty if the device has done it."""
    after = f"The process group gives up after {place.limit / _SHARE:.3g} s."
    if place.parts:
        told = f"the optimizer's step has not gone on for {seconds:.3g} s: {place}. "
        if place.left is not None:
            return f"{told}That is where the host is, the device may be at an earlier chunk. {after}"
        if place.peers is None:
            return f"{told}Other ranks may be waiting for this one. {after}"
        return f"{told}Another rank is late: look at its log, or at its stack. {after}"
    # No step has begun for long, so none is being captured, where a query would be an error.
    if place.left.query():
        return ""
    return (
        f"the host has left the optimizer's step {seconds:.3g} s ago, and the device has not done it: another rank may "
        f"be late, look at its log, or at its stack. {after}"
    )


WATCHER = Watcher()
"""That of this process."""
