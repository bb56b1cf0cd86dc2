"""CUDA streams that remember what ran on them, and find what two of them do to one memory in no order.

Each stream has a clock; an event has the clocks of its stream when it is recorded, and who waits for it knows as much
from then on. An operation that touches memory which another stream has touched must know of that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses import FakeTensor

from tests.fake_cuda.world import World


@dataclass(frozen=True)
class Operation:
    """What ran on a stream.

    Attributes:
        stream: its number.
        name: of the operation.
        known: how much of each stream was known to be done.
        memory: the storages that it touched, by device and ``_cdata``: of a copy, the target first.
    """

    stream: int
    name: str
    known: tuple[int, ...]
    memory: tuple[tuple[str, int], ...]


@dataclass(eq=False)
class Event:
    """A CUDA event."""

    known: list[int] = field(default_factory=list)

    def record(self, stream: Stream | None = None) -> None:
        self.known = list((stream or _Now.streams.current).known)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or _Now.streams.current).wait_event(self)


@dataclass(eq=False)
class Stream:
    """A CUDA stream; ``known`` has how many operations of each stream it knows to be done."""

    number: int
    known: list[int]
    host_waits: int = 0

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self.known = [max(pair) for pair in zip(self.known, event.known, strict=True)]

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        self.host_waits += 1
        for each in _Now.streams.all:
            each.wait_stream(self)


class _Now:
    streams: Streams


class Streams:
    """All of a device: the first is the usual one.

    Attributes:
        operations: in the order in which the host has launched them.
    """

    def __init__(self, most: int = 4) -> None:
        self.all = [Stream(number, [0] * most) for number in range(most)]
        self.operations: list[Operation] = []
        self.current, self._made = self.all[0], 1
        self._touched: dict[tuple[str, int], dict[int, int]] = {}

    def new(self, *args: Any, **kwargs: Any) -> Stream:
        self._made += 1
        return self.all[self._made - 1]

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def seen(self, func: Any, args: Any, result: Any) -> None:
        """An operation is launched; see :attr:`tests.fake_cuda.watch.Watch.seen`."""
        if func._schema.name.rpartition("::")[2] in _VIEWS or any(
            each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns
        ):
            return
        tensors = [*_tensors(args), *_tensors((result,))]
        memory = tuple(dict.fromkeys((each.device.type, each.untyped_storage()._cdata) for each in tensors))
        stream = self.current
        stream.known[stream.number] += 1
        for place in memory:
            touched = self._touched.setdefault(place, {})
            for other, number in touched.items():
                assert stream.known[other] >= number, f"{func} on stream {stream.number}: stream {other} may be at it"
            touched[stream.number] = stream.known[stream.number]
        self.operations.append(Operation(stream.number, str(func), tuple(stream.known), memory))


_VIEWS = {"empty", "empty_strided", "empty_like", "detach", "set_", "record_stream"}


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values if isinstance(values, Sequence) and not isinstance(values, str) else ():
        if isinstance(value, FakeTensor):
            yield value
        else:
            yield from _tensors(value)


@contextlib.contextmanager
def streams(world: World) -> Iterator[Streams]:
    """Within, the streams of a world are watched."""
    found = _Now.streams = Streams()
    standing: dict[str, Any] = {
        "Stream": found.new,
        "Event": lambda *args, **kwargs: Event(),
        "current_stream": lambda device=None: found.current,
        "stream": found.on,
    }
    with contextlib.ExitStack() as stack:
        for name, value in standing.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(torch.Tensor, "record_stream", lambda self, stream: None))
        stack.enter_context(patch.object(world.watch, "seen", found.seen))
        yield found
