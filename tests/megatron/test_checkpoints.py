"""Save at one layout, load at another, go on: state tensor by tensor, and losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import differences
from tests.megatron import harness
from tests.megatron.harness import Data, Layout
from tests.megatron.test_routing import GDN, MLA, MOE
from tests.pool import RankPool

STEPS = 10
AGAIN = "-again-at-"
DATA = Data(micro_batch=2)

Place = tuple[int, Layout, dict[str, Any]]

OLDER: dict[str, Any] = {"param_layout": False}
PLAIN: dict[str, Place] = {
    "one": (1, Layout(), {}),
    "dp2": (2, Layout(), {}),
    "tp2": (2, Layout(tp=2), {}),
    "pp2": (2, Layout(pp=2), {}),
    "tp2_pp2": (4, Layout(tp=2, pp=2), {}),
    "vpp": (2, Layout(pp=2, vpp=2), {}),
}
LAYER_WISE: dict[str, Place] = {
    "dp2_layer_wise": (2, Layout(layer_wise=True), {}),
    "dp2_layer_wise_older": (2, Layout(layer_wise=True), OLDER),
    "tp2_dp2_layer_wise": (4, Layout(tp=2, layer_wise=True), {}),
    "pp2_dp2_layer_wise": (4, Layout(pp=2, layer_wise=True), {}),
}
DENSE = {**PLAIN, **LAYER_WISE}
EXPERTS: dict[str, Place] = {
    "ep2": (2, Layout(ep=2), {}),
    "dp2_layer_wise": (2, Layout(layer_wise=True), {}),
    "tp2_ep2": (4, Layout(tp=2, ep=2, etp=1, sp=True), {}),
    "ep2_dp2_layer_wise": (4, Layout(ep=2, layer_wise=True), {}),
}
FEWER = {name: DENSE[name] for name in ("tp2", "pp2", "dp2_layer_wise")}
FEW = {name: DENSE[name] for name in ("one", "tp2", "pp2", "dp2_layer_wise", "dp2_layer_wise_older")}

# Adam divides gradients by their size, also those that are rounding alone: less of it at a smaller learning rate.
CALM = {"lr": 0.003, "min_lr": 0.003}
# Gates' rows of in_proj under Adam: momentum and a second moment in one weight.
SPLIT = {**GDN, "optimizer": {**CALM, "muon_gdn_in_proj": "split"}}
# megatron-core 0.19.2 adds up the gradients of q_layernorm over tensor-parallel ranks, which all have the whole of
# it. Adam does not mind a factor, but its moments of another layout do: so without these norms.
LATENT = {**MLA, "qk_layernorm": False, "optimizer": CALM}

MODELS: dict[str, tuple[dict[str, Place], dict[str, Any]]] = {
    "dense": (DENSE, {}),
    "dense_bf16": (FEW, {"bf16": True}),
    "experts": (EXPERTS, {**MOE, "data": Data()}),
    "latent_attention": (FEW, LATENT),
    "hybrid": (FEWER, SPLIT),
    "hybrid_bf16": (FEWER, {**SPLIT, "bf16": True}),
}
# As between layouts without checkpoints (test_layouts.py); bfloat16 rounds activations to 8 bits.
TOLERANCE = {"float32": 4e-6, "bfloat16": 3e-2}


def save_at(layout: Layout, options: dict[str, Any], folder: str) -> list[float]:
    """Train, save, and train on."""
    run = harness.start(layout, early=True, **{"data": DATA, **options})
    run.losses(2)
    harness.save_run(run, folder)
    return run.losses(STEPS)


def load_at(layout: Layout, options: dict[str, Any], folders: list[str], suffix: str) -> list[list[float]]:
    """Load each, save it again, and train on."""
    run = harness.start(layout, early=True, **{"data": DATA, **options})
    losses = []
    for folder in folders:
        harness.load_run(run, folder)
        harness.save_run(run, folder + suffix)
        losses.append(run.losses(STEPS))
    return losses


@pytest.mark.parametrize("model", MODELS)
def test_every_layout_reads_what_every_layout_writes(pool: RankPool, tmp_path: Path, model: str) -> None:
    """All pairs: the same bits in every tensor, and the losses of the run that was not interrupted."""
    places, options = MODELS[model]
    tolerance = TOLERANCE["bfloat16" if options.get("bf16") else "float32"]
    folders = {name: str(tmp_path / name) for name in places}
    wanted = {
        name: pool.run(save_at, ranks, layout, {**options, **more}, folders[name])[0]
        for name, (ranks, layout, more) in places.items()
    }
    for to, (ranks, layout, more) in places.items():
        suffix = AGAIN + to
        got = pool.run(load_at, ranks, layout, {**options, **more}, list(folders.values()), suffix)[0]
        for source, losses in zip(folders, got, strict=True):
            assert differences(folders[source], folders[source] + suffix) == [], f"{source} to {to}"
            if source == to:
                assert losses == wanted[source], f"{source}, resumed at the same layout"
            else:
                assert losses == pytest.approx(wanted[source], abs=tolerance), f"{source} to {to}"


def keys_of(layout: Layout, options: dict[str, Any], folder: str) -> list[str]:
    """Save after a step; the keys of the optimizer's tensors."""
    from tests.checkpoints import contents

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
            values = {"rows": torch.randn(rows, 1), "columns": torch.randn(1, columns), "number": torch.randn(())}
            # What several ranks have a copy of must be the same on all of them.
            values["columns" if getattr(param, "partition_dim", 0) == 0 else "rows"].fill_(3.0)
            values["number"].fill_(5.0)
            muon.state[param] |= {name: torch.zeros_like(value) if zero else value for name, value in values.items()}


@pytest.mark.parametrize("source,to", [("tp2", "one"), ("one", "tp2"), ("tp2", "pp2"), ("dp2_layer_wise", "tp2")])
def test_state_for_rows_and_columns(pool: RankPool, tmp_path: Path, source: str, to: str) -> None:
    folder = str(tmp_path / "a")
    for place, load in ((source, False), (to, True)):
        ranks, layout, _ = DENSE[place]
        pool.run(with_other_state, ranks, layout, folder, load)
    assert differences(folder, folder + AGAIN) == []
