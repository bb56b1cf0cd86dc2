"""QK-clip on fake CUDA: measured, reduced and applied without a wait, a copy or a tensor of the host."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from megatron_muon.plugin.qk_clip import clip_of
from megatron_muon.qk_clip.clip import Target, scale_rows
from megatron_muon.qk_clip.measure import record
from megatron_muon.qk_clip.rows import Rows
from tests.fake_cuda.megatron import FIRST_STEP, GPU, STEP, forward, gpus, outcomes, start, step
from tests.fake_cuda.world import World
from tests.megatron.harness import Layout
from tests.megatron.qk_clip import GQA, LATENT
from tests.pool import RankPool

Case = tuple[Layout, dict[str, Any], dict[str, Any]]

TP = Layout(tp=2)
LAYER_WISE = Layout(tp=2, layer_wise=True, ddp_buffers=True)
GATE = {"attention_output_gate": True}
MHA = {"num_query_groups": 4}


def _as_te(core: torch.nn.Module) -> None:
    """A core attention with maxima in an attribute, as TransformerEngine's."""
    core.current_max_attn_logits = None

    def after(module: Any, args: Any, output: torch.Tensor) -> None:
        module.current_max_attn_logits = torch.zeros(2, device=GPU)

    core.register_forward_hook(after)


def _as_own(core: torch.nn.Module) -> None:
    core.register_forward_hook(lambda module, args, output: record(module, torch.zeros(2, 1, device=GPU).T))


CASES: dict[str, Case] = {
    "scores, q_only": (TP, {}, GQA),
    "scores, group, biases": (TP, {"muon_qk_clip_rule": "group"}, {**GQA, "add_qkv_bias": True}),
    "scores, window": (TP, {}, {**GQA, "window_size": (4, 0)}),
    "exact, exact, float32": (TP, {"muon_qk_logits": "exact", "muon_qk_clip_rule": "exact"}, GQA),
    "exact under context parallelism": (Layout(cp=2), {"muon_qk_logits": "exact"}, {**GQA, "position": "none"}),
    "lse": (TP, {"muon_qk_logits": "lse"}, {**MHA, "bf16": True}),
    "te": (TP, {"muon_qk_logits": "te"}, {**MHA, "bf16": True, "cores": _as_te}),
    "own": (TP, {"muon_qk_logits": "own"}, {**GQA, "cores": _as_own}),
    "gate": (TP, {"muon_qk_clip_rule": "exact"}, {**GQA, **GATE}),
    "latent attention": (TP, {}, LATENT),
    "gains": (TP, {"muon_qk_clip_norm": "gains"}, {**GQA, "qk_layernorm": True}),
    "every second step": (TP, {"muon_qk_logits_interval": 2}, GQA),
    "layer-wise": (LAYER_WISE, {}, {**GQA, "bf16": True}),
    "layer-wise by lists": (Layout(tp=2, layer_wise=True), {}, {**GQA, "bf16": True, "param_layout": False}),
    "Adam in slices": (Layout(tp=2, ddp_buffers=True), {"name": "adam"}, {**GQA, "bf16": True}),
}


def measure_and_clip(case: Case) -> None:
    """Two steps; the second waits for nothing of QK-clip's."""
    layout, optimizer, model = case
    with gpus(rank=1, ranks=4) as world:
        run = start(layout, optimizer=optimizer, qk_clip=True, qk_clip_threshold=0.05, **model)
        clip = clip_of(run.chunks)
        assert clip is not None and clip.rows and clip.gauges
        taken: list[torch.device] = []
        for gauge in clip.gauges:
            gauge.take = functools.partial(_noted, taken, gauge.take)
        for allowed in (FIRST_STEP, STEP):
            taken.clear()
            world.watch.waits.clear()
            forward(run)
            assert taken == [GPU] * len(clip.gauges) * clip.measuring, "each layer has measured"
            ours = [where for where in world.watch.waits if not where.startswith("megatron/")]
            assert not ours, f"{ours} wait in the forward pass"
            first, measuring = len(world.calls), clip.measuring
            with world.refusing(allowed):
                step(run)
            # One maximum for all layers, one verdict on gradients.
            sizes = [clip._maxima.nbytes] * measuring + [12] * (optimizer.get("name") != "adam")
            reduced = [call for call in world.calls[first:] if call.where == "megatron_muon/agree.py:_reduce"]
            assert [call.sent for call in reduced] == [(size,) for size in sizes]
        for value in (clip.max_logit, clip.heads_clipped, clip._maxima):
            assert value.device == GPU


def _noted(taken: list[torch.device], take: Any, values: torch.Tensor) -> None:
    taken.append(values.device)
    take(values)


@pytest.fixture(scope="module")
def measured(pool: RankPool) -> dict[str, str]:
    return pool.run(_measure_each, 1)[0]


def _measure_each() -> dict[str, str]:
    return outcomes(CASES, measure_and_clip)


@pytest.mark.parametrize("case", CASES)
def test_measured_and_clipped_on_the_device(measured: dict[str, str], case: str) -> None:
    assert not measured[case], measured[case]


@pytest.mark.parametrize("start", [None, 5], ids=["whole", "slice"])
def test_zero_centred_gains_are_scaled_on_the_device(start: int | None) -> None:
    """Megatron-Core's norm in plain torch has none."""
    with World() as world:
        gain = world.parameter(12)
        tensor = gain.detach() if start is None else gain.detach()[start:9]
        rows = Rows(gain, torch.arange(12, device=GPU), offset=1.0)
        with world.refusing():
            scale_rows(Target(tensor, rows, start), torch.ones(12, device=GPU))
