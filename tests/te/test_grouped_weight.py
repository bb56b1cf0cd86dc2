"""All experts of a rank in one weight, TransformerEngine's ``GroupedTensor``, which forbids slices and other views."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_muon.routing.blocks import plain
from tests.megatron.harness import Layout
from tests.pool import RankPool
from tests.te import models, needs_transformer_engine, steps
from tests.te.test_steps import TOLERANCE

pytestmark = needs_transformer_engine

MODEL = "moe_single_weight"
EP2 = Layout(ep=2)
ETP1 = Layout(tp=2, etp=1, sp=True)


def test_step_save_reshard_and_load(pool: RankPool, tmp_path: Path) -> None:
    """Routing, two steps with a checkpoint between them, from one rank to two and back, against one rank."""
    folder = str(tmp_path)
    _start(pool, folder)
    pool.run(steps.step, 2, ETP1, folder, MODEL, "two", {}, save="run_of_two")
    pool.run(steps.step, 2, ETP1, folder, MODEL, "from_one", {}, load="run_of_one")
    pool.run(steps.step, 2, ETP1, folder, MODEL, "from_two", {}, load="run_of_two")
    pool.run(steps.step, 1, Layout(), folder, MODEL, "back", {}, load="run_of_two")
    for expected, result in [("one", "two"), ("second", "from_one"), ("second", "from_two"), ("second", "back")]:
        _check(pool, folder, expected, result)


@pytest.mark.parametrize("layout", [EP2, Layout(ep=2, layer_wise=True)], ids=["ep2", "ep2_layer_wise"])
def test_experts_on_other_ranks(pool: RankPool, tmp_path: Path, layout: Layout) -> None:
    """From one rank with all experts to two with some each, and back; then two ranks' own checkpoint."""
    folder = str(tmp_path)
    _start(pool, folder)
    pool.run(steps.step, 2, layout, folder, MODEL, "two", {}, save="run_of_two")
    pool.run(steps.step, 2, layout, folder, MODEL, "from_one", {}, load="run_of_one")
    pool.run(steps.step, 2, layout, folder, MODEL, "from_two", {}, load="run_of_two")
    pool.run(steps.step, 1, Layout(), folder, MODEL, "back", {}, load="run_of_two")
    for expected, result in [("one", "two"), ("second", "from_one"), ("second", "from_two"), ("second", "back")]:
        _check(pool, folder, expected, result)


def fingerprints_of_experts() -> list[int]:
    """Of the experts' weight, as copies on data-parallel ranks are compared: as it is, again, and changed."""
    from megatron_muon.checkpoint.fingerprint import fingerprints
    from megatron_muon.checkpoint.weights import _comparable

    layout = Layout()
    layout.initialize()
    weight = next(param for param in models.build_model(layout, MODEL).parameters() if hasattr(param, "quantizer"))
    found = [*fingerprints([_comparable(weight.data)]), *fingerprints([_comparable(weight.data)])]
    with torch.no_grad():
        plain([weight])[0][-1, -1, -1] += 1.0
    return [*found, *fingerprints([_comparable(weight.data)])]


def test_copies_are_compared(pool: RankPool) -> None:
    """Nothing was: copies of experts could differ after loading without a word."""
    before, again, after = pool.run(fingerprints_of_experts, 1)[0]
    assert before == again != after


def _start(pool: RankPool, folder: str) -> None:
    pool.run(steps.save_start, 1, folder, MODEL)
    pool.run(steps.step, 1, Layout(), folder, MODEL, "one", {}, save="run_of_one")
    pool.run(steps.step, 1, Layout(), folder, MODEL, "second", {}, load="run_of_one")


def _check(pool: RankPool, folder: str, expected: str, result: str) -> None:
    for name, (update, difference) in pool.run(steps.compare, 1, folder, MODEL, expected, result)[0].items():
        assert update > 1e-3, f"{name} must move for this to mean anything"
        assert difference < TOLERANCE, (result, name)
