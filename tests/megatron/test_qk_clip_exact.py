"""QK-clip on real attention layers of Megatron-Core, in float64: exact, and the same on shards as on whole weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.qk_clip import GQA, LATENT, connect, forward, plain_optimizer
from tests.megatron.test_routing import MLA
from tests.pool import RankPool

ONE_LAYER = {"num_layers": 1, "init_method_std": 0.4}
ALPHA = 0.4
"""Not the half: nobody would see the shares of queries and keys exchanged."""

Case = tuple[dict[str, Any], dict[str, Any]]
"""Options, and changes to the model."""


class Clipped(NamedTuple):
    """One clipping of a model in float64, without an update of the weights."""

    before: torch.Tensor
    """Largest logit of each head."""
    after: torch.Tensor
    weights: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    """Parameter before and after, and the factor of each of its rows."""


def clip_each(layout: Layout, cases: list[Case]) -> list[Clipped]:
    layout.initialize()
    return [clip_once(layout, *case) for case in cases]


def clip_once(layout: Layout, options: dict[str, Any], build: dict[str, Any]) -> Clipped:
    """Clip a model in float64 so that its loudest head comes down to 0.6 of its logit."""
    (chunk,) = harness.build_model(layout, qk_clip=True, qk_clip_alpha=ALPHA, **{**ONE_LAYER, **build})
    chunk = chunk.double()
    for name, param in chunk.named_parameters():
        if name.endswith(("layernorm.weight", "bias")):  # from where Megatron has ones and zeros
            param.data.add_(torch.linspace(-0.3, 0.3, param.numel(), dtype=param.dtype))
    optimizer = plain_optimizer(chunk, layout)
    clip = connect([chunk], optimizer, options)
    forward(chunk)
    dist.all_reduce(clip._maxima, op=dist.ReduceOp.MAX)
    before = clip._maxima.clone()
    clip.settings = dataclasses.replace(clip.settings, threshold=0.6 * before.max().item())
    weights = {name: param.detach().clone() for name, param in chunk.named_parameters()}
    factors = {}
    update = optimizer.optimizer.step
    clip.step(lambda: (factors.update(clip._factors or {}), update())[0])
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

NORMALISED: dict[str, Case] = {
    f"{policy}-{normalization}{'-centred' if centred else ''}": (
        {"qk_clip_norm": policy},
        {
            **GQA,
            "qk_layernorm": True,
            "layernorm_zero_centered_gamma": centred,
            "normalization": normalization,
            "add_bias_linear": False,
        },
    )
    for policy in ("skip", "gains")
    for normalization, centred in (("RMSNorm", False), ("LayerNorm", False), ("LayerNorm", True))
    # Megatron's plain RMSNorm has no zero-centred gains.
}

DIVIDED: dict[str, Case] = {
    f"{name}-{rule}": (
        {"qk_clip_rule": rule},
        {"num_attention_heads": 8, "kv_channels": 8, **EXACT[name][1]},
    )
    for name in ("mha", "gqa", "gqa-gate", "gqa-bias", "mla")
    for rule in ("q_only", "group", "exact")
    if rule == "q_only" or name.startswith("gqa")  # others share no keys, so that the rule does not matter
}


@pytest.fixture(scope="module")
def whole(pool: RankPool) -> dict[str, Clipped]:
    """Of every case what one rank does."""
    cases = {**EXACT, **NORMALISED, **{f"divided {name}": case for name, case in DIVIDED.items()}}
    return dict(zip(cases, pool.run(clip_each, 1, Layout(), list(cases.values()))[0], strict=True))


@pytest.mark.parametrize("name", EXACT)
def test_logits_come_down_to_the_threshold(whole: dict[str, Clipped], name: str) -> None:
    """Loud heads to the threshold, quiet heads stay (or follow their group); no other row changes in any bit."""
    options, build = EXACT[name]
    result = whole[name]
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


def test_queries_take_the_share_alpha_of_the_factor(whole: dict[str, Clipped]) -> None:
    """And keys the rest: what a logit comes to does not tell which took what."""
    result = whole["mha"]
    gamma = 0.6 * result.before.max() / result.before
    assert (gamma < 1).any()
    ((_, _, factors),) = [weight for name, weight in result.weights.items() if name.endswith("linear_qkv.weight")]
    shares = gamma.clamp(max=1.0)[:, None] ** torch.tensor([ALPHA, 1 - ALPHA, 0.0], dtype=torch.float64)
    # For each of four heads 8 rows of q, of k and of v.
    torch.testing.assert_close(factors.view(4, 3, 8), shares[:, :, None].expand(4, 3, 8), rtol=1e-12, atol=0)


@pytest.fixture(scope="module", params=[2, 4])
def parts(pool: RankPool, request: pytest.FixtureRequest) -> dict[str, list[Clipped]]:
    """Of the cases that are divided what each rank does."""
    ranks = pool.run(clip_each, request.param, Layout(tp=request.param), list(DIVIDED.values()))
    return dict(zip(DIVIDED, map(list, zip(*ranks, strict=True)), strict=True))


@pytest.mark.parametrize("name", DIVIDED)
def test_tensor_parallel_shards_are_clipped_as_the_whole(
    whole: dict[str, Clipped], parts: dict[str, list[Clipped]], name: str
) -> None:
    """Factors of all ranks put together are those of one; at TP 4 there are more ranks than query groups."""
    # The weights of a model differ between layouts (each rank has its own random numbers): what is loud differs too.
    for key, (before, after, factors) in whole[f"divided {name}"].weights.items():
        if factors.numel() == 1:
            continue
        shards = [part.weights[key] for part in parts[name]]
        assert sum(shard[2].numel() for shard in shards) == factors.numel()
        for shard_before, shard_after, shard_factors in shards:
            scaled = shard_before * shard_factors.view(-1, *[1] * (shard_before.dim() - 1))
            assert torch.equal(shard_after, scaled)
        assert torch.equal(after, before * factors.view(-1, *[1] * (before.dim() - 1)))
    first = parts[name][0]
    threshold = 0.6 * first.before.max()
    gamma = torch.where(first.before > threshold, threshold / first.before, 1.0)
    if name.endswith("-group"):
        gamma = gamma.view(2, -1).amin(1, keepdim=True).expand(-1, 4).flatten()
    torch.testing.assert_close(first.after, gamma * first.before, rtol=1e-12, atol=0)
    assert all(torch.equal(part.before, first.before) and torch.equal(part.after, first.after) for part in parts[name])


def build_each(layout: Layout, cases: dict[str, Case], **flags: Any) -> dict[str, Any]:
    layout.initialize()
    return {name: harness.build_model(layout, **flags, **build)[0] for name, (_, build) in cases.items()}


def state_of(models: dict[str, Any]) -> dict[str, Any]:
    return {name: model.sharded_state_dict(prefix=f"{name}.") for name, model in models.items()}


def save(models: dict[str, Any], folder: str) -> None:
    """All in one checkpoint: each takes a second, whatever is in it."""
    if dist.get_rank() == 0:
        Path(folder).mkdir()
    dist.barrier()
    from megatron.core import dist_checkpointing

    dist_checkpointing.save(state_of(models), folder)


def load(models: dict[str, Any], folder: str) -> None:
    from megatron.core import dist_checkpointing

    for name, state in dist_checkpointing.load(state_of(models), folder).items():
        harness.load_model(models[name], {key.removeprefix(f"{name}."): value for key, value in state.items()})


def save_initial(folder: str, cases: dict[str, Case]) -> None:
    save(build_each(Layout(), cases), folder)


def clip_given(layout: Layout, initial: str, result: str, cases: dict[str, Case]) -> None:
    """Clip the weights of one folder by given logits and leave them in another."""
    models = build_each(layout, cases, qk_clip=True, qk_clip_threshold=100.0)
    load(models, initial)
    for name, (options, _) in cases.items():
        optimizer = plain_optimizer(models[name], layout)
        clip = connect([models[name]], optimizer, options)
        clip._maxima.copy_(torch.linspace(-50, 400, clip.heads.count))
        clip.step(optimizer.optimizer.step)
    save(models, result)


def read(folders: list[str], cases: dict[str, Case]) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Of each model the weights in each folder."""
    models = build_each(Layout(), cases)
    found: dict[str, list[dict[str, torch.Tensor]]] = {name: [] for name in cases}
    for folder in folders:
        load(models, folder)
        for name, model in models.items():
            found[name].append({key: param.detach().clone() for key, param in model.named_parameters()})
    return found


