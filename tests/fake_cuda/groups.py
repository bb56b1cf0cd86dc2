"""Process groups that record what a rank asks for, and send nothing: every rank of a world, one at a time.

They stand in for NCCL's and gloo's own, by the names of these, so that code that asks for the backend goes the way that
it goes on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

__all__ = ["Call", "Handle", "Listener", "RecordedGroup", "recorded_groups"]


@dataclass(frozen=True)
class Call:
    """One communication of one rank.

    Attributes:
        kind: name of the collective; ``send`` and ``recv`` between two ranks.
        group: its ranks, by their numbers in the world.
        rank: the rank that called, by its number in the group.
        sent: how many bytes go to each rank of the group; of ``all_reduce``, ``broadcast`` and so on one number.
        taken: how many bytes come from each.
        dtype: of the numbers that are sent, also where their bytes are.
        peer: the other rank, or the root, by its number in the group; -1 if there is none.
        batch: number of the batch of messages that it belongs to; 0: none.
        name: of the group: two of the same ranks are two all the same.
        where: file and function that asked for it.
    """

    kind: str
    group: tuple[int, ...]
    rank: int
    sent: tuple[int, ...]
    taken: tuple[int, ...]
    dtype: torch.dtype
    peer: int = -1
    batch: int = 0
    name: str = ""
    where: str = field(default="", compare=False)


class Listener(Protocol):
    """Who is told of communication."""

    def started(self, call: Call, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> int:
        """A communication begins; the number by which :meth:`waited` will name it."""

    def waited(self, number: int) -> None:
        """Its work has been waited for."""

    def place(self) -> str:
        """File and function that is being carried out."""

    def dtype_of(self, tensor: torch.Tensor) -> torch.dtype:
        """Of the numbers in a tensor's memory, also if it is a view of their bytes."""


class Handle(dist.Work):
    """What an asynchronous communication returns."""

    def __init__(self, listener: Listener, numbers: Sequence[int]) -> None:
        super().__init__()
        self._listener, self._numbers = listener, list(numbers)

    def wait(self, timeout: Any = None) -> bool:
        """As of ``torch.distributed.Work``."""
        for number in self._numbers:
            self._listener.waited(number)
        return True

    def is_completed(self) -> bool:
        """As of ``torch.distributed.Work``; a host that asks may as well wait."""
        raise AssertionError("Work.is_completed: the host looks at the device")


