"""What the bytes of a rank are: of which kind, of whose weights, and whether they are on the device or on the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

WEIGHTS = "model weights"
GRADIENTS = "gradients"
MASTERS = "master weights"
MOMENTUM = "momentum"
MOMENTS = "second moments and vectors"
SCALAR_MOMENTS = "moments of the scalar optimizer"
PADDING = "padding of buffers"
WINDOWS = "windows of state on the host"
COPIES = "float32 copies of gradients"
STEP = "buffers of Muon's step"

STATE = (MASTERS, MOMENTUM, MOMENTS, SCALAR_MOMENTS)
"""What the optimizer keeps between steps."""

IN_STEP = (COPIES, STEP)
"""What is there while the optimizer steps, when there are no activations."""

KINDS = (WEIGHTS, GRADIENTS, *STATE, PADDING, WINDOWS, *IN_STEP)

MUON, OTHERS, ALL = "muon", "scalar", "all"
"""Whose: of weights that Muon updates, with their rows under the scalar rule; of the others; of none in particular."""

FLOAT32_BYTES = 4

GIB = 2**30


def gib(size: float) -> str:
    """Bytes as text."""
    return f"{size / GIB:.2f} GiB"


@dataclass(frozen=True)
class Entry:
    """Some bytes of a rank.

    Attributes:
        kind: of :data:`KINDS`.
        whose: :data:`MUON`, :data:`OTHERS` or :data:`ALL`.
        on_host: whether they are on the host.
    """

    kind: str
    whose: str
    on_host: bool = False


@dataclass(frozen=True)
class Account:
    """The bytes of a rank."""

    entries: tuple[tuple[Entry, int], ...] = ()

    @classmethod
    def of(cls, entries: Mapping[Entry, int]) -> Account:
        """Of entries in any order; those of no bytes do not count."""
        some = [entry for entry, size in entries.items() if size]
        ordered = sorted(some, key=lambda entry: (KINDS.index(entry.kind), entry.whose, entry.on_host))
        return cls(tuple((entry, entries[entry]) for entry in ordered))

    def total(self, *kinds: str, whose: str | None = None, on_host: bool | None = False) -> int:
        """Bytes of some kinds; of all, if none is given.

        Args:
            kinds: which.
            whose: of these weights; None: of all.
            on_host: on the host, or (False) on the device; None: on both.
        """
        return sum(
            size
            for entry, size in self.entries
            if (not kinds or entry.kind in kinds) and whose in (None, entry.whose) and on_host in (None, entry.on_host)
        )

    def peak(self, activations: float = 0.0) -> float:
        """The most bytes on the device at once: activations are gone when the optimizer steps."""
        in_step = self.total(*IN_STEP)
        return self.total() - in_step + max(in_step, activations)
