"""Save at one layout, load at another, go on: state tensor by tensor, and losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_muon.optimizers.fading import PEAK
from tests.checkpoints import contents, differences
from tests.megatron import harness
from tests.megatron.crossing import AGAIN, DENSE, MODELS, TOLERANCE, Crossing, is_quick, load_at, save_at
from tests.megatron.harness import Layout
from tests.pool import RankPool

PAIRS = [(model, source, to) for model, (places, _) in MODELS.items() for to in places for source in places]


@pytest.mark.parametrize(
    "model,source,to",
    [
        pytest.param(*pair, id="{}-{}-to-{}".format(*pair), marks=() if is_quick(*pair) else pytest.mark.slow)
        for pair in PAIRS
    ],
)
def test_every_layout_reads_what_every_layout_writes(crossing: Crossing, model: str, source: str, to: str) -> None:
    """All pairs: the same bits in every tensor, and the losses of the run that was not interrupted."""
    crossing.check(model, source, to)


def keys_of(layout: Layout, options: dict[str, Any], folder: str) -> list[str]:
    """Save after a step; the keys of the optimizer's tensors."""
    run = harness.start(layout, **options)
    run.losses(1)
    harness.save_run(run, folder)
    return sorted(key for key in contents(folder) if key.startswith("optimizer."))


def test_keys_are_those_of_the_model(pool: RankPool, tmp_path: Path) -> None:
    """State name and weight name, whatever wrote it: no index of a chain, a rank or a bucket."""
    plain = pool.run(keys_of, 1, Layout(), {"bf16": True}, str(tmp_path / "a"))[0]
    shared = pool.run(keys_of, 4, Layout(tp=2, layer_wise=True), {"bf16": True}, str(tmp_path / "b"))[0]
    assert plain == shared
    assert "optimizer.state.momentum_buffer.decoder.layers.mlp.linear_fc1.weight" in plain
    assert "optimizer.state.exp_avg_sq.embedding.word_embeddings.weight" in plain
    assert "optimizer.state.fp32_param.decoder.final_layernorm.weight" in plain


# One layer of four under Adam: the tensor of all layers' momenta would have a hole.
ONE_LAYER = {"optimizer": {"muon_param_rule": ("*layers.1.mlp.linear_fc1.weight=adam",)}}


def test_layers_of_one_tensor_under_different_rules(pool: RankPool, tmp_path: Path) -> None:
    folder = str(tmp_path / "a")
    wanted = pool.run(save_at, 2, Layout(tp=2), ONE_LAYER, folder)[0]
    for to in ("pp2", "dp2_layer_wise"):
        ranks, layout, more = DENSE[to]
        got = pool.run(load_at, ranks, layout, {**ONE_LAYER, **more}, [folder], AGAIN + to)[0][0]
        assert differences(folder, folder + AGAIN + to) == []
        assert got == pytest.approx(wanted, abs=TOLERANCE["float32"])


# --- state of other shapes -------------------------------------------------------------------------------------------


def with_other_state(layout: Layout, folder: str, load: bool) -> None:
    """Give every weight of Muon a number for each row, one for each column, and one for itself."""
    run = harness.start(layout, gated_linear_unit=False)
    for part in run.optimizer.chained_optimizers:
        for muon in (inner.optimizer for inner in getattr(part, "chained_optimizers", [part])):
            if type(muon).__name__ == "Muon":
                add_state(muon, zero=load)
    if load:
        harness.load_run(run, folder)
        harness.save_run(run, folder + AGAIN)
    else:
        run.losses(1)
        harness.save_run(run, folder)


def add_state(muon: Any, zero: bool) -> None:
    for group in muon.param_groups:
        muon._init_group(group, skip_non_grad_params=False)
        for param in group["params"]:
            rows, columns = param.shape
            values = {PEAK: torch.randn(rows, 1), "columns": torch.randn(1, columns), "number": torch.randn(())}
            # What several ranks have a copy of must be the same on all of them.
            values["columns" if getattr(param, "partition_dim", 0) == 0 else PEAK].fill_(3.0)
            values["number"].fill_(5.0)
            muon.state[param] |= {name: torch.zeros_like(value) if zero else value for name, value in values.items()}


@pytest.mark.parametrize(
    "source,to",
    [
        ("tp2", "pp2"),
        ("dp2_layer_wise", "tp2"),
        pytest.param("tp2", "one", marks=pytest.mark.slow),
        pytest.param("one", "tp2", marks=pytest.mark.slow),
    ],
)
def test_state_for_rows_and_columns(pool: RankPool, tmp_path: Path, source: str, to: str) -> None:
    folder = str(tmp_path / "a")
    for place, load in ((source, False), (to, True)):
        ranks, layout, _ = DENSE[place]
        pool.run(with_other_state, ranks, layout, folder, load)
    assert differences(folder, folder + AGAIN) == []
