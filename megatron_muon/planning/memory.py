"""How much memory the step of a rank takes beside weights, gradients and state: what is alive while it is rehearsed."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from megatron_muon.engine.exchange import Counters, Exchange
from megatron_muon.engine.execute import take_turns, work_on
from megatron_muon.engine.run import ChunkWork, Pause, RankChunk
from megatron_muon.engine.step import CHUNK_MB, MEBIBYTE, StepEngine
from megatron_muon.optimizers.storage import WINDOWS
from megatron_muon.optimizers.windows import OFFLOADED, Windows
from megatron_muon.planning.rehearsal import PLAIN_FORMS, Forms, Rehearsal, TorchPasses, tensors


class Memory(TorchDispatchMode):
    """Counts the bytes of the tensors that are made under it.

    Attributes:
        live: of those that are there.
        peak: the most that there were.
    """

    def __init__(self, given: Iterable[torch.Tensor] = ()) -> None:
        """
        Args:
            given: what is there before, and does not count.
        """
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}
        self.leave_out(*given)

    def leave_out(self, *given: torch.Tensor) -> None:
        """What does not count."""
        self._known |= {tensor.untyped_storage()._cdata: None for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in (result,) if isinstance(result, torch.Tensor) else tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                freed = partial(self._freed, storage._cdata, storage.nbytes())
                self._known[storage._cdata] = weakref.ref(storage, freed)
                self.hold(storage.nbytes())
        return result

    def hold(self, size: int) -> None:
        """So many bytes more are there, or fewer."""
        self.live += size
        self.peak = max(self.peak, self.live)

    def _freed(self, key: int, size: int, storage: object) -> None:
        del self._known[key]
        self.live -= size


Part = tuple[int, int, Pause | None]
"""Of the work on a chunk up to a pause: the most bytes that it adds, those that it leaves, and the pause."""

Known = dict[Any, tuple[list[Part], int]]
"""What the memory of the work on a chunk depends on -> its parts, and the bytes of the largest window."""


class Taken(NamedTuple):
    """Bytes that a rank takes for steps, beside weights, gradients and state.

    Attributes:
        peak: the most at once while it steps, windows apart.
        windows: of both windows of state on the host, which stay.
    """

    peak: int
    windows: int = 0


class _Windows(Windows):
    """Have no streams, and memory that an account leaves out."""

    def __init__(self, forms: Forms, account: Memory) -> None:
        super().__init__(OFFLOADED[forms.offload], forms.window_mb)
        self.bound, self._account = int((forms.window_mb or CHUNK_MB["cuda"]) * MEBIBYTE), account
        self._made: list[torch.Tensor] = []

    def _memory(self, window: Any, size: int) -> torch.Tensor:
        if window.memory is None or window.memory.numel() < size:
            with _disable_current_modes():
                window.memory = torch.empty(size, dtype=torch.uint8, device="meta")
            self._account.leave_out(window.memory)
            self._made.append(window.memory)  # no other one may have its name
        self.counters.largest = max(self.counters.largest, size)
        return window.memory


def memory_of_step(
    engine: StepEngine,
    group_ranks: Mapping[str, int],
    *,
    nesterov: bool,
    forms: Forms = PLAIN_FORMS,
    known: Known | None = None,
) -> Taken:
    """What steps of plain Muon take.

    Elementwise passes are torch's; kernels that do them need less. What a variant, a scale mode by norms, or decay of
    method ``l2`` makes does not count.

    Args:
        engine: of the rank; call this under the step's precision of float32 products.
        group_ranks: the rank's number in each group of the plan.
        nesterov: whether momentum is mixed with the gradient.
        forms: how numbers are kept.
        known: what has been found of chunks under the same options; those that are alike are carried out once.
    """
    known, account = {} if known is None else known, Memory()
    rehearsal, windows = Rehearsal(engine, group_ranks), [0]

    def work_on_one(mine: RankChunk) -> ChunkWork:
        if (key := _what_counts(mine)) not in known:
            known[key] = _parts(rehearsal, mine, nesterov, forms)
        parts, window = known[key]
        windows.append(window)
        for most, left, pause in parts:
            account.hold(most)
            account.hold(left - most)
            if pause is not None:
                yield pause

    take_turns(rehearsal.chunks, work_on_one)
    return Taken(account.peak, 2 * max(windows))


def _what_counts(mine: RankChunk) -> Hashable:
    """What the memory of the work on a chunk depends on."""
    batches = [(replace(batch, items=()), batch.count) for batch in mine.chunk.batches]
    own = [(each.counts, each.ranges) for each in mine.slices]
    return mine.chunk.mode, mine.rank, mine.in_order, *batches, *own


def _parts(rehearsal: Rehearsal, mine: RankChunk, nesterov: bool, forms: Forms) -> tuple[list[Part], int]:
    """Carry out the work on a chunk; also the bytes of the largest window."""
    exchanges = {name: Exchange(group, Counters(), sends=False) for name, group in rehearsal.groups.items()}
    memory = Memory()
    windows = None if forms.offload == "none" else _Windows(forms, memory)
    token = WINDOWS.set(windows)
    try:
        passes = TorchPasses(rehearsal.engine, [mine], nesterov, forms)
        memory.leave_out(*passes.given)
        parts = list(
            _carried_out(work_on(rehearsal.run(exchanges, passes.read, passes.write), mine), rehearsal, memory)
        )
    finally:
        WINDOWS.reset(token)
    return parts, 0 if windows is None else windows.counters.largest


def _carried_out(work: ChunkWork, rehearsal: Rehearsal, memory: Memory) -> Iterator[Part]:
    pause = cast(Pause | None, Pause.EXCHANGE)
    while pause is not None:
        before = memory.peak = memory.live
        with rehearsal.under(memory):
            pause = next(work, None)
        yield memory.peak - before, memory.live - before, pause
