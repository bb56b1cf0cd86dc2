"""Carries out a plan, several chunks at a time, so that messages of some are under way while others are computed.

Messages are asynchronous collectives, which NCCL runs on a stream of its own. Those of one group run one after the
other, in the order in which a rank asks for them, which must be the same on all its ranks. So chunks take turns with
those of their group alone: in an order that does not depend on what other groups a rank belongs to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from megatron_muon.engine.all_to_all import lent, owner, split
from megatron_muon.engine.clock import PRODUCTS
from megatron_muon.engine.modes import DISTRIBUTED, DUPLICATED, GRAM, LENT, LOCAL, OWNER, SPLIT
from megatron_muon.engine.run import ChunkWork, Pause, RankChunk, Run
from megatron_muon.engine.sharded import distributed, gram
from megatron_muon.engine.whole import duplicated, local

_WORK: dict[str, Callable[[Run, RankChunk], ChunkWork]] = {
    LOCAL: local,
    OWNER: owner,
    GRAM: gram,
    LENT: lent,
    SPLIT: split,
    DUPLICATED: duplicated,
    DISTRIBUTED: distributed,
}

_COMPUTING = 2
"""How many chunks of a group are between their first message and their result: while one multiplies, a message of the
other is under way. Another one's result may be on its way back: three chunks of a group are in memory at a time."""


def execute(run: Run, chunks: Sequence[RankChunk]) -> None:
    """Orthogonalize all matrices of some chunks, or do with them what the run's ``solve`` does.

    Args:
        run: what the work on every chunk needs.
        chunks: in the order of the plan. Those of one group are the same on all its ranks; so is the order of chunks
            of several groups on ranks that share them.
    """
    take_turns(chunks, partial(work_on, run))


def work_on(run: Run, mine: RankChunk) -> ChunkWork:
    """The work on one chunk: products, but where it says otherwise."""
    work = _WORK[mine.chunk.mode](run, mine)
    pause: Pause | None = Pause.EXCHANGE
    while pause is not None:
        run.place.part = mine
        with run.place.at(PRODUCTS):
            pause = next(work, None)
        if pause is not None:
            yield pause


def take_turns(chunks: Sequence[RankChunk], work_on: Callable[[RankChunk], ChunkWork]) -> None:
    """Do the work on some chunks, which ``work_on`` gives, in the order of :func:`execute`."""
    late: list[ChunkWork] = []
    groups = [mine.chunk.group for mine in chunks]
    turns = {
        group: _turns(map(work_on, [mine for mine in chunks if mine.chunk.group == group]), late) for group in groups
    }
    begun: set[str] = set()
    for index, group in enumerate(groups):
        for each in groups[index : index + 2]:  # the first message of the next group is sent early, too
            if each not in begun:
                begun.add(each)
                next(turns[each])
        next(turns[group])
        if index and groups[index - 1] not in groups[index:]:
            next(turns[groups[index - 1]], None)  # write the results of the group's last chunk
    if groups:
        next(turns[groups[-1]], None)
    for work in late:
        next(work, None)


def _turns(waiting: Iterator[ChunkWork], late: list[ChunkWork]) -> Iterator[None]:
    """The work on the chunks of one group.

    Yields when the first has begun, and when each is computed; after that the results of the last one are written. What
    pauses with :attr:`Pause.LATE` is added to ``late``, and finished by the caller.
    """
    computing: deque[ChunkWork] = deque()
    returning: list[ChunkWork] = []

    def begin(most: int) -> None:
        while len(computing) < most and (work := next(waiting, None)) is not None:
            next(work)
            computing.append(work)

    begin(1)
    yield
    while computing:
        begin(_COMPUTING)
        work = computing.popleft()
        pause = next(work, None)
        while returning:
            next(returning.pop(0), None)
        if pause is Pause.EXCHANGE:
            computing.append(work)
            continue
        if pause is Pause.COMPUTED:
            pause = next(work)
            (late if pause is Pause.LATE else returning).append(work)
        yield
    for work in returning:
        next(work, None)
