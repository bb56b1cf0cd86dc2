"""Where a rank is in its step, the phase and the chunk that it works on, so that what fails or hangs can say it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch.distributed as dist

from megatron_muon.engine.clock import NO_CLOCK, NoClock
from megatron_muon.engine.modes import DIVIDED, SPLIT
from megatron_muon.engine.plan import Chunk
from megatron_muon.errors import sizes

Peers = tuple[dist.ProcessGroup, Sequence[int] | None]
"""A group, and the numbers of those of its ranks that are meant; None: all."""


class Part(Protocol):
    """What a rank has of a chunk, see :class:`megatron_muon.engine.run.RankChunk`."""

    @property
    def chunk(self) -> Chunk:
        """The chunk."""

    @property
    def rank(self) -> int:
        """Number of the rank in the chunk's group."""


class Place:
    """Where this rank is in the step of one engine. Written by the thread that steps, read by any.

    Attributes:
        parts: the chunks of the step that is under way; empty between steps.
        part: the one that is worked on.
        phase: the innermost that has begun, one of :data:`megatron_muon.monitor.schema.TIMES`; empty between steps.
        peers: the ranks that the host waits for; None if it waits for none.
        moves: how often this rank has gone from one phase to another.
        clock: measures phases.
        left: on a GPU, a ``torch.cuda.Event`` that happens when the device has done the last step.
        groups: whose ranks exchange something in the step.
        step: number of the step, the same on all their ranks; one that failed and is taken again has another.
        limit: seconds in one place after which it is told; 0: never.
    """

    def __init__(self) -> None:
        self.parts: Sequence[Part] = ()
        self.part: Part | None = None
        self.phase = ""
        self.peers: Peers | None = None
        self.groups: Sequence[dist.ProcessGroup] = ()
        self.moves, self.step, self.limit = 0, 0, 0.0
        self.clock: NoClock = NO_CLOCK
        self.left: Any = None

    def begin(self, parts: Sequence[Part], clock: NoClock) -> None:
        """A step begins, with the work on some chunks."""
        self.part, self.phase, self.peers = None, "", None
        self.parts, self.clock = parts, clock
        self.step += 1
        self.moves += 1

    def end(self) -> None:
        """The host leaves the step."""
        self.parts = ()
        self.moves += 1

    def at(self, phase: str, peers: Peers | None = None) -> _At:
        """A context: within, this rank is in a phase. After an exception it stays there, for who tells of it."""
        return _At(self, phase, peers)

    def __str__(self) -> str:
        """As in ``phase exchange of chunk 3 of 12 (mode owner of the tensor-parallel group; 24 matrices of 64 x 32),
        waiting for ranks [0, 2]``."""
        # Another thread may write meanwhile.
        part, peers, parts = self.part, self.peers, self.parts
        text = f"phase {self.phase or 'between two'}"
        if part is not None:
            # Those of one group have the same numbers on all its ranks.
            same = [each for each in parts if each.chunk.group == part.chunk.group]
            number = next((number for number, each in enumerate(same, 1) if each is part), 0)
            group = f" of the {part.chunk.group} group" if part.chunk.group else ""
            batches = [f"{each.count} of {sizes((each.key.m, each.key.n))}" for each in part.chunk.batches]
            more = f" and {len(batches) - _SHAPES} more" if len(batches) > _SHAPES else ""
            matrices = ", ".join(batches[:_SHAPES]) + more
            text += f" of chunk {number} of {len(same)} (mode {part.chunk.mode}{group}; matrices: {matrices})"
        return text + (f", waiting for ranks {_others(peers)}" if peers is not None else "")

    @property
    def bytes(self) -> int:
        """Bytes of this rank's share of the matrices of the chunk, in float32."""
        if self.part is None:
            return 0
        found, rank = 0, self.part.rank
        for batch in self.part.chunk.batches:
            mode, key = batch.key.mode, batch.key
            if mode == SPLIT:
                found += batch.count * batch.counts[rank] * key.p
            elif mode in DIVIDED:
                found += batch.count * key.part_numel(rank)
            else:
                found += (batch.counts[rank] if batch.counts else batch.count) * key.m * key.n
        return 4 * found


_SHAPES = 4
"""How many shapes of a chunk are told."""


def _others(peers: Peers) -> list[int]:
    """The numbers in the run of other ranks."""
    group, some = peers
    every = dist.get_process_group_ranks(group)
    return [every[rank] for rank in (range(len(every)) if some is None else some) if rank != group.rank()]


class _At:
    """See :meth:`Place.at`. A class, since generators take thrice as long."""

    __slots__ = ("_before", "_outer", "_peers", "_phase", "_place")

    def __init__(self, place: Place, phase: str, peers: Peers | None) -> None:
        self._place, self._phase, self._peers = place, phase, peers

    def __enter__(self) -> None:
        place = self._place
        self._before, place.phase, place.peers = place.phase, self._phase, self._peers
        place.moves += 1
        self._outer = place.clock.enter(self._phase)

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if failure is None:
            place = self._place
            place.clock.enter(self._outer)
            place.phase, place.peers = self._before, None
            place.moves += 1
