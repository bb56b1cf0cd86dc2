"""The times of a step's phases on ranks, measured: what is slow is found where it is slow, and bits stay."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist

from megatron_muon import Muon
from megatron_muon.engine.clock import NO_CLOCK, Clock
from megatron_muon.engine.modes import EXACT
from megatron_muon.engine.place import Place
from megatron_muon.monitor.schema import TIMES
from megatron_muon.optimizers.stages import Variant
from megatron_muon.orthogonalize.products import TorchProducts
from tests.distributed.test_engine import MIXED, Given, random
from tests.pool import RankPool

SLOW = 0.25
CPU = torch.device("cpu")


class SlowProducts(TorchProducts):
    """Takes its time for each Gram matrix."""

    def gram(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(SLOW)
        return super().gram(x)


class SlowPacking(Variant):
    """Takes its time for each chunk that is packed."""

    seconds = 0.0

    def transform(self, batches: Sequence[torch.Tensor]) -> None:
        time.sleep(self.seconds)


def times_of(mode: str, slow: str) -> tuple[dict[str, float], float]:
    """What is measured of one step in which rank 1 is slow at something, and its seconds."""
    group, is_slow = dist.group.WORLD, dist.get_rank() == 1
    params = [Given((16, 32), 1).parameter(group, random((16, 32), seed, torch.float32)) for seed in range(2)]
    for param in params:
        param.grad = param.detach().clone()
    variant = SlowPacking()
    variant.seconds = SLOW if slow == "pack" and is_slow else 0.0
    optimizer = Muon(params, tp_group=group, tp_mode=mode, ns_dtype="fp32", variant=variant)
    engine = optimizer.prepare()
    if slow == "products" and is_slow:
        engine.orthogonalizer.products = SlowProducts()
    dist.barrier()
    engine.clock = clock = Clock(CPU)
    start = time.perf_counter()
    with clock.phase("step"):
        optimizer.step()
    return clock.take(), time.perf_counter() - start


def all_times(cases: list[tuple[str, str]]) -> list[tuple[dict[str, float], float]]:
    return [times_of(*case) for case in cases]


def test_the_slow_phase_of_a_rank_and_what_the_other_waits_for(pool: RankPool) -> None:
    cases = [("owner", "pack"), ("owner", "products"), ("gram", "products"), ("distributed", "products")]
    for case, (first, _), (second, seconds) in zip(cases, *pool.run(all_times, 2, cases), strict=True):
        mode, slow = case
        assert list(first) == list(TIMES)
        assert second[slow] > max(SLOW, first[slow] + SLOW / 2), case
        waits = "waiting" if mode == "owner" and slow == "products" else "exchange"
        assert first[waits] > SLOW / 2, case
        assert second[slow] + second["write"] <= second["step"] <= seconds
        assert sum(second[name] for name in ("pack", "exchange", "products", "waiting", "write")) <= second["step"]
        assert first["bytes"] > 0 and first["collectives"] >= 2 and first["chunks"] == 1


def bits_and_bytes(mode: str, measured: bool) -> tuple[list[torch.Tensor], float]:
    """The weights after two steps, and what the second sent: if it is measured, by its clock."""
    group = dist.group.WORLD
    params = [each.parameter(group, random(each.shape, seed, torch.float32)) for seed, each in enumerate(MIXED)]
    for param in params:
        param.grad = param.detach().clone()
    optimizer = Muon(params, tp_group=group, tp_mode=mode, ns_dtype="fp32", chunk_mb=0.002)
    optimizer.step()
    engine, clock = optimizer.prepare(), Clock(CPU)
    before, engine.clock = engine.counters.bytes, clock if measured else NO_CLOCK
    optimizer.step()
    sent = clock.take()["bytes"] if measured else engine.counters.bytes - before
    return [param.detach() for param in params], sent


def modes_that_differ() -> list[str]:
    found = []
    for mode in EXACT:
        (plain, sent), (measured, counted) = (bits_and_bytes(mode, each) for each in (False, True))
        if not all(map(torch.equal, plain, measured)) or not sent == counted > 0:
            found.append(mode)
    return found


def test_a_measured_step_has_the_same_bits(pool: RankPool) -> None:
    assert pool.run(modes_that_differ, 2) == [[], []]


def test_phases_within_phases_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0]).__next__)
    clock, place = Clock(CPU), Place()
    place.clock = clock
    with clock.phase("step"), place.at("write"), place.at("exchange"):
        pass
    assert clock.take() == dict.fromkeys(TIMES, 0.0) | {"write": 10.0, "exchange": 4.0, "step": 31.0}
    assert clock.take() == dict.fromkeys(TIMES, 0.0)


def test_no_clock_costs_next_to_nothing() -> None:
    """A chunk has some ten phases, and takes a millisecond at the least."""
    place, start = Place(), time.perf_counter()
    for _ in range(10000):
        with place.at("pack"):
            pass
    assert time.perf_counter() - start < 10000 * 2e-5
