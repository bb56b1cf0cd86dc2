"""The engine of an optimizer step: holds the plan and carries it out."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_muon.engine.callbacks import Flops, Read, Solve, Write
from megatron_muon.engine.choose import choose_plan
from megatron_muon.engine.clock import NO_CLOCK, NoClock
from megatron_muon.engine.describe import describe
from megatron_muon.engine.exchange import Counters, Exchange
from megatron_muon.engine.execute import execute
from megatron_muon.engine.failure import explain
from megatron_muon.engine.modes import GRAM, LENT, LOCAL, OWNER, SPLIT, Machine, Sizes
from megatron_muon.engine.place import Place
from megatron_muon.engine.plan import Plan, Weight
from megatron_muon.engine.planner import Policy, items_of
from megatron_muon.engine.run import RankChunk, Run, WireDtypes
from megatron_muon.engine.watcher import WATCHER, limit_of
from megatron_muon.errors import ConfigError
from megatron_muon.orthogonalize.kernels import is_capturing
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer

MEBIBYTE = 1 << 20

CHUNK_MB = {"cuda": 256.0, "cpu": 16.0}
"""Default of ``chunk_mb``. On CPUs buffers of this size are used again; larger ones are new pages each time."""

_LOCAL_MB = {"cuda": 256.0, "cpu": 4.0}
"""The same of chunks that exchange nothing: there are no messages that more matrices would save."""

_LOCAL_MATRICES, _LOCAL_LEAST_MB = 3, 0.75
"""On CPUs, no more there than so many of the largest, or so much: optimizers that take one matrix after another
allocate four times the largest, and small models should not pay twice that here."""


class StepEngine:
    """Orthogonalizes the matrices of many weights at once.

    Attributes:
        plan: of the step; whoever steps must know that it is the same on all ranks of each group.
        parts: in how many parts each weight, by its index, is handed out in a step.
        counters: collectives, bytes and operations so far; see :class:`megatron_muon.engine.exchange.Counters`.
        clock: measures the steps that begin while it is set.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        groups: Mapping[str, dist.ProcessGroup],
        orthogonalizer: Orthogonalizer,
        *,
        mode: str,
        dtype: torch.dtype,
        wire_dtype: torch.dtype,
        chunk_mb: float,
        device: torch.device,
    ) -> None:
        """Plan the step; no communication.

        Args:
            weights: in the order in which the step will number them; if they have peers, those of all these ranks.
            groups: process group of each name in ``weights``.
            orthogonalizer: the iteration.
            mode: see :mod:`megatron_muon.engine.modes`.
            dtype: of the weights' momentum, and of matrices that stay on their rank.
            wire_dtype: dtype in which matrices are sent.
            chunk_mb: bound, in MiB, of the float32 matrices that a rank holds whole at once; 0: :data:`CHUNK_MB`.
            device: where the weights are.

        Raises:
            ConfigError: for what the mode cannot do.
        """
        for budget in dict.fromkeys([None, *(weight.layout.budget for weight in weights)] if mode == GRAM else []):
            if orthogonalizer.of(budget).restarts is None:
                raise ConfigError(
                    f"--muon-tp-mode gram: Gram Newton-Schulz is not accurate in {orthogonalizer.dtype} with "
                    f"{'these coefficients' if budget is None else f'a --muon-param-rule of {budget}'}. Use "
                    "--muon-ns-dtype fp16 or fp32, or --muon-tp-mode auto."
                )
        iteration = orthogonalizer.dtype
        # What comes back has been rounded to the iteration's dtype already.
        is_rounded = iteration.itemsize < wire_dtype.itemsize or (wire_dtype.itemsize < 4 and iteration.itemsize == 2)
        back = iteration if is_rounded else wire_dtype
        self.wire = WireDtypes(dtype=wire_dtype, back=back, gram=iteration, device=device)
        sizes = Sizes(wire_dtype.itemsize, self.wire.back.itemsize, self.wire.gram.itemsize)
        bound, local = chunk_mb or CHUNK_MB[device.type], chunk_mb or _local_mb(weights, mode, device.type)
        policy = Policy(mode, sizes, int(bound * MEBIBYTE), Machine.of(device.type), int(local * MEBIBYTE))
        self.orthogonalizer = orthogonalizer
        self.local_dtype = dtype
        peers = {weight.peers.group: weight.peers.span for weight in weights if weight.peers is not None}
        self.plan: Plan = choose_plan(weights, policy, orthogonalizer, {name: groups[name].rank() for name in peers})
        self._chunk_mb = bound if any(chunk.mode != LOCAL for chunk in self.plan.chunks) else local
        self._numbers = f"{iteration} {orthogonalizer.products.name} {self.wire} {peers}"
        self.counters = Counters()
        self.clock: NoClock = NO_CLOCK
        self._place = Place()
        named = self.plan.groups()
        if peers:  # whether matrices are lent is compared too, and what is lent may be divided
            named = sorted({*named, *peers, *(weight.group for weight in weights if weight.group)})
        self._exchanges = {name: Exchange(groups[name], self.counters, place=self._place) for name in named}
        self._place.groups = [groups[name] for name in named]
        self._place.limit = limit_of(self._place.groups, device)
        ranks = {"": 0} | {name: each.rank for name, each in self._exchanges.items()}
        # Keyed by the chunk itself: partial plans have the same chunks.
        self._mine = {
            id(chunk): RankChunk.of(self.plan.weights, chunk, ranks[chunk.group]) for chunk in self.plan.chunks
        }
        self.parts = Counter(number for mine in self._mine.values() for some in mine.slices for number in some.numbers)
        self._run = Run(orthogonalizer, self._exchanges, self.wire, dtype, self.counters, place=self._place)
        self._digests: dict[str, bytes] = {}

    def build(self) -> None:
        """Compile and tune the kernels that a step uses: by a step that sends nothing, once for chunks alike.

        Call it under the step's precision. Nothing happens where kernels are not compiled.
        """
        if not self.orthogonalizer.products.compiles:
            return
        counters = Counters()
        exchanges = {name: Exchange(each.group, counters, sends=False) for name, each in self._exchanges.items()}
        alike = {}
        for chunk in self.plan.chunks:
            shapes = ((replace(batch, items=()), batch.count) for batch in chunk.batches)
            alike[chunk.mode, chunk.group, *shapes] = self._mine[id(chunk)]
        # Batches keep what lies in memory: kernels are compiled for shapes and dtypes alone.
        run = replace(
            self._run,
            exchanges=exchanges,
            counters=counters,
            reads=(lambda slices, batches: None,),
            write=lambda slices, directions, reduce: None,
        )
        execute(run, list(alike.values()))

    @property
    def shares(self) -> bool:
        """Whether data-parallel ranks orthogonalize for one another."""
        return any(chunk.mode in (LENT, SPLIT) for chunk in self.plan.chunks)

    def describe(self) -> list[str]:
        """The step in words, for the report."""
        return describe(self.plan, self.orthogonalizer, {name: each.rank for name, each in self._exchanges.items()})

    @property
    def groups(self) -> list[str]:
        """Names of the groups whose ranks must hold the same plan."""
        return list(self._exchanges)

    def digest(self, group: str) -> bytes:
        """What the ranks of a group compare: their plans, types of numbers, kernels; see :meth:`Plan.digest`."""
        if group not in self._digests:
            chunks = [chunk for chunk in self.plan.chunks if chunk.group == group]
            spent = dict.fromkeys([None, *(batch.key.budget for chunk in chunks for batch in chunk.batches)])
            iterations = [self.orthogonalizer.of(budget).iteration for budget in spent]
            self._digests[group] = self.plan.digest(group, f"{iterations} {self._numbers}")
        return self._digests[group]

    def run(self, read: Read, write: Write, sub_plan: Plan | None = None) -> None:
        """Orthogonalize everything once.

        Args:
            read: fills batches with what is to be orthogonalized, see :data:`megatron_muon.engine.callbacks.Read`.
            write: takes the result, see :data:`megatron_muon.engine.callbacks.Write`.
            sub_plan: one of :meth:`Plan.sub_plans`, if not everything.
        """
        self._execute(replace(self._run, reads=(read,), write=write), sub_plan)

    def solve(self, reads: Sequence[Read], solve: Solve, write: Write, flops: Flops) -> None:
        """Compute something else from whole matrices: each at its owner, from several tensors.

        They are sent and packed in the dtype of the momentum.

        Args:
            reads: one for each tensor; each fills batches with it.
            solve: computes whole batches, see :data:`megatron_muon.engine.callbacks.Solve`.
            write: takes the result.
            flops: operations of ``solve`` for one matrix, for the counters.

        Raises:
            ValueError: if the plan has matrices without an owner (modes other than ``owner`` and ``blockwise``).
        """
        others = sorted({chunk.mode for chunk in self.plan.chunks} - {LOCAL, OWNER})
        if others:
            raise ValueError(f"whole matrices are wanted; in mode {others[0]} nobody owns them")
        wire = replace(self.wire, dtype=self.local_dtype, back=self.local_dtype)
        run = replace(self._run, wire=wire, reads=tuple(reads), write=write, solve=solve, solve_flops=flops)
        self._execute(run)

    def visit(self, look: Write, sub_plan: Plan | None = None) -> None:
        """Show all matrices, without orthogonalizing anything.

        Args:
            look: called for each chunk with its slices, batches of their shapes without contents (they take no memory,
                and cannot be written to), and a function that sums over the ranks.
            sub_plan: one of :meth:`Plan.sub_plans`, if not everything.
        """
        run = replace(self._run, write=look)
        with self._step(chunks := self._chunks(sub_plan)):
            for mine in chunks:
                run.place.part = mine
                run.unpack(mine, run.blanks(mine, self.local_dtype))

    def _execute(self, run: Run, sub_plan: Plan | None = None) -> None:
        with self._step(chunks := self._chunks(sub_plan)):
            execute(run, chunks)
        self.counters.steps += 1
        self.clock.add(chunks=sum(mine.works for mine in chunks))

    @contextlib.contextmanager
    def _step(self, chunks: Sequence[RankChunk]) -> Iterator[None]:
        """Within, it is known where this rank is in the work on some chunks, and its time is measured."""
        place, counters, before = self._place, self.counters, replace(self.counters)
        place.begin(chunks, self.clock)
        if place.limit:
            WATCHER.watch(place)
        try:
            yield
        except Exception as error:
            explain(place, error, self._chunk_mb)
            raise
        finally:
            place.end()
        if place.limit and self.wire.device.type == "cuda" and not is_capturing(self.wire.device):
            place.left = place.left or torch.cuda.Event()
            place.left.record()
        self.clock.add(bytes=counters.bytes - before.bytes, collectives=counters.collectives - before.collectives)

    def _chunks(self, sub_plan: Plan | None) -> list[RankChunk]:
        return [self._mine[id(chunk)] for chunk in (sub_plan or self.plan).chunks]


def _local_mb(weights: Sequence[Weight], mode: str, device: str) -> float:
    """The default bound, in MiB, of chunks that exchange nothing."""
    if device != "cpu":
        return _LOCAL_MB[device]
    largest = max((4 * key.m * key.n for key, _ in items_of(weights, mode)), default=0) / MEBIBYTE
    return min(_LOCAL_MB[device], max(_LOCAL_MATRICES * largest, _LOCAL_LEAST_MB))