class RecordedGroup(dist.ProcessGroup):
    """A process group of one rank of a world, by the methods that ``torch.distributed`` calls."""

    supports_coalescing = True

    def __init__(self, rank: int, ranks: Sequence[int], name: str, backend: str, listener: Listener) -> None:
        super().__init__(rank, len(ranks))
        self._name = name
        self._rank, self._ranks, self._backend, self._listener = rank, tuple(ranks), backend, listener
        self._batch: list[int] | None = None
        self._batches = 0

    # What torch.distributed asks a group.

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return len(self._ranks)

    def getBackendName(self) -> str:  # noqa: N802
        return self._backend

    @property
    def pg_name(self) -> str:
        return distributed_c10d._world.pg_names[self]

    group_name = pg_name

    def _get_backend(self, device: torch.device) -> RecordedGroup:
        return self

    def _start_coalescing(self, device: torch.device) -> None:
        self._batch, self._batches = [], self._batches + 1

    def _end_coalescing(self, device: torch.device) -> Handle:
        numbers, self._batch = self._batch or [], None
        return Handle(self._listener, numbers)

    def __repr__(self) -> str:
        return f"{self._backend} group of ranks {list(self._ranks)}"

    # Communication.

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> Handle:
        return self._start("all_reduce", tensors, tensors)

    allreduce_coalesced = allreduce

    def broadcast(self, tensors: list[torch.Tensor], opts: Any = None) -> Handle:
        mine = opts.rootRank == self._rank
        return self._start("broadcast", tensors, () if mine else tensors, peer=opts.rootRank)

    def reduce(self, tensors: list[torch.Tensor], opts: Any = None) -> Handle:
        return self._start("reduce", tensors, tensors, peer=opts.rootRank)

    def all_gather_single(self, output: torch.Tensor, tensor: torch.Tensor, opts: Any = None) -> Handle:
        assert output.numel() == tensor.numel() * self.size(), "sizes of an all-gather"
        return self._start("all_gather", [tensor], [output])

    _allgather_base = all_gather_single

    def allgather(self, outputs: list[list[torch.Tensor]], tensors: list[torch.Tensor], opts: Any = None) -> Handle:
        sizes = tuple(_bytes(each) for each in outputs[0])
        # Unequal sizes are several broadcasts.
        kind = "all_gather" if len(set(sizes)) == 1 else "all_gather uneven"
        return self._start(kind, tensors, outputs[0], taken=sizes)

    def reduce_scatter_single(self, output: torch.Tensor, tensor: torch.Tensor, opts: Any = None) -> Handle:
        assert tensor.numel() == output.numel() * self.size(), "sizes of a reduce-scatter"
        return self._start("reduce_scatter", [tensor], [output])

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter(self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], opts: Any = None) -> Handle:
        return self._start("reduce_scatter", inputs[0], outputs)

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Handle:
        return self._start("all_gather", inputs, outputs)

    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Handle:
        return self._start("reduce_scatter", inputs, outputs)

    def all_to_all_single(
        self, output: torch.Tensor, tensor: torch.Tensor, taken: list[int], given: list[int], opts: Any = None
    ) -> Handle:
        sent, received = (
            tuple(_rows(each) * size for size in splits) if splits else (_bytes(each) // self.size(),) * self.size()
            for each, splits in ((tensor, given), (output, taken))
        )
        assert sum(sent) == _bytes(tensor) and sum(received) == _bytes(output), "sizes of an all-to-all"
        return self._start("all_to_all", [tensor], [output], sent=sent, taken=received)

    alltoall_base = all_to_all_single

    def alltoall(self, outputs: list[torch.Tensor], tensors: list[torch.Tensor], opts: Any = None) -> Handle:
        sent, taken = (tuple(map(_bytes, each)) for each in (tensors, outputs))
        return self._start("all_to_all", tensors, outputs, sent=sent, taken=taken)

    def gather(self, outputs: list[list[torch.Tensor]], tensors: list[torch.Tensor], opts: Any = None) -> Handle:
        return self._start("gather", tensors, outputs[0] if outputs else (), peer=opts.rootRank)

    def scatter(self, outputs: list[torch.Tensor], tensors: list[list[torch.Tensor]], opts: Any = None) -> Handle:
        return self._start("scatter", tensors[0] if tensors else (), outputs, peer=opts.rootRank)

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int = 0) -> Handle:
        return self._start("send", tensors, (), peer=peer)

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int = 0) -> Handle:
        return self._start("recv", (), tensors, peer=peer)

    def barrier(self, opts: Any = None) -> Handle:
        return self._start("barrier", (), ())

    def _start(
        self,
        kind: str,
        reads: Sequence[torch.Tensor],
        writes: Sequence[torch.Tensor],
        *,
        sent: tuple[int, ...] | None = None,
        taken: tuple[int, ...] | None = None,
        peer: int = -1,
    ) -> Handle:
        sent = (sum(map(_bytes, reads)),) if sent is None else sent
        taken = (sum(map(_bytes, writes)),) if taken is None else taken
        dtype = next((self._listener.dtype_of(each) for each in (*reads, *writes)), torch.uint8)
        batch = self._batches if self._batch is not None else 0
        call = Call(kind, self._ranks, self._rank, sent, taken, dtype, peer, batch, self._name, self._listener.place())
        number = self._listener.started(call, reads, writes)
        if self._batch is not None:
            self._batch.append(number)
        return Handle(self._listener, [] if self._batch is not None else [number])


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _rows(tensor: torch.Tensor) -> int:
    """Bytes in one place of the first dimension."""
    return tensor.stride(0) * tensor.element_size() if tensor.dim() else tensor.element_size()


@contextmanager
def recorded_groups(rank: int, ranks: int, listener: Listener) -> Iterator[None]:
    """This process is ``rank`` of a world of recorded groups, that ``dist.new_group`` makes, of any backend."""
    plugins: dict[str, Any] = distributed_c10d.Backend._plugins
    before = dict(plugins)

    def creator(backend: str) -> Callable[..., RecordedGroup]:
        def create(options: Any, _: Any) -> RecordedGroup:
            its = options.global_ranks_in_group or range(ranks)
            return RecordedGroup(options.group_rank, its, options.group_id, backend, listener)

        return create

    for backend in ("nccl", "gloo"):
        plugins[backend.upper()] = distributed_c10d.Backend._BackendPlugin(creator(backend), True)
    try:
        dist.init_process_group("nccl", rank=rank, world_size=ranks, store=dist.HashStore())
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        plugins.clear()
        plugins.update(before)
