"""Megatron-Bridge: its recipes' Muon, `pretrain`, checkpoints of its own code, adapters; against one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.clients import bridge as client
from tests.clients import needs
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
def expected(pool: RankPool) -> list[float]:
    return pool.run(losses_of, 1, Layout(), 6)[0]


@pytest.mark.parametrize("layout", [TP2, Layout()], ids=["tp2", "dp2"])
def test_pretrain_saves_and_resumes_at_another_layout(
    pool: RankPool, expected: list[float], tmp_path: Path, layout: Layout
) -> None:
    folder = str(tmp_path / "saved")
    for losses in pool.run(losses_of, 2, layout, 4, save=folder):
        assert losses == pytest.approx(expected[:4], rel=ROUNDING)
    for number, other in ((1, Layout()), (2, TP2)):
        for losses in pool.run(losses_of, number, other, 6, load=folder):
            assert losses == pytest.approx(expected[4:], rel=ROUNDING)


def losses_of_adam(steps: int, load: str, accept: bool) -> list[float]:
    import megatron_muon

    megatron_muon.install()
    config = client.recipe(Layout(), steps=steps, load=load)
    client.adam(config, steps=8, **({"muon_ckpt_changes": "accept"} if accept else {}))
    return client.pretrain(config)


def test_adam_resumes_from_a_checkpoint_of_muon(pool: RankPool, expected: list[float], tmp_path: Path) -> None:
    """Its metadata do not say in which form the distributed optimizer is to read; the first loss is of the weights."""
    folder = str(tmp_path / "saved")
    pool.run(losses_of, 2, Layout(), 4, save=folder)
    for losses in pool.run(losses_of_adam, 2, 6, folder, True):
        assert losses[0] == pytest.approx(expected[4], rel=ROUNDING)
    with pytest.raises(RankError) as refusal:
        pool.run(losses_of_adam, 2, 6, folder, False)
    assert "was trained with other rules" in str(refusal.value)