REASSEMBLED = ["mha", "gqa-exact", "gqa-gate-exact", "gqa-bias", "mla"]


@pytest.fixture(scope="module")
def reassembled(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Of each model its weights before the clip, and after that on 1, 2 and 4 ranks."""
    cases = {name: EXACT[name] for name in REASSEMBLED}
    folder = tmp_path_factory.mktemp("clipped")
    folders = [str(folder / f"tp{ranks}") for ranks in (0, 1, 2, 4)]
    pool.run(save_initial, 1, folders[0], cases)
    for ranks, result in zip((1, 2, 4), folders[1:], strict=True):
        pool.run(clip_given, ranks, Layout(tp=ranks), folders[0], result, cases)
    return pool.run(read, 1, folders, cases)[0]


@pytest.mark.parametrize("name", REASSEMBLED)
def test_reassembled_weights_are_those_of_one_rank(
    reassembled: dict[str, list[dict[str, torch.Tensor]]], name: str
) -> None:
    """Bit for bit; at TP 4 there are more ranks than query groups."""
    before, one, *others = reassembled[name]
    assert any(not torch.equal(before[key], value) for key, value in one.items())
    for weights in others:
        assert all(torch.equal(weights[key], value) for key, value in one.items())


@pytest.mark.parametrize("name", NORMALISED)
def test_normalised_queries_and_keys(whole: dict[str, Clipped], name: str) -> None:
    """Weights cannot help; gains can, all heads together."""
    result = whole[name]
    changed = {key for key, (before, after, _) in result.weights.items() if not torch.equal(before, after)}
    if name.startswith("skip"):
        assert torch.equal(result.after, result.before) and not changed
        return
    torch.testing.assert_close(result.after, 0.6 * result.before, rtol=1e-12, atol=0)
    kinds = {key.rpartition("self_attention.")[2] for key in changed}
    biases = {"q_layernorm.bias", "k_layernorm.bias"} if "LayerNorm" in name else set()
    assert kinds == {"q_layernorm.weight", "k_layernorm.weight", *biases}
