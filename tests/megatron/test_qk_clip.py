"""QK-clip on real attention layers of Megatron-Core: exact in float64, and the same at every parallel layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from megatron_muon.config import MuonConfig
from megatron_muon.errors import ConfigError
from megatron_muon.qk_clip.factors import factor_table
from tests.megatron import harness
from tests.megatron.fused_modules import multi_token_prediction
from tests.megatron.harness import Layout
from tests.megatron.test_cpu_mamba import MAMBA
from tests.megatron.test_routing import GDN, MLA
from tests.pool import RankPool

GQA = {"num_query_groups": 2}
LATENT = {**MLA, "qk_layernorm": False}
ONE_LAYER = {"num_layers": 1, "init_method_std": 0.4}


class Clipped(NamedTuple):
    """One clipping of a model in float64, without an update of the weights."""

    before: torch.Tensor
    """Largest logit of each head."""
    after: torch.Tensor
    weights: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    """Parameter before and after, and the factor of each of its rows."""


def plain_optimizer(model: torch.nn.Module, layout: Layout) -> Any:
    """Megatron's wrapper of an optimizer that changes nothing."""
    from megatron.core.optimizer.optimizer import FP32Optimizer

    config = harness.optimizer_config(layout, name="sgd")
    return FP32Optimizer(torch.optim.SGD(model.parameters(), lr=0.0), config, None)


def forward(chunk: torch.nn.Module, sequences: int = 4) -> None:
    batch = torch.arange(sequences * 16).view(sequences, 16) * 7 % 64
    mask = torch.ones(1, 1, 16, 16).tril() < 0.5
    chunk(batch, torch.arange(16).expand(sequences, -1), mask)


def clip_once(layout: Layout, share: float, options: dict[str, Any], build: dict[str, Any]) -> Clipped:
    """Clip a model in float64 so that its loudest head comes down to ``share`` of its logit."""
    from megatron_muon.plugin.groups import ranks_of
    from megatron_muon.plugin.qk_clip_build import build_clip

    layout.initialize()
    (chunk,) = harness.build_model(layout, qk_clip=True, **{**ONE_LAYER, **build})
    chunk = chunk.double()
    for name, param in chunk.named_parameters():
        if name.endswith(("layernorm.weight", "bias")):  # from where Megatron has ones and zeros
            param.data.add_(torch.linspace(-0.3, 0.3, param.numel(), dtype=param.dtype))
    optimizer = plain_optimizer(chunk, layout)
    clip = build_clip(optimizer.config, [chunk], MuonConfig(**options), optimizer, ranks_of(None))
    forward(chunk)
    dist.all_reduce(clip._maxima, op=dist.ReduceOp.MAX)
    before = clip._maxima.clone()
    clip.settings = clip.settings.__class__(
        clip=True, threshold=share * before.max().item(), alpha=0.4, rule=clip.settings.rule
    )
    weights = {name: param.detach().clone() for name, param in chunk.named_parameters()}
    factors = {}
    update = optimizer.optimizer.step
    clip.step(lambda: (factors.update(clip._factors), update())[0])
    forward(chunk)
    dist.all_reduce(clip._maxima, op=dist.ReduceOp.MAX)
    one = torch.ones(1, dtype=torch.float64)
    found = {
        name: (weights[name], param.detach().clone(), factors.get(id(param), one))
        for name, param in chunk.named_parameters()
    }
    return Clipped(before, clip._maxima.clone(), found)


