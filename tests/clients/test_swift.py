"""ms-swift: config by fields, its `muon_lr`, DDP and checkpoints by its own functions, against one rank."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest

from tests.clients import HOOKS, needs
from tests.clients import swift as client
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.test_routing import GDN
from tests.pool import RankPool

pytestmark = needs("transformer_engine", "mcore_bridge", "swift.megatron")

ROUNDING = 1e-5
TP2, LAYER_WISE = Layout(tp=2), Layout(layer_wise=True)


def losses_of(layout: Layout, weights: str, steps: int, folder: str = "", **changes: Any) -> list[float]:
    """Train; with ``folder``, save before the last two steps."""
    from swift.megatron.utils import save_mcore_checkpoint

    run, scheduler, args = client.start(layout, weights, **changes)
    losses = client.train(run, scheduler, steps - 2)
    if folder:
        save_mcore_checkpoint(args, run.chunks, run.optimizer, scheduler, iteration=run.step, output_dir=folder)
    return losses + client.train(run, scheduler, 2)


def resumed(layout: Layout, weights: str, folder: str, **changes: Any) -> list[float]:
    from swift.megatron.utils import load_mcore_checkpoint

    run, scheduler, args = client.start(layout, weights, mcore_model=folder, **changes)
    run.step = load_mcore_checkpoint(args, run.chunks, run.optimizer, scheduler)
    return client.train(run, scheduler, 2)


@pytest.fixture(scope="module")
def weights(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("swift") / "weights")
    pool.run(harness.save_initial_weights, 1, folder)
    return folder


@pytest.fixture(scope="module")
def expected(pool: RankPool, weights: str) -> list[float]:
    return pool.run(losses_of, 1, Layout(), weights, 5)[0]


@pytest.mark.parametrize("layout", [TP2, LAYER_WISE], ids=["tp2", "layer_wise"])
def test_trains_and_resumes_as_one_rank(
    pool: RankPool, weights: str, expected: list[float], tmp_path: Path, layout: Layout
) -> None:
    folder = str(tmp_path / "saved")
    for losses in pool.run(losses_of, 2, layout, weights, 5, folder):
        assert losses == pytest.approx(expected, rel=ROUNDING)
    for number, other in ((2, layout), (1, Layout())):
        for losses in pool.run(resumed, number, other, weights, folder):
            assert losses == pytest.approx(expected[3:], rel=ROUNDING)


def rates(layout: Layout) -> dict[str, float]:
    """The rate of each kind of weight, by name, with ``--muon_lr`` ten times ``--lr``."""
    run, _, _ = client.start(layout, model=GDN, muon_lr=0.01, muon_min_lr=0.01, lr=0.001, min_lr=0.001)
    names = {id(param): name for name, param in run.chunks[0].named_parameters()}
    return {
        names[id(param)]: group["max_lr"]
        for part in run.optimizer.chained_optimizers
        for group in part.param_groups
        for param in group["params"]
        if id(param) in names
    }


def test_muon_lr_is_of_what_muon_updates(pool: RankPool) -> None:
    """Imported before ``install()``: its own copy of Megatron-Core's predicate must follow the routing, too."""
    found = pool.run(rates, 1, Layout())[0]
    of = {name.split("layers.0.")[-1].removeprefix("module."): rate for name, rate in found.items()}
    assert of["mlp.linear_fc1.weight"] == 0.01
    assert of["self_attention.in_proj.weight"] == 0.001, "GatedDeltaNet's in_proj is under Adam"


def report(layout: Layout, weights: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        client.start(layout, weights)
    return output.getvalue()


def test_the_report_says_which_hooks_hold(pool: RankPool, weights: str) -> None:
    assert HOOKS in pool.run(report, 2, LAYER_WISE, weights)[0]
