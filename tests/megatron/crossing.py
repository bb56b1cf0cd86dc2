"""Every layout reads what every layout writes: models, layouts, and the runs, once for all tests of a session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import differences
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.test_routing import GDN, MLA, MOE
from tests.pool import RankPool

STEPS = 2
"""Trained after a checkpoint: the first loss is that of the weights, the second that of the optimizer's state."""
AGAIN = "-again-at-"

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
    "one": (1, Layout(), {}),
    "ep2": (2, Layout(ep=2), {}),
    "dp2_layer_wise": (2, Layout(layer_wise=True), {}),
    "tp2_ep2": (4, Layout(tp=2, ep=2, etp=1, sp=True), {}),
    "ep2_dp2_layer_wise": (4, Layout(ep=2, layer_wise=True), {}),
}
# One copy of dense weights, and two of experts.
ONE_COPY: dict[str, Place] = {
    "ep2": EXPERTS["ep2"],
    "tp2_etp1_layer_wise": (2, Layout(tp=2, etp=1, sp=True, layer_wise=True), {}),
}
STAGES: dict[str, Place] = {
    "tp2": DENSE["tp2"],
    "dp2_layer_wise": DENSE["dp2_layer_wise"],
    "vpp_dp2_layer_wise": (4, Layout(pp=2, vpp=2, layer_wise=True), {}),
}
# layer-wise with tensor and pipeline parallelism: eight processes, slow.
EIGHT: dict[str, Place] = {
    "tp2_pp2": DENSE["tp2_pp2"],
    "dp2_layer_wise": DENSE["dp2_layer_wise"],
    "tp2_pp2_dp2_layer_wise": (8, Layout(tp=2, pp=2, layer_wise=True), {}),
}
FEWER = {name: DENSE[name] for name in ("tp2", "pp2", "dp2_layer_wise")}
TWO = {name: DENSE[name] for name in ("tp2", "dp2_layer_wise")}
FEW = {name: DENSE[name] for name in ("one", "tp2", "pp2", "dp2_layer_wise", "dp2_layer_wise_older")}
# Masters as remainders at some layouts, float32 copies at others: the same bits.
REMAINDERS: dict[str, Any] = {"muon_master": "remainder"}
FORMS: dict[str, Place] = {
    name: (*FEW[name][:2], {**FEW[name][2], "optimizer": REMAINDERS if name in ("tp2", "dp2_layer_wise") else {}})
    for name in FEW
}

# Adam divides gradients by their size, also those that are rounding alone: less of it at a smaller learning rate.
CALM = {"lr": 0.003, "min_lr": 0.003}
# Gates' rows of in_proj under Adam: momentum and a second moment in one weight.
SPLIT = {**GDN, "optimizer": {**CALM, "muon_gdn_in_proj": "split"}}
MIXED: dict[str, Place] = {**FEWER, "tp2": (*FEWER["tp2"][:2], {"optimizer": {**SPLIT["optimizer"], **REMAINDERS}})}
# megatron-core 0.19.2 adds up the gradients of q_layernorm over tensor-parallel ranks, which all have the whole of
# it. Adam does not mind a factor, but its moments of another layout do: so without these norms.
LATENT = {**MLA, "qk_layernorm": False, "optimizer": CALM}

MODELS: dict[str, tuple[dict[str, Place], dict[str, Any]]] = {
    "dense": (DENSE, {}),
    "dense_in_virtual_stages": (STAGES, {}),
    "dense_on_8_ranks": (EIGHT, {}),
    "dense_bf16": (FORMS, {"bf16": True}),
    "experts": ({name: EXPERTS[name] for name in ("one", "ep2", "dp2_layer_wise")}, MOE),
    "experts_on_4_ranks": (EXPERTS, MOE),
    "experts_of_two_copies": (ONE_COPY, MOE),
    "latent_attention": (FEW, LATENT),
    "latent_attention_fused": (TWO, {**LATENT, "mla_down_proj_fusion": True}),
    "hybrid": (FEWER, SPLIT),
    "hybrid_bf16": (MIXED, {**SPLIT, "bf16": True}),
}
# As between layouts without checkpoints (test_layouts.py); bfloat16 rounds activations to 8 bits.
TOLERANCE = {"float32": 4e-6, "bfloat16": 3e-2}


