"""QK-clip in the course of a run: steps, evaluation, what is measured and refused, and Megatron's own calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muon import Variant, register_variant
from megatron_muon.config import MuonConfig
from megatron_muon.errors import ConfigError
from megatron_muon.plugin.qk_clip import clip_of
from megatron_muon.plugin.qk_clip_build import _Found, _settings
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.qk_clip import GQA, connect, forward, plain_optimizer, small_run
from tests.megatron.test_cpu_mamba import MAMBA
from tests.megatron.test_layout_rules import multi_token_prediction
from tests.megatron.test_routing import GDN
from tests.pool import RankPool


def overflow() -> tuple[bool, bool, bool]:
    run = small_run()
    clip = clip_of(run.chunks)
    run.losses(1)
    before = [param.detach().clone() for param in run.chunks[0].parameters()]
    for part in run.optimizer.chained_optimizers:
        part.prepare_grads = lambda: True  # as after an overflow
    try:
        run.losses(1)
        skipped = False
    except AssertionError:
        skipped = True
    same = all(torch.equal(old, new) for old, new in zip(before, run.chunks[0].parameters(), strict=True))
    return skipped, same, bool((clip._maxima == -torch.inf).all())


def test_skipped_steps_clip_nothing_and_forget_the_maxima(pool: RankPool) -> None:
    assert pool.run(overflow, 1)[0] == (True, True, True)


def evaluation() -> list[float]:
    from megatron.core.transformer import cuda_graphs

    run = small_run()
    run.chunks[0].eval()
    run.losses(0)
    forward(run.chunks[0])
    seen = [clip_of(run.chunks)._maxima.max().item()]
    run.chunks[0].train()
    cuda_graphs._set_warmup_start()
    forward(run.chunks[0])
    cuda_graphs._set_warmup_end()
    seen.append(clip_of(run.chunks)._maxima.max().item())
    forward(run.chunks[0])
    return [*seen, clip_of(run.chunks)._maxima.max().item()]


def test_evaluation_and_the_warmup_of_cuda_graphs_do_not_count(pool: RankPool) -> None:
    """Before it captures a layer, Megatron-Core runs it on memory that holds no activations of a step."""
    *asleep, awake = pool.run(evaluation, 1)[0]
    assert asleep == [-torch.inf] * 2 and awake > 0


def intervals() -> list[tuple[float, bool]]:
    options = {"muon_qk_logits_interval": 3}
    run = harness.start(Layout(), optimizer=options, qk_clip=True, qk_clip_threshold=0.05, **GQA)
    clip = clip_of(run.chunks)
    found = []
    for _ in range(5):
        seen = clip.gauges[0].active
        run.losses(1)
        found.append((clip.max_logit.item(), seen))
    return found


def test_measured_in_every_third_step(pool: RankPool) -> None:
    found = pool.run(intervals, 1)[0]
    assert [seen for _, seen in found] == [True, False, False, True, False]
    values = [value for value, _ in found]
    assert values[0] == values[1] == values[2] != values[3] == values[4]


def visited_each() -> dict[str, tuple[list[str], list[str], list[str]]]:
    return {kind: visited(kind) for kind in ("mtp", "gdn", "mamba")}


def visited(kind: str) -> tuple[list[str], list[str], list[str]]:
    """Names of layers, of parameters that are clipped, and of all query and key projections."""
    layout = Layout(tp=dist.get_world_size())
    layout.initialize()
    if kind == "mtp":
        model = multi_token_prediction(layout, qk_clip=True, **GQA)
    else:
        build = {"gdn": {**GDN, "qk_clip": True}, "mamba": {**MAMBA, "qk_clip": True}}[kind]
        (model,) = harness.build_model(layout, **build)
    optimizer = plain_optimizer(model, layout)
    clip = connect([model], optimizer, {})
    names = {param: name for name, param in model.named_parameters()}
    every = [name for name in names.values() if name.endswith("linear_qkv.weight")]
    return clip.names, [names[rows.param] for rows in clip.rows], every


def test_layers_of_every_stack_are_visited(pool: RankPool) -> None:
    """MTP layers have attention too; GatedDeltaNet and Mamba layers have no softmax and are passed by."""
    for kind, (layers, clipped, every) in pool.run(visited_each, 2)[0].items():
        assert clipped == every and len(layers) == len(every) > 0, kind
        assert any("mtp" in name for name in layers) == (kind == "mtp")


def upstream(calls: list[str], tp: int) -> list[str]:
    """What Megatron-Core's own QK-clip raises, or what becomes of the weights."""
    import megatron_muon

    layout = Layout(tp=tp)
    layout.initialize()
    megatron_muon.uninstall()
    return [call_upstream(call, layout) for call in calls]


def call_upstream(call: str, layout: Layout) -> str:
    models = {"gate": {**GQA, "attention_output_gate": True}, "mamba": MAMBA, "bias": {**GQA, "add_qkv_bias": True}}
    build = models.get(call, GQA)
    (chunk,) = harness.build_model(layout, qk_clip=True, **build)
    attention = next(module for module in chunk.modules() if hasattr(module, "clip_qk"))
    maxima = torch.full((attention.num_attention_heads_per_partition,), 400.0)
    if call == "negative":
        maxima = torch.full_like(maxima, -400.0)
        maxima[-1] = 400.0
    bias = attention.linear_qkv.bias
    if bias is not None:
        torch.nn.init.ones_(bias)
    try:
        if call == "slice":
            attention.linear_qkv.weight.main_param = attention.linear_qkv.weight.detach().flatten()[:100].clone()
        if call in ("path", "mamba"):
            from megatron.core.optimizer.qk_clip import clip_qk

            clip_qk([chunk] if call == "path" else [_Wrapped(_Wrapped(chunk))])
        else:
            attention.core_attention.current_max_attn_logits = maxima
            attention.clip_qk()
    except Exception as error:
        return type(error).__name__
    if call == "bias":
        return "kept" if torch.equal(bias, torch.ones_like(bias)) else "scaled"
    return "nan" if attention.linear_qkv.weight.isnan().any() else "scaled"


