"""What optimizers have to say about a run, beside the losses: for its text, its writers and its record.

Megatron's log is not told which optimizer it is about, and a process may have several: an actor's and a critic's. It is
about those that have stepped since it was written last.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Report", "Source", "SteppedSources", "report", "scalars"]


@dataclass(frozen=True)
class Report:
    """What is said after a logged iteration.

    Attributes:
        text: follows "after iteration N:"; nothing is printed if it is empty.
        record: entries of the iteration's JSON line.
    """

    text: str
    record: dict[str, Any]


class Source(Protocol):
    """Numbers of one optimizer.

    They may wait for the device, being asked for where Megatron has waited for it, and must not wait for other ranks:
    one rank alone is asked.

    Attributes:
        title: of the text.
        prefix: of the names of curves.
    """

    title: str
    prefix: str

    def report(self, iteration: int) -> Report:
        """Of the steps since the last call."""
        ...

    def scalars(self, iteration: int) -> dict[str, float]:
        """Points of curves, by name: of the last step."""
        ...


class SteppedSources:
    """The sources whose optimizer has stepped since they were taken last.

    An optimizer that is dropped takes its source along: nothing here keeps one alive.
    """

    def __init__(self) -> None:
        self._stepped: weakref.WeakSet[Source] = weakref.WeakSet()
        self._numbers: weakref.WeakKeyDictionary[Source, int] = weakref.WeakKeyDictionary()
        self._count = itertools.count()

    def watch(self, optimizer: Any, source: Source) -> None:
        """Take note of ``source`` in each step of its optimizer, from now on.

        In ``prepare_grads()``, which comes first in ``step()`` too: what drives several optimizers calls it.
        """
        self._numbers[source] = next(self._count)
        optimizer.prepare_grads = functools.partial(self._prepare, optimizer.prepare_grads, source)

    def _prepare(self, prepare: Callable[[], bool], source: Source) -> bool:
        self._stepped.add(source)
        return prepare()

    def take(self) -> list[Source]:
        """Those that have stepped since the last call, in the order of :meth:`watch`."""
        sources = sorted(self._stepped, key=self._numbers.__getitem__)
        self._stepped.clear()
        return sources


def report(sources: Iterable[Source], iteration: int) -> tuple[list[str], dict[str, Any]]:
    """The lines and the entries of the record after a logged iteration; see :class:`Source`."""
    lines: list[str] = []
    record: dict[str, Any] = {}
    for number, source in _numbered(sources):
        said = source.report(iteration)
        if said.text:
            lines.append(f"{source.title}{number and f' {number}'} after iteration {iteration}: {said.text}")
        record |= {f"{key}{number and f'_{number}'}": value for key, value in said.record.items()}
    return lines, record


def scalars(sources: Iterable[Source], iteration: int) -> dict[str, float]:
    """The points of all curves after an iteration, by their names; see :class:`Source`."""
    return {
        f"{source.prefix}{number and f'-{number}'}/{name}": value
        for number, source in _numbered(sources)
        for name, value in source.scalars(iteration).items()
    }


def _numbered(sources: Iterable[Source]) -> Iterable[tuple[str, Source]]:
    """The second, third, ... source of a title with its number; the first with ``""``."""
    found: dict[str, int] = {}
    for source in sources:
        found[source.title] = found.get(source.title, 0) + 1
        yield (str(found[source.title]) if found[source.title] > 1 else ""), source
