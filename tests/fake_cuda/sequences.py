"""What the ranks of a world have communicated, one after another, carried out together: do they meet?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from tests.fake_cuda.groups import Call

__all__ = ["check_meeting"]

_MESSAGES = ("send", "recv")


def check_meeting(sequences: Mapping[int, Sequence[Call]]) -> None:
    """Carry out the calls of all ranks, each rank's strictly one after the other: the worst that a backend may do.

    So it asks for more than NCCL, which runs the collectives of different groups side by side.

    Messages between two ranks of a group come after a collective of all its ranks, as NCCL wants them to
    (``torch.distributed.batch_isend_irecv``).

    Args:
        sequences: of each rank of the world.

    Raises:
        AssertionError: if ranks wait for one another, or what they send is not what the others expect.
    """
    for rank, calls in sequences.items():
        begun: set[str] = set()
        for call in calls:
            if call.kind not in _MESSAGES:
                begun.add(call.name)
            elif call.name not in begun:
                raise AssertionError(f"rank {rank}: the first communication of a group is between two ranks:\n{call}")
    at = dict.fromkeys(sequences, 0)
    mail = _Mail()
    progress = True
    while progress:
        progress = False
        for rank, calls in sequences.items():
            if at[rank] == len(calls):
                continue
            head = calls[at[rank]]
            if head.kind in _MESSAGES:
                batch = _batch(calls, at[rank])
                if mail.post(rank, at[rank], batch):
                    at[rank] += len(batch)
                    progress = True
                continue
            members = [(each, _head(sequences, at, each)) for each in head.group]
            if all(call is not None and call.name == head.name and call.kind not in _MESSAGES for _, call in members):
                _check_collective([call for _, call in members if call is not None])
                for member, _ in members:
                    at[member] += 1
                progress = True
    stuck = {rank: calls[at[rank]] for rank, calls in sequences.items() if at[rank] < len(calls)}
    if stuck:
        raise AssertionError("ranks wait for one another:\n" + "\n".join(f"rank {r}: {c}" for r, c in stuck.items()))
    mail.check_empty()


def _head(sequences: Mapping[int, Sequence[Call]], at: Mapping[int, int], rank: int) -> Call | None:
    calls = sequences[rank]
    return calls[at[rank]] if at[rank] < len(calls) else None


def _batch(calls: Sequence[Call], start: int) -> list[Call]:
    """The messages that are sent and received at once, from number ``start`` on."""
    first = calls[start]
    if not first.batch:
        return [first]
    stop = start
    while stop < len(calls) and (calls[stop].batch, calls[stop].name) == (first.batch, first.name):
        stop += 1
    return list(calls[start:stop])


def _check_collective(calls: Sequence[Call]) -> None:
    """Calls of all ranks of a group, in the order of the group."""

    def alike(what: str, values: Sequence[object]) -> None:
        if len(set(values)) > 1:
            told = "\n".join(map(str, calls))
            raise AssertionError(f"the {what} differ: {list(values)}\n{told}")

    alike("kinds", [call.kind for call in calls])
    alike("dtypes", [call.dtype for call in calls])
    alike("roots", [call.peer for call in calls])
    assert [call.rank for call in calls] == list(range(len(calls)))
    if calls[0].kind == "all_to_all":
        for sender in calls:
            for receiver in calls:
                sent, expected = sender.sent[receiver.rank], receiver.taken[sender.rank]
                if sent != expected:
                    raise AssertionError(
                        f"rank {sender.rank} sends {sent} bytes to rank {receiver.rank}, which expects {expected}:\n"
                        f"{sender}\n{receiver}"
                    )
    elif calls[0].kind in ("gather", "scatter"):  # only the root has the parts of all
        alike("sizes", [call.sent if call.kind == "gather" else call.taken for call in calls])
    elif calls[0].kind == "all_gather uneven":
        alike("sizes", [call.taken for call in calls])
        assert all(call.sent == (call.taken[call.rank],) for call in calls), calls
    elif calls[0].kind == "broadcast":
        alike("sizes", [call.sent for call in calls])
    else:
        alike("sizes", [(call.sent, call.taken) for call in calls])


class _Mail:
    """Messages between two ranks of a group, by the order in which they were asked for."""

    def __init__(self) -> None:
        self._sides: dict[str, dict[tuple[object, ...], list[Call]]] = {kind: defaultdict(list) for kind in _MESSAGES}
        self._posted: dict[tuple[int, int], list[tuple[Call, int]]] = {}

    def post(self, rank: int, number: int, batch: Sequence[Call]) -> bool:
        """Ask for messages; whether all of them have been answered."""
        if (rank, number) not in self._posted:
            asked = self._posted[rank, number] = []
            for call in batch:
                side = self._sides[call.kind][self._pair(call)]
                asked.append((call, len(side)))
                side.append(call)
        return all(self._answered(call, place) for call, place in self._posted[rank, number])

    def _answered(self, call: Call, place: int) -> bool:
        other = "recv" if call.kind == "send" else "send"
        answers = self._sides[other][self._pair(call)]
        if place >= len(answers):
            return False
        answer = answers[place]
        sent, taken = (call, answer) if call.kind == "send" else (answer, call)
        if (sent.sent, sent.dtype) != (taken.taken, taken.dtype):
            raise AssertionError(f"a message that is not what is expected:\n{sent}\n{taken}")
        return True

    def check_empty(self) -> None:
        """Refuse messages that nobody has asked for."""
        for pair in {*self._sides["send"], *self._sides["recv"]}:
            assert len(self._sides["send"][pair]) == len(self._sides["recv"][pair]), pair

    @staticmethod
    def _pair(call: Call) -> tuple[object, ...]:
        return (call.name, call.rank, call.peer) if call.kind == "send" else (call.name, call.peer, call.rank)