class _Wrapped(torch.nn.Module):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


def test_what_megatrons_own_clip_does(pool: RankPool) -> None:
    """Why it is replaced. Should one of these change, docs/muonclip.md has to."""
    outcomes = {
        "gqa": "scaled",
        "gate": "RuntimeError",  # the output gate
        "negative": "nan",  # a head's maximum
        "path": "AttributeError",  # a float32 model
        "mamba": "AttributeError",  # a hybrid stack
        "slice": "RuntimeError",  # of the distributed optimizer
        "bias": "kept",
    }
    assert dict(zip(outcomes, pool.run(upstream, 1, list(outcomes), 1)[0], strict=True)) == outcomes
    assert pool.run(upstream, 2, ["gqa"], 2) == [["RuntimeError"]] * 2  # tensor parallelism


def replaced() -> tuple[float, float, str]:
    run = small_run()
    run.losses(1)
    from megatron.core.optimizer.qk_clip import clip_qk

    weights = [param.detach().clone() for param in run.chunks[0].parameters()]
    found = clip_qk(run.chunks)
    assert all(torch.equal(old, new) for old, new in zip(weights, run.chunks[0].parameters(), strict=True))
    try:
        clip_qk([torch.nn.Linear(2, 2)])
    except ConfigError as error:
        return found.item(), clip_of(run.chunks).max_logit.item(), str(error)
    return found.item(), 0.0, ""


def test_megatrons_call_clips_nothing_more(pool: RankPool) -> None:
    found, expected, message = pool.run(replaced, 1)[0]
    assert found == expected > 0
    assert "get_megatron_optimizer" in message and "after megatron_muon.install()" in message


class Kept(Variant):
    """Of a user."""

    name = "kept"
    decays = False


REFUSED: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
    ({"qk_clip_alpha": 1.0}, {}, {}, "--qk-clip-alpha 1.0: give a number between 0 and 1"),
    ({"qk_clip_threshold": -1.0}, {}, {}, "--qk-clip-threshold -1.0: give a positive number"),
    ({}, {}, {"muon_qk_logits": "te"}, "--muon-qk-logits te: decoder.layers.0.self_attention"),
    ({}, {}, {"muon_qk_clip_rule": "loudest"}, "--muon-qk-clip-rule loudest: choose one of q_only"),
    ({}, {}, {"muon_qk_logits_interval": 0}, "--muon-qk-logits-interval 0: give a whole number of at least 1"),
    ({}, {}, {"muon_qk_log_layers": -1}, "--muon-qk-log-layers -1: give a whole number"),
    ({"qk_l2_norm": True}, {}, {"muon_qk_clip_norm": "gains"}, "no gains, so that their logits are bounded"),
    ({}, {"name": "spectral_sphere"}, {}, "--qk-clip with --optimizer spectral_sphere: decoder.layers.0"),
    (
        {},
        {"muon_variant": "hyperball", "muon_scale_mode": "none"},
        {},
        "--qk-clip with --muon-variant hyperball: decoder.layers.0",
    ),
    ({}, {"muon_variant": "kept"}, {}, "--qk-clip with --muon-variant kept: decoder.layers.0"),
    (
        {},
        {"name": "stiefel_muon", "muon_param_rule": ("*linear_qkv.weight=stiefel",)},
        {},
        "--qk-clip with --muon-param-rule GLOB=stiefel: decoder.layers.0",
    ),
]


def refusals() -> list[str]:
    register_variant(Kept)
    messages = []
    for build, optimizer, options, _ in REFUSED:
        try:
            harness.start(Layout(), optimizer={**optimizer, **options}, qk_clip=True, **build)
            messages.append("")
        except ConfigError as error:
            messages.append(str(error))
    return messages


def test_refusals(pool: RankPool) -> None:
    for message, (*_, expected) in zip(pool.run(refusals, 1)[0], REFUSED, strict=True):
        assert expected in message


def test_steps_that_a_captured_forward_pass_cannot_leave_out_are_refused() -> None:
    """In configs too; the CPU runtime refuses graphs, so that no model is built here."""
    found = [_Found("layers.0", 2, 2, True, 100.0, 0.5, 1, "local")]
    with pytest.raises(ConfigError, match="--cuda-graph-impl local with --muon-qk-logits-interval 3: a captured"):
        _settings(found, object(), MuonConfig(qk_logits_interval=3))
    assert _settings(found, object(), MuonConfig()).clip


def bound_with_context() -> str:
    try:
        harness.start(Layout(cp=2), optimizer={"muon_qk_logits": "lse"}, qk_clip=True, num_layers=1)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_bound_that_context_parallel_ranks_cannot_have_is_refused_before_training(pool: RankPool) -> None:
    for message in pool.run(bound_with_context, 2):
        assert message.startswith("--muon-qk-logits lse with --context-parallel-size 2: the flash kernel sees")


def only_measured() -> tuple[bool, dict[str, float]]:
    run = small_run(qk_clip=False, log_max_attention_logit=True)
    clip = clip_of(run.chunks)
    before = [rows.param for rows in clip.rows]
    run.losses(1)
    return not before, clip.scalars()


def test_what_is_only_measured_counts_no_clipped_heads(pool: RankPool) -> None:
    unclipped, scalars = pool.run(only_measured, 1)[0]
    assert unclipped and list(scalars) == ["max_attention_logit"]
    assert scalars["max_attention_logit"] > 0.05  # the threshold
