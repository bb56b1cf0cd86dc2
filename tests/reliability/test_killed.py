"""A rank that is killed in a step or in a save: the others end with a message, and a restart has the same bits."""

from __future__ import annotations

import os
import pkgutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_muon.checkpoint import folders
from tests.checkpoints import contents
from tests.megatron import harness
from tests.megatron.harness import Layout, Run
from tests.megatron.test_checkpoint_saving import make_folder
from tests.megatron.test_object_stores import needs_client, with_stores
from tests.megatron.test_object_stores import store as store
from tests.pool import RankError, RankPool
from tests.reliability.test_disk_full import save

KILL, TERM = signal.SIGKILL, signal.SIGTERM
LIMIT_S = 30.0
"""In which the others must have ended; gloo tells them at once that a connection is closed."""
SMALL: dict[str, Any] = {"num_layers": 2, "bf16": True, "optimizer": {"muon_chunk_mb": 0.01}}

WRITES = {"tensors": ".distcp", "index": ".metadata", "mark": "metadata.json"}
"""Moments of a save: the file whose opening a rank does not survive. The mark is the last of all."""


EXCHANGE = "megatron_muon.engine.exchange:Exchange", "count"
GATHER = "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBucketGroup", "start_param_sync"


def die_in_step(run: Run, sign: int, place: tuple[str, str], number: int) -> None:
    """In call ``number`` of what each chunk's exchange calls, or each gather of weights from their owners."""
    owner, calls = pkgutil.resolve_name(place[0]), [0]
    original = getattr(owner, place[1])

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), sign)
        return original(*args, **kwargs)

    setattr(owner, place[1], call)
    run.losses(1)
    raise AssertionError(f"there are {calls[0]} calls in a step")


def die_in_save(run: Run, sign: int, moment: str, folder: str, way: str) -> None:
    """When a file is opened for writing or is renamed, in this process or in one that writes behind it."""
    rank_process = os.getpid()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        # A store opens a file of another name, and renames it.
        writes = event == "os.rename" or (event == "open" and set(str(arguments[1])) & set("wax+"))
        if writes and any(WRITES[moment] in str(each) for each in arguments[:2]):
            os.kill(rank_process, sign)

    sys.addaudithook(hook)
    save(run, folder, way)
    raise AssertionError(f"{moment} was not opened")


def train_and_die(layout: Layout, root: str, notes: Path, rank: int, death: tuple[Any, ...]) -> None:
    """Save, train, go back, and die on one rank; what the other has heard, and losses, are in files."""
    kind, sign, *where = death
    run = harness.start(layout, **SMALL)
    run.losses(1)
    harness.save_run(run, f"{root}/iter_0000001")
    losses = run.losses(2)
    (notes / f"losses-{dist.get_rank()}").write_text(repr(losses))
    harness.load_run(run, f"{root}/iter_0000001")
    dist.barrier()
    began = time.monotonic()
    try:
        dying = dist.get_rank() == rank
        if kind == "step":
            die_in_step(run, sign, *where) if dying else run.losses(1)
        else:
            run.losses(1)
            folder = f"{root}/iter_0000002"
            if kind != "plain":
                make_folder(folder)
            die_in_save(run, sign, *where, folder, kind) if dying else save(run, folder, kind)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        (notes / f"told-{dist.get_rank()}").write_text(f"{time.monotonic() - began:.1f} {text}")
        raise


def resume(layout: Layout, root: str, iteration: int) -> list[float]:
    run = harness.start(layout, **SMALL, seed=7)
    harness.load_run(run, f"{root}/iter_{iteration:07d}")
    return run.losses(3 - iteration)


def run_with(pool: RankPool, store: Path | None, function: Callable[..., Any], *args: Any) -> list[Any]:
    """On two ranks, for which there is a store."""
    around: list[Any] = [function] if store is None else [with_stores, store, function]
    return pool.run(around[0], 2, *around[1:], *args)


def check(
    pool: RankPool, folder: Path, layout: Layout, rank: int, death: tuple[Any, ...], store: Path | None = None
) -> int:
    """Let a rank die, and go on from the newest whole checkpoint; which that is. The folder may be a store."""
    root = str(folder) if store is None else f"msc://{store.name}"
    with pytest.raises(RankError, match=rf"rank {rank} of 2 failed:\nthe process ended"):
        run_with(pool, store, train_and_die, layout, root, folder, rank, death)
    seconds, _, text = (folder / f"told-{1 - rank}").read_text().partition(" ")
    assert float(seconds) < LIMIT_S and text, text
    newest = folders.newest(folder)
    assert newest is not None and contents(str(folder / f"iter_{newest:07d}"))
    for number, losses in enumerate(run_with(pool, store, resume, layout, root, newest)):
        assert repr(losses) == repr(eval((folder / f"losses-{number}").read_text())[newest - 1 :])
    return newest


LAYER_WISE = Layout(layer_wise=True)
STEPS = [
    pytest.param(Layout(tp=2), 1, (KILL, EXCHANGE, 3), id="tp2"),
    pytest.param(Layout(tp=2), 0, (TERM, EXCHANGE, 4), id="tp2 first rank", marks=pytest.mark.slow),
    pytest.param(LAYER_WISE, 1, (KILL, GATHER, 2), id="layer-wise"),
    pytest.param(LAYER_WISE, 0, (TERM, GATHER, 3), id="layer-wise first rank", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("layout,rank,death", STEPS)
def test_in_a_step(pool: RankPool, tmp_path: Path, layout: Layout, rank: int, death: tuple[Any, ...]) -> None:
    assert check(pool, tmp_path, layout, rank, ("step", *death)) == 1


SAVES = [
    pytest.param("plain", 1, KILL, "tensors", id="writing tensors", marks=pytest.mark.slow),
    pytest.param("plain", 0, TERM, "index", id="before the index", marks=pytest.mark.slow),
    pytest.param("plain", 0, KILL, "mark", id="between index and mark"),
    pytest.param("background", 1, TERM, "tensors", id="writing behind the run"),
    pytest.param("background", 0, KILL, "index", id="index behind the run", marks=pytest.mark.slow),
    pytest.param("background", 0, TERM, "mark", id="mark behind the run", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kind,rank,sign,moment", SAVES)
def test_in_a_save(pool: RankPool, tmp_path: Path, kind: str, rank: int, sign: int, moment: str) -> None:
    assert check(pool, tmp_path, LAYER_WISE, rank, (kind, sign, moment)) == 1
    assert not folders.is_whole(tmp_path / "iter_0000002")


@needs_client
@pytest.mark.slow
@pytest.mark.parametrize("rank,moment", [(1, "tensors"), (0, "index"), (0, "mark")])
def test_in_a_save_to_a_store(pool: RankPool, store: Path, rank: int, moment: str) -> None:
    assert check(pool, store, LAYER_WISE, rank, ("plain", KILL, moment), store) == 1
    assert not folders.is_whole(store / "iter_0000002")
