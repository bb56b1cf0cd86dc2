"""A rank that hangs in the middle of a step: the others end in time, and say where they waited and for whom."""

from __future__ import annotations

import contextlib
import gc
import io
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from megatron_muon import Muon
from megatron_muon.engine.clock import NO_CLOCK
from megatron_muon.engine.place import Place
from megatron_muon.engine.watcher import WATCHER, Watcher
from tests.fake_cuda.world import COMPARISON, FIRST_STEP, World
from tests.launch import GRACE_S, launch, torchrun
from tests.pool import RankPool
from tests.reliability.steps import Fault, step_of

LIMIT = 6.0
"""Seconds after which groups give up."""

SLEEP = 1.5 * LIMIT
SLACK = 5.0
"""Seconds that a busy machine may add."""

SCRIPT = str(Path(__file__).with_name("steps.py"))


def ends(kinds: list[str]) -> list[dict[str, Any]]:
    """How each kind of step ends on this rank, and what is printed meanwhile."""
    found = []
    for kind in kinds:
        step = step_of(kind, LIMIT, Fault("sleep", SLEEP))
        dist.barrier()
        start, printed = time.monotonic(), io.StringIO()
        with contextlib.redirect_stderr(printed), pytest.raises(RuntimeError) as failure:
            step()
        notes = [*failure.value.__notes__]
        found.append({"seconds": time.monotonic() - start, "notes": notes, "printed": printed.getvalue()})
        del step, failure
        dist.barrier()
    return found


def test_who_waits_ends_in_time_and_says_where_it_waited(pool: RankPool) -> None:
    """All three are in the same chunk; who sleeps says that it may be the one that the others wait for."""
    places = {
        "owner": ("exchange", "pack", "chunk 2 of 3 (mode owner of the tensor-parallel group; matrices: 3 of 16 x 96)"),
        "lent": ("waiting", "products", "chunk 2 of 3 (mode lent of the data group; matrices: 2 of 256 x 256)"),
    }
    for (first, second, third), (waits, sleeps, chunk) in zip(
        zip(*pool.run(ends, 3, [*places]), strict=True), places.values(), strict=True
    ):
        for rank, others, its in ((0, [1, 2], first), (2, [0, 1], third)):
            assert its["seconds"] < LIMIT + SLACK
            place = f"phase {waits} of {chunk}, waiting for ranks {others}"
            assert its["notes"][0] == f"Muon: rank {rank} was in {place}."
            assert its["printed"].startswith(f"megatron_muon: rank {rank}: the optimizer's step has not gone on for ")
            assert f"s: {place}. Another rank is late" in its["printed"] and its["printed"].count("\n") == 1
            assert "The process group gives up after 6 s." in its["printed"]
        assert f"phase {sleeps} of {chunk}. Other ranks may be waiting for this one." in second["printed"]
        assert "another rank failed before: rank " in second["notes"][1], "who comes late learns why it is alone"
        assert "timed out" in (why := second["notes"][1].lower()) or "timeout" in why, "in one of gloo's wordings"


@pytest.mark.slow
def test_a_hanging_process_does_not_outlive_the_others() -> None:
    start = time.monotonic()
    result = launch(SCRIPT, "owner", "sleep", str(LIMIT), ranks=3)
    assert result.returncode != 0 and time.monotonic() - start < 200, result.stderr
    for rank in (0, 2):
        assert f"Muon: rank {rank} was in phase exchange of chunk 2 of 3" in result.stderr
    assert "rank 1: the optimizer's step has not gone on for" in result.stderr


@pytest.mark.slow
def test_torchrun_ends_all(tmp_path: Path) -> None:
    start = time.monotonic()
    result = torchrun(SCRIPT, "owner", "sleep", str(LIMIT), ranks=3)
    assert result.returncode != 0 and time.monotonic() - start < 120 + GRACE_S, result.stderr
    assert "was in phase exchange of chunk 2 of 3" in result.stderr
    left = [each for each in psutil.process_iter(["cmdline"]) if SCRIPT in (each.info["cmdline"] or ())]
    assert not left


class Standing(Place):
    """A step that has begun, and goes on when it is told to."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.begin([object()], NO_CLOCK)  # type: ignore[list-item]


def test_a_slow_step_is_not_told_and_nothing_is_left_when_optimizers_are_gone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 5)
    watcher, slow, hanging = Watcher(), Standing(0.8), Standing(0.8)
    for place in (slow, hanging, slow):
        watcher.watch(place)
    thread = watcher._thread
    assert thread is not None and thread.daemon
    for _ in range(20):
        time.sleep(0.1)
        with slow.at("products"):
            pass
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "rank 5: the optimizer's step has not gone on for 0." in printed
    del slow, hanging, place
    gc.collect()
    thread.join(SLACK)
    assert not thread.is_alive() and thread not in threading.enumerate()
    watcher.watch(again := Standing(0.8))
    assert watcher._thread is not None and watcher._thread is not thread
    again.end()


def test_on_a_gpu_the_host_may_be_ahead(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The step leaves an event on the device; who watches asks it alone, and only when no step has begun for long."""
    with World(rank=0, ranks=2) as world:
        group = world.own_group([(0, 1)])
        muon = Muon([world.parameter(16, 24, dim=1)], tp_group=group, tp_mode="owner")
        engine = muon.prepare()
        monkeypatch.setattr(WATCHER, "watch", lambda place: None)
        engine._place.limit = 1.0
        with world.refusing(FIRST_STEP):
            muon.step()
        left = engine._place.left
        with world.refusing(COMPARISON):
            muon.step()
        assert left is not None and engine._place.left is left and not engine._place.parts
    monkeypatch.setattr(dist, "get_rank", lambda: 5)
    watcher, places = Watcher(), [Standing(0.2) for _ in range(3)]
    for place, is_done in zip(places, (True, False, False), strict=True):
        place.left = SimpleNamespace(query=lambda is_done=is_done: is_done)
    places[0].end()
    places[1].end()
    for place in places:
        watcher.watch(place)
    time.sleep(1.0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and sum("and the device has not done it" in line for line in lines) == 1
    assert sum("That is where the host is, the device may be at an earlier chunk." in line for line in lines) == 1
