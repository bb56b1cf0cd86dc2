"""Megatron-Bridge: its recipes' Muon, `pretrain`, checkpoints of its own code, adapters; against one rank."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest

from tests.clients import HOOKS, needs
from tests.clients import bridge as client
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.pool import RankError, RankPool

pytestmark = needs("transformer_engine", "megatron.bridge")

ROUNDING = 1e-5
TP2 = Layout(tp=2)


def losses_of(layout: Layout, steps: int, *, save: str = "", load: str = "", **changes: Any) -> list[float]:
    import megatron_muon

    megatron_muon.install()
    config = client.recipe(layout, steps=steps, save=save, load=load)
    client.muon(config, steps=8, **changes)
    return client.pretrain(config)


@pytest.fixture(scope="module")
def start(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of one rank after one step: other layouts have other random weights."""
    folder = str(tmp_path_factory.mktemp("bridge") / "start")
    pool.run(losses_of, 1, Layout(), 1, save=folder)
    return folder


@pytest.mark.parametrize("layout", [TP2, Layout()], ids=["tp2", "dp2_layer_wise"])
def test_pretrain_saves_and_resumes_at_another_layout(
    pool: RankPool, start: str, tmp_path: Path, layout: Layout
) -> None:
    """``dist_muon``, which is layer-wise in its optimizer, through training loop and checkpoint code of its own."""
    folder = str(tmp_path / "saved")
    expected = pool.run(losses_of, 1, Layout(), 6, load=start)[0]
    for losses in pool.run(losses_of, 2, layout, 4, load=start, save=folder):
        assert losses == pytest.approx(expected[:3], rel=ROUNDING)
    for number, other in ((1, Layout()), (2, TP2)):
        for losses in pool.run(losses_of, number, other, 6, load=folder):
            assert losses == pytest.approx(expected[3:], rel=ROUNDING)


def losses_of_adam(steps: int, load: str, accept: bool) -> list[float]:
    import megatron_muon

    megatron_muon.install()
    config = client.recipe(Layout(), steps=steps, load=load)
    client.adam(config, steps=8, **({"muon_ckpt_changes": "accept"} if accept else {}))
    return client.pretrain(config)


def test_adam_resumes_from_a_checkpoint_of_muon(pool: RankPool, start: str, tmp_path: Path) -> None:
    """Its metadata do not say in which form the distributed optimizer is to read; the first loss is of the weights."""
    folder = str(tmp_path / "saved")
    pool.run(losses_of, 2, Layout(), 4, load=start, save=folder)
    expected = pool.run(losses_of, 1, Layout(), 6, load=folder)[0]
    for losses in pool.run(losses_of_adam, 2, 6, folder, True):
        assert losses[0] == pytest.approx(expected[0], rel=ROUNDING)
    with pytest.raises(RankError) as refusal:
        pool.run(losses_of_adam, 2, 6, folder, False)
    assert "was trained with other rules" in str(refusal.value)


def recipe_losses(layout: Layout, name: str, start: str, **changes: Any) -> tuple[list[float], str]:
    """Losses with the Muon of a recipe, in float32, and what was printed."""
    import megatron_muon

    megatron_muon.install()
    config = client.recipe(layout, steps=3, load=start, weights=True)
    client.of_recipe(config, name)
    for option, value in changes.items():
        setattr(config.optimizer, option, value)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        losses = client.pretrain(config)
    return losses, output.getvalue()


@pytest.mark.parametrize("name", ["kimi_k2", "deepseek_v4_flash"])
def test_the_muon_of_recipes(pool: RankPool, start: str, name: str) -> None:
    """As they are they are blockwise, and the report says so; one option makes them one rank's."""
    exact = {"muon_fp32_matmul_prec": "highest"}  # Kimi K2's `medium` rounds products to bfloat16
    one = pool.run(recipe_losses, 1, Layout(), name, start, **exact)[0][0]
    [(blockwise, report), _] = pool.run(recipe_losses, 2, TP2, name, start)
    assert blockwise == pytest.approx(one, rel=0.05) and blockwise != pytest.approx(one, rel=ROUNDING)
    assert "tensor parallel 2: blockwise" in report and HOOKS in report
    for losses, _ in pool.run(recipe_losses, 2, TP2, name, start, muon_tp_mode="duplicated", **exact):
        assert losses == pytest.approx(one, rel=ROUNDING)


def adapted(layout: Layout, base: str, factors: str, save: bool) -> tuple[list[float], str]:
    """Train LoRA adapters of Megatron-Bridge's own class under its ``setup_optimizer``; losses and the report."""
    from megatron.bridge.peft.lora import LoRA
    from megatron.core import dist_checkpointing

    import megatron_muon

    megatron_muon.install()
    layout.initialize()
    chunks = harness.build_model(layout)
    harness.load_weights(chunks, base)
    chunks = LoRA(dim=4, alpha=4)(chunks)
    if save:
        harness.save_weights(chunks, factors)
    state = dist_checkpointing.load(harness.model_state(chunks), factors)["model"]
    missing, _ = chunks[0].load_state_dict(state, strict=False)  # what is frozen is there, and has other names
    assert not any("adapter" in key and "weight" in key for key in missing)
    chunks = harness.wrap(chunks, layout)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        optimizer, scheduler = client.optimizer(chunks, muon_tp_mode="duplicated", muon_fp32_matmul_prec="highest")
    run = harness.Run(layout, chunks, optimizer)
    losses = []
    for _ in range(4):
        losses += run.losses(1)
        scheduler.step(1)
    return losses, output.getvalue()


def test_lora(pool: RankPool, tmp_path: Path) -> None:
    base, factors = str(tmp_path / "base"), str(tmp_path / "factors")
    pool.run(harness.save_initial_weights, 1, base)
    expected, report = pool.run(adapted, 1, Layout(), base, factors, True)[0]
    assert "adapter.linear_in.weight" in report and HOOKS in report and expected[-1] < expected[0]
    for losses, _ in pool.run(adapted, 2, TP2, base, factors, False):
        assert losses == pytest.approx(expected, rel=ROUNDING)
