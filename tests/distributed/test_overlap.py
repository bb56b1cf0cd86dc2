"""In which order a rank asks for messages, multiplies, waits and writes: several chunks at a time, all ranks alike."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megatron_muon import Muon
from megatron_muon.engine import execute as executing
from megatron_muon.engine.exchange import Exchange, Pending
from megatron_muon.engine.modes import EXACT
from megatron_muon.engine.place import Place
from megatron_muon.engine.plan import Chunk
from megatron_muon.engine.run import ChunkWork, Pause, RankChunk, Run
from megatron_muon.orthogonalize.products import TorchProducts
from tests.distributed.test_engine import Given
from tests.distributed.test_engine import random as gaussian
from tests.pool import RankPool

Event = tuple[str, int]
"""What happens ("message", "wait", "product" or "write"), and for which chunk."""


class Trace:
    """Events of a step on this rank, and the messages of each group with their sizes."""

    def __init__(self, engine: Any) -> None:
        self.events: list[Event] = []
        self.messages: dict[str, list[tuple[str, int]]] = {}
        self.chunk = -1
        self._numbers = {id(chunk): number for number, chunk in enumerate(engine.plan.chunks)}
        self._names = {id(exchange): name for name, exchange in engine._exchanges.items()}
        engine.orthogonalizer.products = self._products()

    def step(self, optimizer: Muon) -> Trace:
        patches = [patch.object(Exchange, name, self._sending(name)) for name in ("all_to_all", "all_gather")]
        patches += [patch.object(Exchange, "all_reduce", self._sending("all_reduce"))]
        patches += [patch.object(Pending, "wait", self._noting("wait", Pending.wait))]
        patches += [patch.object(Run, "unpack", self._noting("write", Run.unpack))]
        patches += [patch.dict(executing._WORK, {mode: self._labelled(work) for mode, work in executing._WORK.items()})]
        for each in patches:
            each.start()
        try:
            optimizer.step()
        finally:
            for each in patches:
                each.stop()
        return self

    def _noting(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.events.append((what, self.chunk))
            return function(*args, **kwargs)

        return noted

    def _sending(self, name: str) -> Callable[..., Any]:
        send = self._noting("message", getattr(Exchange, name))

        def sent(exchange: Exchange, tensor: torch.Tensor, *args: Any) -> Any:
            # Ranks send parts of other sizes in all-to-alls.
            size = 0 if name == "all_to_all" else tensor.numel()
            self.messages.setdefault(self._names[id(exchange)], []).append((name, size))
            return send(exchange, tensor, *args)

        return sent

    def _labelled(self, work: Callable[[Run, RankChunk], ChunkWork]) -> Callable[[Run, RankChunk], ChunkWork]:
        def labelled(run: Run, mine: RankChunk) -> Iterator[Pause]:
            steps, number = work(run, mine), self._numbers[id(mine.chunk)]
            while True:
                self.chunk = number
                pause = next(steps, None)
                if pause is None:
                    return
                yield pause

        return labelled

    def _products(self) -> TorchProducts:
        class Noted(TorchProducts):
            gram = self._noting("product", TorchProducts.gram)
            quadratic = self._noting("product", TorchProducts.quadratic)
            apply = self._noting("product", TorchProducts.apply)
            multiply_add = self._noting("product", TorchProducts.multiply_add)

        return Noted()


def optimizer_of(given: list[Given], experts: dist.ProcessGroup | None = None, **options: Any) -> Muon:
    params = []
    for number, each in enumerate(given):
        group = experts if each.expert and experts is not None else dist.group.WORLD
        params.append(each.parameter(group, gaussian(each.shape, number, torch.float32)))
        params[-1].grad = params[-1].detach().clone()
    return Muon(params, tp_group=dist.group.WORLD, expert_tp_group=experts, ns_dtype="fp32", chunk_mb=0.001, **options)


def traced(given: list[Given], experts: dist.ProcessGroup | None = None, **options: Any) -> Trace:
    optimizer = optimizer_of(given, experts, **options)
    return Trace(optimizer.prepare()).step(optimizer)


def events_of(options: list[dict[str, Any]]) -> list[list[Event]]:
    """A chunk for each of four matrices of each rank."""
    return [traced([Given((16, 32), 1)] * 4 * dist.get_world_size(), **each).events for each in options]


def place(events: list[Event], event: Event) -> int:
    """Of the first such event."""
    return events.index(event)


def test_messages_are_under_way_while_other_chunks_multiply(pool: RankPool) -> None:
    """Between each message and the wait for it, but for those of the first and last chunk, another multiplies."""
    modes = ["owner", "gram", "distributed", "duplicated"]
    for rank in pool.run(events_of, 2, [{"tp_mode": mode} for mode in modes]):
        for mode, events in zip(modes, rank, strict=True):
            chunks = max(chunk for _, chunk in events) + 1
            assert chunks >= 4
            for chunk in range(chunks - 1 if mode in ("owner", "duplicated") else 1):  # the next one has begun
                assert place(events, ("message", chunk + 1)) < place(events, ("product", chunk)), mode
            exposed = []
            for chunk in range(1, chunks - 1):
                mine = [index for index, event in enumerate(events) if event in (("message", chunk), ("wait", chunk))]
                for sent, waited in zip(mine[::2], mine[1::2], strict=True):
                    assert (events[sent][0], events[waited][0]) == ("message", "wait")
                    if not any(what == "product" for what, _ in events[sent:waited]):
                        exposed.append((chunk, sent))
            assert not exposed, mode


def test_what_a_variant_sums_is_sent_before_the_next_results(pool: RankPool) -> None:
    for rank in pool.run(events_of, 2, [{"tp_mode": "owner", "scale_mode": "update_norm"}]):
        (events,) = rank
        for chunk in range(3):
            sums = [index for index, event in enumerate(events) if event == ("message", chunk)][2:]
            results = [index for index, event in enumerate(events) if event == ("message", chunk + 1)][1]
            assert sums and place(events, ("product", chunk + 1)) < sums[0] and sums[-1] < results


def messages_of_groups(modes: list[str]) -> list[dict[str, list[tuple[str, int]]]]:
    """Pairs of ranks have experts, the first pair more of them: chunks of all ranks lie among different others."""
    pair = dist.get_rank() // 2
    experts = [dist.new_group([first, first + 1]) for first in range(0, dist.get_world_size(), 2)][pair]
    given = [Given((16, 32), 1)] * 5 + [Given((16, 24), 1)] * 7 + [Given((8, 8), None)]
    given += [Given((16, 12), 1, expert=True)] * (7 if pair == 0 else 2)
    return [traced(given, experts, tp_mode=mode, scale_mode="update_norm").messages for mode in modes]


@pytest.mark.parametrize("world_size", [2, 4])
def test_messages_of_a_group_are_in_one_order_on_its_ranks(pool: RankPool, world_size: int) -> None:
    ranks = pool.run(messages_of_groups, world_size, EXACT)
    for number, mode in enumerate(EXACT):
        for rank, by_mode in enumerate(ranks):
            mine = by_mode[number]
            assert mine.keys() == {"tensor-parallel", "expert tensor-parallel"}
            assert mine["tensor-parallel"] == ranks[0][number]["tensor-parallel"], mode
            first = ranks[rank - rank % 2][number]
            assert mine["expert tensor-parallel"] == first["expert tensor-parallel"], mode


def test_the_order_in_a_group_does_not_depend_on_chunks_of_others() -> None:
    """Chunks of random numbers of pauses, in random places among those of two other groups."""
    shuffle, kinds = random.Random(0), {"short": 1, "owner": 0, "late": 0, "long": 5}
    for _ in range(50):
        mine = [("a", shuffle.choice([*kinds])) for _ in range(shuffle.randint(1, 6))]
        others = [(shuffle.choice(["b", ""]), shuffle.choice([*kinds])) for _ in range(shuffle.randint(0, 8))]
        places = sorted(shuffle.sample(range(len(mine) + len(others)), len(mine)))
        left, rest = iter(mine), iter(others)
        mixed = [next(left if index in places else rest) for index in range(len(mine) + len(others))]
        alone, among = pauses(mine, kinds), pauses(mixed, kinds)
        assert [event for event in among if event[0] == "a"] == alone
        assert len(among) == len(set(among))


def pauses(chunks: list[tuple[str, str]], kinds: dict[str, int]) -> list[tuple[str, int, int]]:
    """(group, number of the chunk in it, number of the turn) in the order in which the executor gives turns."""
    found: list[tuple[str, int, int]] = []
    numbers: dict[str, int] = {}

    def work(kind: str) -> Callable[[Any, RankChunk], ChunkWork]:
        def steps(run: Any, mine: RankChunk) -> ChunkWork:
            turns = [Pause.EXCHANGE] * max(1, kinds[kind])
            turns += {"owner": [Pause.COMPUTED, Pause.RETURN], "late": [Pause.COMPUTED, Pause.LATE]}.get(kind, [])
            for turn, pause in enumerate(turns):
                found.append((mine.chunk.group, mine.rank, turn))
                yield pause
            found.append((mine.chunk.group, mine.rank, len(turns)))

        return steps

    some = []
    for group, kind in chunks:
        numbers[group] = numbers.get(group, -1) + 1
        some.append(RankChunk(Chunk(kind, group, ()), numbers[group], (), (), False, (), ""))
    with patch.dict(executing._WORK, {kind: work(kind) for kind in kinds}):
        executing.execute(SimpleNamespace(place=Place()), some)  # type: ignore[arg-type]
    return found