EXACT = {
    "mha": ({}, {"num_query_groups": 4}),
    "mha-bias": ({}, {"num_query_groups": 4, "add_bias_linear": True}),
    "mha-learned positions": ({}, {"num_query_groups": 4, "position": "learned_absolute"}),
    "gqa": ({}, GQA),
    "gqa-group": ({"qk_clip_rule": "group"}, GQA),
    "gqa-exact": ({"qk_clip_rule": "exact"}, GQA),
    "gqa-bias": ({"qk_clip_rule": "exact"}, {**GQA, "add_qkv_bias": True}),
    "gqa-gate": ({}, {**GQA, "attention_output_gate": True}),
    "gqa-gate-exact": ({"qk_clip_rule": "exact"}, {**GQA, "attention_output_gate": True}),
    "mqa": ({"qk_clip_rule": "exact"}, {"num_query_groups": 1}),
    "mla": ({}, LATENT),
    "mla-without query latent": ({}, {**LATENT, "q_lora_rank": None}),
    "mla-norms of the latents": ({}, MLA),
    "layer scaling": ({}, {**GQA, "apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True}),
    "products again": ({"qk_logits": "exact"}, GQA),
    "products again, mla": ({"qk_logits": "exact"}, LATENT),
}


@pytest.mark.parametrize("name", EXACT)
def test_logits_come_down_to_the_threshold(pool: RankPool, name: str) -> None:
    """Loud heads to the threshold, quiet heads stay (or follow their group); no other row changes in any bit."""
    options, build = EXACT[name]
    result = pool.run(clip_once, 1, Layout(), 0.6, options, build)[0]
    threshold = 0.6 * result.before.max()
    gamma = torch.where(result.before > threshold, threshold / result.before, 1.0)
    assert (gamma < 1).any()
    if options.get("qk_clip_rule") == "group":
        gamma = gamma.view(build["num_query_groups"], -1).amin(1, keepdim=True).expand(-1, 4 // 2).flatten()
    torch.testing.assert_close(result.after, gamma * result.before, rtol=1e-12, atol=0)
    changed = [key for key, (before, after, _) in result.weights.items() if not torch.equal(before, after)]
    latent = "multi_latent_attention" in build
    expected = ["linear_q", "linear_kv_up_proj"] if latent else ["linear_qkv"]
    assert changed and all(any(part in key for part in expected) for key in changed), changed
    for before, after, factors in result.weights.values():
        still = factors == 1
        assert factors.numel() == 1 or torch.equal(before[still], after[still])


@pytest.mark.parametrize("rule", ["q_only", "group", "exact"])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ["mha", "gqa", "gqa-gate", "gqa-bias", "mla"])
def test_tensor_parallel_shards_are_clipped_as_the_whole(pool: RankPool, name: str, ranks: int, rule: str) -> None:
    """Factors of all ranks put together are those of one; at TP 4 there are more ranks than query groups."""
    build = {"num_attention_heads": 8, "kv_channels": 8, **EXACT[name][1]}
    if rule != "q_only" and build.get("num_query_groups") != 2:
        pytest.skip("no keys are shared, so that the rule does not matter")
    options = {"qk_clip_rule": rule}
    whole = pool.run(clip_once, 1, Layout(), 0.6, options, build)[0]
    parts = pool.run(clip_once, ranks, Layout(tp=ranks), 0.6, options, build)
    # The weights of a model differ between layouts (each rank has its own random numbers): what is loud differs too.
    for key, (before, after, factors) in whole.weights.items():
        if factors.numel() == 1:
            continue
        shards = [part.weights[key] for part in parts]
        assert sum(shard[2].numel() for shard in shards) == factors.numel()
        for shard_before, shard_after, shard_factors in shards:
            scaled = shard_before * shard_factors.view(-1, *[1] * (shard_before.dim() - 1))
            assert torch.equal(shard_after, scaled)
        assert torch.equal(after, before * factors.view(-1, *[1] * (before.dim() - 1)))
    first = parts[0]
    threshold = 0.6 * first.before.max()
    gamma = torch.where(first.before > threshold, threshold / first.before, 1.0)
    if rule == "group":
        gamma = gamma.view(2, -1).amin(1, keepdim=True).expand(-1, 4).flatten()
    torch.testing.assert_close(first.after, gamma * first.before, rtol=1e-12, atol=0)
    assert all(torch.equal(part.before, first.before) and torch.equal(part.after, first.after) for part in parts)


def clip_given(layout: Layout, initial: str, result: str, options: dict[str, Any], build: dict[str, Any]) -> None:
    """Clip the weights of one folder by given logits and leave them in another."""
    from megatron_muon.plugin.groups import ranks_of
    from megatron_muon.plugin.qk_clip_build import build_clip

    layout.initialize()
    chunks = harness.build_model(layout, qk_clip=True, qk_clip_threshold=100.0, **build)
    harness.load_weights(chunks, initial)
    optimizer = plain_optimizer(chunks[0], layout)
    clip = build_clip(optimizer.config, chunks, MuonConfig(**options), optimizer, ranks_of(None))
    clip._maxima.copy_(torch.linspace(-50, 400, clip.heads.count))
    clip.step(optimizer.optimizer.step)
    harness.save_weights(chunks, result)


def read(folder: str, build: dict[str, Any]) -> dict[str, torch.Tensor]:
    Layout().initialize()
    chunks = harness.build_model(Layout(), **build)
    harness.load_weights(chunks, folder)
    return {name: param.detach().clone() for name, param in chunks[0].named_parameters()}


@pytest.mark.parametrize("name", ["mha", "gqa-exact", "gqa-gate-exact", "gqa-bias", "mla"])
def test_reassembled_weights_are_those_of_one_rank(pool: RankPool, tmp_path: Path, name: str) -> None:
    """Bit for bit; at TP 4 there are more ranks than query groups."""
    options, build = EXACT[name]
    initial = str(tmp_path / "initial")
    pool.run(harness.save_initial_weights, 1, initial, **build)
    found = []
    for ranks in (1, 2, 4):
        result = str(tmp_path / f"tp{ranks}")
        pool.run(clip_given, ranks, Layout(tp=ranks), initial, result, options, build)
        found.append(pool.run(read, 1, result, build)[0])
    before = pool.run(read, 1, initial, build)[0]
    assert any(not torch.equal(before[key], value) for key, value in found[0].items())
    for weights in found[1:]:
        assert all(torch.equal(weights[key], value) for key, value in found[0].items())


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("policy", ["skip", "gains"])
def test_normalised_queries_and_keys(pool: RankPool, policy: str, centred: bool, normalization: str) -> None:
    """Weights cannot help; gains can, all heads together."""
    if centred and normalization == "RMSNorm":
        pytest.skip("Megatron's plain RMSNorm has no zero-centred gains")
    build = {
        **GQA,
        "qk_layernorm": True,
        "layernorm_zero_centered_gamma": centred,
        "normalization": normalization,
        "add_bias_linear": False,
    }
    result = pool.run(clip_once, 1, Layout(), 0.6, {"qk_clip_norm": policy}, build)[0]
    changed = {key for key, (before, after, _) in result.weights.items() if not torch.equal(before, after)}
    if policy == "skip":
        assert torch.equal(result.after, result.before) and not changed
        return
    torch.testing.assert_close(result.after, 0.6 * result.before, rtol=1e-12, atol=0)
    kinds = {key.rpartition("self_attention.")[2] for key in changed}
    biases = {"q_layernorm.bias", "k_layernorm.bias"} if normalization == "LayerNorm" else set()
    assert kinds == {"q_layernorm.weight", "k_layernorm.weight", *biases}


class Trained(NamedTuple):
    """A run, on one rank."""

    losses: list[float]
    maxima: list[float]
    clipped: list[int]


def train(
    layout: Layout, weights: str, threshold: float, optimizer: dict[str, Any], build: dict[str, Any], steps: int = 6
) -> Trained:
    build = dict(build)
    start = {key: build.pop(key) for key in ("bf16", "param_layout") if key in build}
    flags = {"qk_clip": True, "qk_clip_threshold": threshold}
    run = harness.start(layout, weights=weights, optimizer=optimizer, **start, **flags, **build)
    clip = run.chunks[0].muon_qk_clip
    losses, maxima, clipped = [], [], []
    for _ in range(steps):
        losses += run.losses(1)
        maxima.append(clip.max_logit.item())
        clipped.append(int(clip.heads_clipped))
    return Trained(losses, maxima, clipped)


MODELS: dict[str, tuple[float, dict[str, Any]]] = {
    "gqa": (0.5, {**GQA, "init_method_std": 0.2}),
    "gate": (0.5, {**GQA, "init_method_std": 0.2, "attention_output_gate": True}),
    "mla": (0.5, {**LATENT, "init_method_std": 0.2}),
    "hybrid": (0.5, {**MAMBA, "init_method_std": 0.2}),
}
MUON: dict[str, Any] = {}
ADAM = {"name": "adam"}

LAYOUTS = {
    "gqa-tp2_sp": ("gqa", 2, Layout(tp=2, sp=True), MUON, {}),
    "gqa-tp4, more ranks than query groups": ("gqa", 4, Layout(tp=4), MUON, {}),
    "gqa-pp2": ("gqa", 2, Layout(pp=2), MUON, {}),
    "gqa-pp2_vpp2": ("gqa", 2, Layout(pp=2, vpp=2), MUON, {}),
    "gqa-dp2": ("gqa", 2, Layout(), MUON, {}),
    "gqa-dp2_layer_wise": ("gqa", 2, Layout(layer_wise=True), MUON, {}),
    "gqa-cp2": ("gqa", 2, Layout(cp=2), MUON, {}),
    "gqa-cp2, products again": ("gqa", 2, Layout(cp=2), {"muon_qk_logits": "exact"}, {}),
    "gqa-adam": ("gqa", 1, Layout(), ADAM, {}),
    "gqa-adam_dp2, distributed optimizer": ("gqa", 2, Layout(ddp_buffers=True), ADAM, {}),
    "gqa-adam_tp2_dp2, distributed optimizer": ("gqa", 4, Layout(tp=2, ddp_buffers=True), ADAM, {}),
    "gqa-recomputed activations": (
        "gqa",
        1,
        Layout(),
        MUON,
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ),
    "gate-tp2": ("gate", 2, Layout(tp=2), MUON, {}),
    "gate-tp4, more ranks than query groups": ("gate", 4, Layout(tp=4), MUON, {}),
    "mla-tp2": ("mla", 2, Layout(tp=2), MUON, {}),
    "mla-dp2_layer_wise": ("mla", 2, Layout(layer_wise=True), MUON, {}),
    "hybrid-tp2": ("hybrid", 2, Layout(tp=2), MUON, {}),
}


@pytest.fixture(scope="module")
def references(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, dict[str, Trained]]]:
    """Of each model its initial weights and runs on one rank, with Muon and with Adam."""
    folder, found = tmp_path_factory.mktemp("qk_clip"), {}
    for name, (threshold, build) in MODELS.items():
        weights = str(folder / name)
        pool.run(harness.save_initial_weights, 1, weights, **build)
        runs = {"muon": pool.run(train, 1, Layout(), weights, threshold, MUON, build)[0]}
        if name == "gqa":
            runs["adam"] = pool.run(train, 1, Layout(), weights, threshold, ADAM, build)[0]
        assert all(min(run.clipped) > 0 and run.losses[-1] < run.losses[0] for run in runs.values())
        found[name] = (weights, runs)
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_does_not_depend_on_the_layout(
    pool: RankPool, references: dict[str, tuple[str, dict[str, Trained]]], name: str
) -> None:
    """Heads are clipped in every step; losses, maxima over the whole model and numbers of clipped heads agree."""
    model, ranks, layout, optimizer, changes = LAYOUTS[name]
    threshold, build = MODELS[model]
    weights, runs = references[model]
    expected = runs[optimizer.get("name", "muon")]
    for found in pool.run(train, ranks, layout, weights, threshold, optimizer, {**build, **changes}):
        assert found.losses == pytest.approx(expected.losses, abs=1e-5)
        assert found.maxima == pytest.approx(expected.maxima, rel=1e-4)
        assert found.clipped == expected.clipped


def bits(layout: Layout, weights: str, optimizer: dict[str, Any], build: dict[str, Any]) -> list[torch.Tensor]:
    """The weights after steps in which heads are clipped."""
    flags = {"qk_clip": True, "qk_clip_threshold": 0.5}
    run = harness.start(layout, weights=weights, optimizer=optimizer, **flags, **build)
    run.losses(3)
    assert int(run.chunks[0].muon_qk_clip.heads_clipped) > 0
    return [param.detach().clone() for param in harness.unwrap(run.chunks[0]).parameters()]


@pytest.mark.parametrize("bf16", [False, True])
def test_flat_slices_are_clipped_as_whole_weights(
    pool: RankPool, references: dict[str, tuple[str, dict[str, Trained]]], tmp_path: Path, bf16: bool
) -> None:
    """Adam with the distributed optimizer, whose ranks have slices of weights, and without: the same bits."""
    build = MODELS["gqa"][1]
    weights = references["gqa"][0]
    optimizer = {**ADAM, "clip_grad": 0.0}  # its norm is summed in another order
    whole = pool.run(bits, 2, Layout(), weights, optimizer, {**build, "bf16": bf16})
    sliced = pool.run(bits, 2, Layout(ddp_buffers=True), weights, optimizer, {**build, "bf16": bf16})
    for one, other in zip([*whole[0], *whole[1]], [*sliced[0], *sliced[1]], strict=True):
        assert torch.equal(one, other)


def masters(layer_wise: bool) -> list[tuple[bool, bool]]:
    """Of each clipped weight whether the bfloat16 copy is the rounded master, and whether the master was scaled."""
    from megatron_muon.plugin.optimizer_state import held_by

    run = harness.start(
        Layout(layer_wise=layer_wise),
        bf16=True,
        optimizer={"lr": 1e-9, "min_lr": 1e-9, "weight_decay": 0.0},
        qk_clip=True,
        qk_clip_threshold=0.05,
        **GQA,
    )
    before = {held.param: held.master.clone() for held in held_by(run.optimizer) if held.master is not None}
    run.losses(1)
    clipped = {rows.param for rows in run.chunks[0].muon_qk_clip.rows}
    return [
        (
            torch.equal(held.master.bfloat16(), held.param.detach()),
            not torch.allclose(held.master, before[held.param], rtol=1e-3),
        )
        for held in held_by(run.optimizer)
        if held.param in clipped
    ]


@pytest.mark.parametrize("layer_wise", [False, True])
def test_float32_masters_are_scaled_before_they_are_copied(pool: RankPool, layer_wise: bool) -> None:
    ranks = pool.run(masters, 2, layer_wise)
    found = [each for rank in ranks for each in rank]
    assert len(found) == (4 if layer_wise else 8) and all(copied and scaled for copied, scaled in found)


def small_run(**changes: Any) -> Any:
    values: dict[str, Any] = {"qk_clip": True, "qk_clip_threshold": 0.05, **GQA, **changes}
    return harness.start(Layout(tp=dist.get_world_size()), **values)


def overflow() -> tuple[bool, bool, bool]:
    run = small_run()
    clip = run.chunks[0].muon_qk_clip
    run.losses(1)
    before = [param.detach().clone() for param in run.chunks[0].parameters()]
    run.optimizer.prepare_grads = lambda: True  # as after an overflow
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
    run = small_run()
    run.chunks[0].eval()
    run.losses(0)
    forward(run.chunks[0])
    seen = [run.chunks[0].muon_qk_clip._maxima.max().item()]
    run.chunks[0].train()
    forward(run.chunks[0])
    return [*seen, run.chunks[0].muon_qk_clip._maxima.max().item()]


def test_evaluation_does_not_count(pool: RankPool) -> None:
    asleep, awake = pool.run(evaluation, 1)[0]
    assert asleep == -torch.inf and awake > 0


def count_work(clip: bool) -> tuple[int, int, int]:
    """All-reduces in a step, those for a maximum, and waits for the device inside the optimizer's step."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
            return function(*args, **(kwargs or {}))

    run = small_run(qk_clip=clip)
    run.losses(2)
    reduced: list[Any] = []
    original, step, waits = dist.all_reduce, run.optimizer.step, Waits()

    def all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, *args: Any, **kwargs: Any) -> Any:
        reduced.append(op)
        return original(tensor, op, *args, **kwargs)

    def watched() -> Any:
        with waits:
            return step()

    run.optimizer.step = watched
    dist.all_reduce = all_reduce
    try:
        run.losses(1)
    finally:
        dist.all_reduce = original
    return len(reduced), sum(op == dist.ReduceOp.MAX for op in reduced), waits.count


def test_one_collective_and_no_wait_a_step(pool: RankPool) -> None:
    """Four layers, two ranks."""
    with_clip, without = pool.run(count_work, 2, True)[0], pool.run(count_work, 2, False)[0]
    assert with_clip[0] == without[0] + 1 and with_clip[1] == without[1] + 1
    assert with_clip[2] == without[2]


def intervals() -> list[tuple[float, bool]]:
    options = {"muon_qk_logits_interval": 3}
    run = harness.start(Layout(), optimizer=options, qk_clip=True, qk_clip_threshold=0.05, **GQA)
    clip = run.chunks[0].muon_qk_clip
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


def visited(kind: str) -> tuple[list[str], list[str], list[str]]:
    """Names of layers, of parameters that are clipped, and of all query and key projections."""
    from megatron_muon.plugin.groups import ranks_of
    from megatron_muon.plugin.qk_clip_build import build_clip

    layout = Layout(tp=dist.get_world_size())
    layout.initialize()
    if kind == "mtp":
        model = multi_token_prediction(layout, qk_clip=True, **GQA)
    else:
        build = {"gdn": {**GDN, "qk_clip": True}, "mamba": {**MAMBA, "qk_clip": True}}[kind]
        (model,) = harness.build_model(layout, **build)
    optimizer = plain_optimizer(model, layout)
    clip = build_clip(optimizer.config, [model], MuonConfig(), optimizer, ranks_of(None))
    names = {param: name for name, param in model.named_parameters()}
    every = [name for name in names.values() if name.endswith("linear_qkv.weight")]
    return clip.names, [names[rows.param] for rows in clip.rows], every


@pytest.mark.parametrize("kind", ["mtp", "gdn", "mamba"])
def test_layers_of_every_stack_are_visited(pool: RankPool, kind: str) -> None:
    """MTP layers have attention too; GatedDeltaNet and Mamba layers have no softmax and are passed by."""
    layers, clipped, every = pool.run(visited, 2, kind)[0]
    assert clipped == every and len(layers) == len(every) > 0
    assert any("mtp" in name for name in layers) == (kind == "mtp")


def upstream(call: str, tp: int) -> str:
    """What Megatron-Core's own QK-clip raises, or what becomes of the weights."""
    import megatron_muon

    layout = Layout(tp=tp)
    layout.initialize()
    megatron_muon.uninstall()
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
    finally:
        megatron_muon.install()
    if call == "bias":
        return "kept" if torch.equal(bias, torch.ones_like(bias)) else "scaled"
    return "nan" if attention.linear_qkv.weight.isnan().any() else "scaled"


class _Wrapped(torch.nn.Module):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize(
    ("call", "tp", "outcome"),
    [
        ("gqa", 2, "RuntimeError"),
        ("gate", 1, "RuntimeError"),
        ("negative", 1, "nan"),
        ("path", 1, "AttributeError"),
        ("mamba", 1, "AttributeError"),
        ("slice", 1, "RuntimeError"),
        ("bias", 1, "kept"),
        ("gqa", 1, "scaled"),
    ],
    ids=[
        "tensor parallel",
        "output gate",
        "negative maximum",
        "float32 model",
        "hybrid stack",
        "distributed optimizer",
        "bias",
        "plain",
    ],
)
def test_what_megatrons_own_clip_does(pool: RankPool, call: str, tp: int, outcome: str) -> None:
    """Why it is replaced. Should one of these change, docs/muonclip.md has to."""
    assert set(pool.run(upstream, tp, call, tp)) == {outcome}


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
        return found.item(), run.chunks[0].muon_qk_clip.max_logit.item(), str(error)
    return found.item(), 0.0, ""


def test_megatrons_call_clips_nothing_more(pool: RankPool) -> None:
    found, expected, message = pool.run(replaced, 1)[0]
    assert found == expected > 0
    assert "get_megatron_optimizer" in message and "after megatron_muon.install()" in message


def refusal(build: dict[str, Any], optimizer: dict[str, Any], options: dict[str, Any]) -> str:
    try:
        harness.start(Layout(), optimizer={**optimizer, **options}, qk_clip=True, **build)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("build", "optimizer", "options", "message"),
    [
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
        (
            {},
            {"name": "stiefel_muon", "muon_param_rule": ("*linear_qkv*=stiefel",)},
            {},
            "--qk-clip with --muon-param-rule GLOB=stiefel: decoder.layers.0",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refusals(
    pool: RankPool, build: dict[str, Any], optimizer: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    assert message in pool.run(refusal, 1, build, optimizer, options)[0]


def only_measured() -> tuple[bool, dict[str, float]]:
    run = small_run(qk_clip=False, log_max_attention_logit=True)
    clip = run.chunks[0].muon_qk_clip
    before = [rows.param for rows in clip.rows]
    run.losses(1)
    return not before, clip.scalars()


def test_what_is_only_measured_counts_no_clipped_heads(pool: RankPool) -> None:
    unclipped, scalars = pool.run(only_measured, 1)[0]
    assert unclipped and list(scalars) == ["max_attention_logit"]
    assert scalars["max_attention_logit"] > 0.05  # the threshold


class Explosion(NamedTuple):
    """A training with a large learning rate on query and key projections."""

    losses: list[float]
    maxima: list[float]
    first_layer: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    """Logits of the first layer's heads on the batch of each step: before the update, after it, and after the clip."""


def explode(clip: bool, rate: float, projections: str, build: dict[str, Any], steps: int) -> Explosion:
    import megatron_muon

    megatron_muon.install()
    from megatron.core.optimizer.optimizer_config import ParamKey

    overrides = {ParamKey(name=(projections,)): {"max_lr": rate, "min_lr": rate}}
    flags = {"qk_clip": clip, "log_max_attention_logit": True, "qk_clip_threshold": THRESHOLD}
    run = harness.start(Layout(), overrides=overrides, **flags, **build)
    for part in run.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            group["lr"] = group["max_lr"]  # as the scheduler does
    losses, maxima, first_layer = [], [], []
    its = run.chunks[0].muon_qk_clip
    for step in range(steps):
        losses += run.losses(1)
        maxima.append(its.max_logit.item())
        if clip:
            before, after = its._last[:4].clone(), logits_of_first_layer(run, step)
            with unclipped(run):
                first_layer.append((before, logits_of_first_layer(run, step), after))
    return Explosion(losses, maxima, first_layer)


def logits_of_first_layer(run: harness.Run, step: int) -> torch.Tensor:
    """Of the batch of a step, with the weights of now. What comes into the first layer no clip changes."""
    maxima = run.chunks[0].muon_qk_clip._maxima
    tokens = torch.stack([run.data.tokens(step, sample)[:-1] for sample in range(run.data.global_batch)])
    mask = torch.ones(1, 1, *[tokens.size(1)] * 2).tril() < 0.5
    with torch.no_grad():
        run.chunks[0](tokens, torch.arange(tokens.size(1)).expand_as(tokens), mask)
    found = maxima[:4].clone()
    maxima.fill_(-torch.inf)
    return found


@contextlib.contextmanager
def unclipped(run: harness.Run) -> Iterator[None]:
    """With the weights as the last update left them."""
    clip = run.chunks[0].muon_qk_clip
    weights = [rows.param.detach().clone() for rows in clip.rows]
    table = factor_table(clip._last, clip.heads, THRESHOLD, clip.settings.alpha, clip.settings.rule)
    for rows in clip.rows:
        rows.param.data.div_(table[rows.index][:, None])
    yield
    for rows, weight in zip(clip.rows, weights, strict=True):
        rows.param.data.copy_(weight)


THRESHOLD = 30.0


@pytest.mark.parametrize(
    ("projections", "rate", "build"),
    [("*linear_qkv*", 0.2, GQA), ("*_up_proj*", 1.0, LATENT)],
    ids=["gqa", "mla"],
)
def test_large_learning_rate(pool: RankPool, projections: str, rate: float, build: dict[str, Any]) -> None:
    """Without the clip logits pass 100; with it every head stays within the threshold times one step's growth."""
    free, clipped = (pool.run(explode, 1, clip, rate, projections, build, 70)[0] for clip in (False, True))
    assert max(free.maxima) > 100
    assert max(clipped.maxima) < 2 * THRESHOLD
    for before, after_update, after_clip in clipped.first_layer:
        growth = after_update / before
        bound = torch.where(before > THRESHOLD, THRESHOLD * growth, after_update)
        torch.testing.assert_close(after_clip, bound, rtol=1e-4, atol=1e-4)
    assert sum(bool((before > THRESHOLD).any()) for before, _, _ in clipped.first_layer) > 5
    first = next(step for step, value in enumerate(free.maxima) if value > THRESHOLD)
    assert clipped.losses[: first + 1] == free.losses[: first + 1]  # nothing is clipped before
    assert clipped.losses[-1] < clipped.losses[0] - 1
    assert sum(clipped.losses[-10:]) < sum(free.losses[-10:]) + 1.0
