"""The one way in which ranks share a value or a failure.

A rank that stops alone leaves the others waiting in their next collective, for minutes and without a reason. So what
may fail on one rank is done under :class:`Ranks`: all ranks learn of the failure, and all of them raise it.

Work that communicates is done in steps: each exchange in it is one of the same :class:`Ranks`, or follows one of theirs
with nothing between that may fail. Then a rank that has stopped meets the others in the next one, whichever it is::

    def build():
        mine = look()                   # a rank that fails here ends all of them ...
        ranks.gather(lambda: mine)      # ... here
        check()                         # and one that fails here ...
        return mine

    ranks.together(build)               # ... here
"""

from __future__ import annotations

import dataclasses
import math
import pickle
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Backend, BackendConfig

_SHARED = "shared_by"


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """What one rank has: a pickled value, or a pickled error, its type and message, and its traceback."""

    rank: int
    value: bytes = b""
    error: bytes = b""
    message: str = ""
    trace: str = ""


@dataclasses.dataclass(frozen=True)
class _Shared:
    """Who has raised an error together, and by which groups they have agreed."""

    ranks: frozenset[int]
    groups: tuple[dist.ProcessGroup, ...]


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Ranks that must agree.

    All of them must make the same calls in the same order; each call is one exchange of small objects in each group,
    on the groups' own backend.

    Attributes:
        groups: process groups that cover the ranks together, as rows and columns cover a grid: a model's
            model-parallel group and its data-parallel group. One group covers its own ranks; none, this process alone.
    """

    groups: tuple[dist.ProcessGroup, ...]

    @classmethod
    def of_world(cls) -> Ranks:
        """All ranks of the run, for what is theirs in common: flags, files. A model may live on fewer."""
        world = dist.group.WORLD  # None in a process without ranks
        return cls(()) if world is None else cls((world,))

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank of all."""
        return all(group.rank() == 0 for group in self.groups)

    @property
    def is_last(self) -> bool:
        """Whether this is the last rank of all: Megatron-Core's logs and writers are the last one's."""
        return all(group.rank() == group.size() - 1 for group in self.groups)

    def gather[T](self, work: Callable[[], T]) -> list[T]:
        """The results of ``work`` on every rank, in the same order everywhere (the first rank's first).

        Args:
            work: done on this rank; its result must be picklable, and small.

        Raises:
            Exception: on every rank, what ``work`` raised on the lowest rank that failed: the same type and message,
                with the rank in a note. A type that cannot be pickled becomes a ``RuntimeError`` that names it. What
                these ranks have raised together within ``work`` passes through.
        """
        return [value for _, value in self._numbered(work)]

    def by_number[T](self, work: Callable[[], T]) -> dict[int, T]:
        """The results of ``work`` on every rank, by the rank's number in the run; fails as :meth:`gather` does."""
        return dict(self._numbered(work))

    def _numbered[T](self, work: Callable[[], T]) -> list[tuple[int, T]]:
        if not self.groups:
            return [(0, work())]
        own: BaseException | None = None
        try:
            mine = _Outcome(dist.get_rank(), value=pickle.dumps(work()))
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # torch's CheckpointException is no Exception
            shared = vars(error).get(_SHARED)
            if shared is not None and shared.groups == self.groups:
                raise
            own = error
            message = _message(error)
            mine = _Outcome(dist.get_rank(), b"", _pickled(error, message), message, traceback.format_exc())
        outcomes = [mine]
        for group in self.groups:
            gathered: list[Any] = [None] * group.size()
            dist.all_gather_object(gathered, outcomes, group=group)
            outcomes = [outcome for part in gathered for outcome in part]
        self._raise_first(outcomes, mine, own)
        return [(outcome.rank, pickle.loads(outcome.value)) for outcome in outcomes]

    def together[T](self, work: Callable[[], T]) -> T:
        """This rank's result of ``work``, which need not be picklable; fails as :meth:`gather` does."""
        results: list[T] = []
        self.gather(lambda: results.append(work()))
        return results[0]

    def from_first[T](self, work: Callable[[], T]) -> T:
        """What the first rank alone finds by ``work``, on all ranks; fails as :meth:`gather` does.

        It may be large: it is sent once to each rank, after all have learned that there is one.
        """
        if not self.groups:
            return work()
        found = [b""]

        def look() -> None:
            if self.is_first:
                found[0] = pickle.dumps(work())

        self.together(look)
        for number, group in enumerate(self.groups):
            # From the first rank along its own row, then down each column: in the other rows nobody has it yet.
            if all(later.rank() == 0 for later in self.groups[number + 1 :]):
                dist.broadcast_object_list(found, group=group, group_src=0)
        value: T = pickle.loads(found[0])
        return value

    def to_first[T](self, work: Callable[[], T]) -> list[T] | None:
        """The results of ``work`` on the first rank, in the order of :meth:`gather`; None elsewhere.

        Args:
            work: done on every rank; its result must be picklable. Those of ranks beside one another should be of much
                the same size: each is padded to the largest.

        Raises:
            Exception: as :meth:`gather`.
        """
        if not self.groups:
            return [work()]
        found: list[bytes] = []
        self.together(lambda: found.append(pickle.dumps(work())))
        for number, group in enumerate(self.groups):
            if all(earlier.rank() == 0 for earlier in self.groups[:number]):
                gathered: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
                dist.gather_object(found, gathered, group=group, group_dst=0)
                found = [value for part in gathered or () for value in part]
        return [pickle.loads(value) for value in found] if self.is_first else None

    def reduce_max(self, tensor: torch.Tensor) -> None:
        """Make each element of ``tensor`` the largest of all ranks, in place, without waiting for the device.

        One all-reduce where these are the ranks of the run, one in each group otherwise.
        """
        self._reduce(tensor, dist.ReduceOp.MAX)

    def reduce_sum(self, tensor: torch.Tensor) -> None:
        """Make each element of ``tensor`` the sum over all ranks, likewise."""
        self._reduce(tensor, dist.ReduceOp.SUM)

    def _reduce(self, tensor: torch.Tensor, how: Any) -> None:
        groups = [group for group in self.groups if group.size() > 1]
        if len(groups) > 1 and math.prod(group.size() for group in groups) == dist.get_world_size():
            groups = [*self.of_world().groups]
        for group in groups:
            dist.all_reduce(tensor, op=how, group=group)

    def _raise_first(self, outcomes: Sequence[_Outcome], mine: _Outcome, own: BaseException | None) -> None:
        """Raise the error of the lowest rank that has one, if any has."""
        failed = [outcome for outcome in outcomes if outcome.error]
        if not failed:
            return
        first = min(failed, key=lambda outcome: outcome.rank)
        shared = _Shared(frozenset(outcome.rank for outcome in outcomes), self.groups)
        if own is not None and first.error == mine.error:
            vars(own)[_SHARED] = shared  # past a __setattr__ that lets nothing be set
            raise own
        try:
            error = pickle.loads(first.error)
        except Exception:  # a module that only the other rank has
            error = RuntimeError(first.message)
        vars(error).setdefault("__notes__", []).append(f"on rank {first.rank}:\n{first.trace}")
        vars(error)[_SHARED] = shared
        raise error from own