# By the layouts that read, which are those that divide tensors differently: by rows, columns and layers, and by owners.
QUICK: dict[str, dict[str, tuple[str, ...]]] = {
    "dense": {
        "one": ("tp2_pp2", "dp2_layer_wise"),
        "tp2_pp2": ("tp2_pp2", "dp2_layer_wise"),
        "vpp": ("tp2_pp2", "dp2_layer_wise"),
        "dp2_layer_wise": ("tp2_pp2", "dp2_layer_wise"),
    },
    "dense_bf16": {
        "one": ("tp2", "dp2_layer_wise_older"),
        "dp2_layer_wise": ("tp2", "dp2_layer_wise_older"),
    },
    "experts": {"ep2": ("dp2_layer_wise",), "dp2_layer_wise": ("ep2",)},
    "experts_of_two_copies": {"ep2": ("tp2_etp1_layer_wise",), "tp2_etp1_layer_wise": ("ep2",)},
    "latent_attention_fused": {"tp2": ("dp2_layer_wise",), "dp2_layer_wise": ("tp2",)},
    "hybrid": {"tp2": ("dp2_layer_wise",), "dp2_layer_wise": ("tp2",)},
}
"""What ``make test`` has: model, layout that reads, and the layouts that have written."""


def is_quick(model: str, source: str, to: str) -> bool:
    """Whether ``make test`` has the pair."""
    return source in QUICK.get(model, {}).get(to, ())


def save_at(layout: Layout, options: dict[str, Any], folder: str) -> list[float]:
    """Train, save, and train on."""
    run = harness.start(layout, early=True, **options)
    run.losses(2)
    harness.save_run(run, folder)
    return run.losses(STEPS)


def load_at(layout: Layout, options: dict[str, Any], folders: list[str], suffix: str) -> list[list[float]]:
    """Load each, save it again, and train on."""
    run = harness.start(layout, early=True, **options)
    losses = []
    for folder in folders:
        harness.load_run(run, folder)
        harness.save_run(run, folder + suffix)
        losses.append(run.losses(STEPS))
    return losses


class Crossing:
    """Runs that save and runs that load, of each model when it is first asked for.

    Args:
        pool: of ranks.
        root: folder for all checkpoints.
    """

    def __init__(self, pool: RankPool, root: Path) -> None:
        self.pool, self.root = pool, root
        self.wanted: dict[tuple[str, str], list[float]] = {}
        self.got: dict[tuple[str, str, bool], dict[str, list[float]] | Exception] = {}

    def check(self, model: str, source: str, to: str) -> None:
        """The same bits in every tensor, and the losses of the run that was not interrupted."""
        places, options = MODELS[model]
        folders = {name: str(self.root / model / name) for name in places}
        quick = is_quick(model, source, to)
        folders = {name: path for name, path in folders.items() if is_quick(model, name, to) is quick}
        for name in folders:
            if (model, name) not in self.wanted:
                self.wanted[model, name] = self._run(model, name, save_at, folders[name])
        losses = self._loaded((model, to, quick), folders)[source]
        assert differences(folders[source], folders[source] + AGAIN + to) == []
        wanted = self.wanted[model, source]
        if source == to:
            assert losses == wanted, "resumed at the same layout"
        else:
            assert losses == pytest.approx(wanted, abs=TOLERANCE["bfloat16" if options.get("bf16") else "float32"])

    def _run(self, model: str, name: str, function: Any, *args: Any) -> Any:
        places, options = MODELS[model]
        ranks, layout, more = places[name]
        return self.pool.run(function, ranks, layout, {**options, **more}, *args)[0]

    def _loaded(self, run: tuple[str, str, bool], folders: dict[str, str]) -> dict[str, list[float]]:
        if run not in self.got:
            model, to, _ = run
            try:
                losses = self._run(model, to, load_at, list(folders.values()), AGAIN + to)
                self.got[run] = dict(zip(folders, losses, strict=True))
            except Exception as error:
                self.got[run] = error  # for all sources, without running again
        found = self.got[run]
        if isinstance(found, Exception):
            raise found
        return found
