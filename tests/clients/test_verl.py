"""verl: config, DDP, optimizer, offload and checkpoints by its own functions, against one rank."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest

from tests.clients import HOOKS, needs
from tests.clients import verl as client
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.pool import RankError, RankPool

pytestmark = needs("transformer_engine", "verl")

ROUNDING = 1e-5
"""float32 losses near 4, of other orders of summation, four steps on."""
LAYER_WISE = Layout(layer_wise=True)
TP2 = Layout(tp=2)


def losses_of(layout: Layout, weights: str, steps: int, folder: str = "", **changes: Any) -> list[float]:
    """Train; with ``folder``, save before the last two steps."""
    offload, reshardable = (changes.pop(name, False) for name in ("offload", "fully_reshardable"))
    run, scheduler = client.start(layout, weights, **changes)
    losses = client.train(run, scheduler, steps - 2, offload=offload)
    if folder:
        manager = client.checkpoints(
            run, scheduler, distributed=changes.get("distributed", True), fully_reshardable=reshardable
        )
        manager.save_checkpoint(folder, global_step=run.step)
    return losses + client.train(run, scheduler, 2, offload=offload)


def resumed(layout: Layout, weights: str, folder: str, step: int, **changes: Any) -> list[float]:
    """Load with verl's manager, model first, and train two steps."""
    run, scheduler = client.start(layout, weights, **changes)
    client.checkpoints(run, scheduler, distributed=changes.get("distributed", True)).load_checkpoint(folder)
    run.step = step
    return client.train(run, scheduler, 2)


@pytest.fixture(scope="module")
def weights(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("verl") / "weights")
    pool.run(harness.save_initial_weights, 1, folder)
    return folder


@pytest.fixture(scope="module")
def expected(pool: RankPool, weights: str) -> list[float]:
    """Losses of one rank, made as verl makes them."""
    return pool.run(losses_of, 1, Layout(), weights, 5, distributed=False, options={"muon_tp_mode": "duplicated"})[0]


def close(losses: list[float], expected: list[float]) -> None:
    assert losses == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize(
    ("layout", "distributed"),
    [(LAYER_WISE, True), (LAYER_WISE, False), (TP2, False)],
    ids=["layer_wise", "layer_wise_not_distributed", "tp2"],
)
def test_trains_and_resumes_as_one_rank(
    pool: RankPool, weights: str, expected: list[float], tmp_path: Path, layout: Layout, distributed: bool
) -> None:
    """``use_distributed_optimizer`` is always True in its engine, and with layer-wise means layer-wise."""
    options = {"muon_tp_mode": "duplicated"}
    folder = str(tmp_path / "saved")
    for losses in pool.run(losses_of, 2, layout, weights, 5, folder, distributed=distributed, options=options):
        close(losses, expected)
    for losses in pool.run(resumed, 2, layout, weights, folder, 3, distributed=distributed, options=options):
        close(losses, expected[3:])
    losses = pool.run(resumed, 1, Layout(), weights, folder, 3, distributed=False, options=options)[0]
    close(losses, expected[3:])


def test_offload_changes_nothing(pool: RankPool, weights: str) -> None:
    options = {"muon_tp_mode": "duplicated"}
    one, other = (
        pool.run(losses_of, 2, LAYER_WISE, weights, 5, bf16=True, offload=offload, options=options)[0]
        for offload in (False, True)
    )
    assert one == other


def test_the_distributed_optimizer_without_layer_wise_is_refused(pool: RankPool, weights: str) -> None:
    """In Megatron-Core alone, replicas drift there without a word."""
    with pytest.raises(RankError) as refusal:
        pool.run(losses_of, 2, Layout(), weights, 3)
    assert "ConfigError" in str(refusal.value) and "use_layer_wise_distributed_optimizer" in str(refusal.value)


def report(layout: Layout, weights: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        client.start(layout, weights)
    return output.getvalue()


def test_the_report_says_which_hooks_hold(pool: RankPool, weights: str) -> None:
    assert HOOKS in pool.run(report, 2, LAYER_WISE, weights)[0]