def backends_of(group: dist.ProcessGroup | None = None) -> Mapping[str, str]:
    """The backends of a group by the kinds of devices between which they send; None is the group of the run.

    Of ``nccl`` this is cuda alone; of ``gloo`` and ``cpu:gloo,cuda:nccl`` it is cpu, too.
    """
    return BackendConfig(Backend(dist.get_backend(group))).get_device_backend_map()


def ranks_with(error: BaseException) -> frozenset[int]:
    """The ranks that have raised ``error`` together, of which one is to tell the user; empty if none have agreed."""
    shared: _Shared | None = vars(error).get(_SHARED)
    return frozenset() if shared is None else shared.ranks


def _message(error: BaseException) -> str:
    """Type and message, whatever the type makes of being asked: a rank that failed here would be missed."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception as another:
        return f"{type(error).__name__} ({type(another).__name__} when asked for its message)"


def _pickled(error: BaseException, message: str) -> bytes:
    """``error``, pickled so that other ranks can load it."""
    vars(error).pop(_SHARED, None)  # an earlier agreement was among fewer ranks
    try:
        payload = pickle.dumps(error)
        if _message(pickle.loads(payload)) == message:  # an exception with arguments of its own may lose its message
            return payload
    except Exception:  # whatever its constructor makes of the arguments
        pass
    return pickle.dumps(RuntimeError(message))
