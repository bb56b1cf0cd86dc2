"""``--optimizer-cuda-graph`` with Megatron-Core's own wrapper; the graph itself is one of the CPU's operations."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.test_nonfinite import state_of, step_with
from tests.megatron.test_routing import GDN
from tests.pool import RankPool
from tests.recorded import recorded

CLIP = {"qk_clip": True, "qk_clip_threshold": 0.5, "init_method_std": 0.2}
_PLUGIN = "megatron_muon.plugin.step_graph"


def trained(layout: Layout, model: dict[str, Any], options: dict[str, Any], warmup: int, steps: int) -> dict[str, Any]:
    """Weights, state and losses after training as Megatron's loop has it, with the flag and a schedule."""
    from megatron.core.optimizer.optimizer_cuda_graph import OptimizerCudaGraphWrapper

    from megatron_muon.optimizers import graph
    from megatron_muon.optimizers.muon import Muon
    from megatron_muon.plugin.optimizer_state import leaves
    from megatron_muon.plugin.qk_clip import clip_of

    replays: list[int] = []
    capture = recorded(replays)
    with (
        mock.patch(f"{_PLUGIN}.check_device"),
        mock.patch(f"{_PLUGIN}._on_shared_stream", lambda shares_pool, work: capture(work)),
        mock.patch(f"{_PLUGIN}.WARMUP_STEPS", warmup),
    ):
        run = harness.start(layout, optimizer={"optimizer_cuda_graph": True, **options}, **model)
    muons = [leaf.optimizer for leaf, _ in leaves(run.optimizer) if isinstance(leaf.optimizer, Muon)]
    assert all(isinstance(muon.graph, graph.StepGraph) for muon in muons)
    adams = [leaf.optimizer for leaf, _ in leaves(run.optimizer) if not isinstance(leaf.optimizer, Muon)]
    assert not any(group.get("capturable") for adam in adams for group in adam.param_groups)
    run.optimizer.step = OptimizerCudaGraphWrapper(run.optimizer.step, cuda_graph_warmup_steps=1)
    losses, skipped = [], []
    for number in range(steps):
        for group in run.optimizer.param_groups:
            group["lr"], group["weight_decay"] = 0.02 / (1 + number), 0.1 + 0.02 * number
        losses += run.losses(1)
        if number in (1, steps - 2):
            skipped.append(not step_with(run, float("nan"), "linear_fc1.weight", 0))
    del run.optimizer.step
    assert skipped == [True, True]
    clip = clip_of(run.chunks)
    assert (clip is not None and bool(clip.heads_clipped)) is ("qk_clip" in model)
    return {"state": state_of(run), "losses": losses, "replays": len(replays), "muons": len(muons)}


def both(layout: Layout, model: dict[str, Any], options: dict[str, Any], steps: int = 7) -> tuple[bool, int, int]:
    captured = trained(layout, model, options, 2, steps)
    anew = trained(layout, model, options, 10**9, steps)
    assert not anew["replays"]
    state, other = captured["state"], anew["state"]
    equal = state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)
    return equal and captured["losses"] == anew["losses"], captured["replays"], captured["muons"]


@pytest.mark.parametrize(
    ("layout", "model", "options"),
    [
        pytest.param(Layout(tp=2), GDN, {}, marks=pytest.mark.slow),
        pytest.param(Layout(tp=2), {"bf16": True}, {"muon_tp_mode": "distributed"}, marks=pytest.mark.slow),
        (
            Layout(layer_wise=True),
            {"bf16": True, "ddp": {"grad_reduce_in_fp32": False}, **CLIP},
            {"muon_master": "remainder", "muon_momentum_dtype": "bf16"},
        ),
    ],
    ids=["TP 2, GatedDeltaNet", "TP 2, bf16", "layer-wise, QK-clip"],
)
def test_training_is_that_without_a_graph(
    pool: RankPool, layout: Layout, model: dict[str, Any], options: dict[str, Any]
) -> None:
    for equal, replays, muons in pool.run(both, 2, layout, model, options):
        assert equal and replays == 5 * muons > 0
