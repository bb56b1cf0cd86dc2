"""Mamba's mixer and HybridModel on the CPU: the kernels against slow float64 references, the models across layouts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_muon.cpu.mamba import (
    GatedRMSNorm,
    causal_conv1d_fn,
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
)
from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.pool import RankPool
from tests.slow import with_slow

BATCH, HEADS, HEAD_DIM, STATE = 2, 4, 3, 5
EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64 on both sides; sums are added up in another order


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def slow_norm(
    x: torch.Tensor, z: torch.Tensor | None, weight: torch.Tensor, eps: float, group: int, first: bool
) -> torch.Tensor:
    """One row and one group at a time."""
    out = torch.empty_like(x)
    for row in range(x.size(0)):
        for start in range(0, x.size(1), group):
            part = slice(start, start + group)
            values = x[row, part]
            if z is not None and not first:
                values = values * silu(z[row, part])
            values = values / ((values**2).sum() / group + eps) ** 0.5 * weight[part]
            out[row, part] = values * silu(z[row, part]) if z is not None and first else values
    return out


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize("group_size", [None, 4])
def test_norm(gated: bool, norm_before_gate: bool, group_size: int | None) -> None:
    norm = GatedRMSNorm(12, 1e-2, group_size, norm_before_gate, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    x, z = random(6, 12), random(6, 12, seed=1) if gated else None
    expected = slow_norm(x, z, norm.weight.detach(), 1e-2, group_size or 12, norm_before_gate)
    torch.testing.assert_close(norm(x, z).detach(), expected, **EXACT)


def test_norm_refuses_uneven_groups() -> None:
    with pytest.raises(ValueError, match="hidden_size 12 must be a multiple of group_size 5"):
        GatedRMSNorm(12, group_size=5)


def slow_convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``[batch, channels, seq]``: the last weight belongs to the token itself."""
    out = torch.zeros_like(x)
    width = weight.size(1)
    for token in range(x.size(2)):
        for back in range(min(width, token + 1)):
            out[:, :, token] += weight[:, width - 1 - back] * x[:, :, token - back]
    return out + bias[:, None]


@pytest.mark.parametrize("length", [2, 9])
def test_convolution(length: int) -> None:
    x, weight, bias = random(BATCH, 6, length), random(6, 4, seed=1), random(6, seed=2)
    expected = slow_convolution(x, weight, bias)
    torch.testing.assert_close(causal_conv1d_fn(x, weight, bias), expected, **EXACT)
    torch.testing.assert_close(causal_conv1d_fn(x, weight, bias, activation="silu"), silu(expected), **EXACT)


def slow_scan(
    x: torch.Tensor,
    step: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence, one sample, head and token at a time; ``step`` is final."""
    batch, length, heads, _ = x.shape
    per_group = heads // B.size(2)
    outputs, finals = [], []
    for sample in range(batch):
        for head in range(heads):
            group = head // per_group
            h = torch.zeros(x.size(3), B.size(3), dtype=x.dtype) if state is None else state[sample, head]
            for token in range(length):
                dt = step[sample, token, head]
                h = torch.exp(dt * A[head]) * h + dt * torch.outer(x[sample, token, head], B[sample, token, group])
                outputs.append(h @ C[sample, token, group])
            finals.append(h)
    out = torch.stack(outputs).unflatten(0, (batch, heads, length)).transpose(1, 2)
    return out, torch.stack(finals).unflatten(0, (batch, heads))


def scan_inputs(length: int, groups: int) -> dict[str, torch.Tensor]:
    inputs = {
        "x": random(BATCH, length, HEADS, HEAD_DIM, seed=1),
        "dt": random(BATCH, length, HEADS, seed=2),
        "A": -random(HEADS, seed=3).exp(),
        "B": random(BATCH, length, groups, STATE, seed=4),
        "C": random(BATCH, length, groups, STATE, seed=5),
        "D": random(HEADS, seed=6),
        "z": random(BATCH, length, HEADS, HEAD_DIM, seed=7),
        "dt_bias": random(HEADS, seed=8),
        "initial_states": random(BATCH, HEADS, HEAD_DIM, STATE, seed=9),
    }
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


@pytest.mark.parametrize("length", [3, 8, 11], ids=["less_than_a_chunk", "whole_chunks", "part_of_a_chunk"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_scan_and_its_gradients(length: int, groups: int) -> None:
    mine, reference = scan_inputs(length, groups), scan_inputs(length, groups)
    out, final = mamba_chunk_scan_combined(**mine, chunk_size=4, dt_softplus=True, return_final_states=True)
    step = torch.log1p(torch.exp(reference["dt"] + reference["dt_bias"]))
    scanned, expected_final = slow_scan(
        reference["x"], step, *(reference[name] for name in ("A", "B", "C", "initial_states"))
    )
    expected = (scanned + reference["x"] * reference["D"][:, None]) * silu(reference["z"])
    torch.testing.assert_close(out, expected, **EXACT)
    torch.testing.assert_close(final, expected_final, **EXACT)
    for result, state in ((out, final), (expected, expected_final)):
        ((result * random(*result.shape, seed=10)).sum() + (state * random(*state.shape, seed=11)).sum()).backward()
    for name in mine:
        torch.testing.assert_close(
            mine[name].grad, reference[name].grad, **EXACT, msg=lambda text, n=name: f"{n} {text}"
        )


def test_scan_limits_steps_and_takes_a_skip_of_each_channel() -> None:
    inputs = {name: scan_inputs(9, 2)[name].detach() for name in ("x", "dt", "A", "B", "C")}
    skip = random(HEADS, HEAD_DIM, seed=6)
    out = mamba_chunk_scan_combined(**inputs, chunk_size=4, D=skip, dt_limit=(0.1, 0.5))
    step = inputs["dt"].clamp(0.1, 0.5)
    expected, _ = slow_scan(inputs["x"], step, inputs["A"], inputs["B"], inputs["C"])
    torch.testing.assert_close(out, expected + inputs["x"] * skip, **EXACT)
    assert (step == 0.1).any() and (step == 0.5).any()


def test_strong_decay_neither_overflows_nor_spoils_gradients() -> None:
    """Over a chunk the state decays by exp(-3200), whose inverse no float holds."""
    x = random(1, 16, 1, 1).float().requires_grad_()
    dt = torch.full((1, 16, 1), 200.0, requires_grad=True)
    ones = torch.ones(1, 16, 1, 1)
    out = mamba_chunk_scan_combined(x, dt, torch.tensor([-1.0]), ones, ones, chunk_size=16)
    torch.testing.assert_close(out, 200 * x.detach())
    out.sum().backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(dt.grad).all()


def test_bfloat16_is_computed_in_float32() -> None:
    inputs = {name: scan_inputs(32, 2)[name].detach() for name in ("x", "dt", "A", "B", "C", "z")}
    low = {name: tensor if name == "A" else tensor.bfloat16() for name, tensor in inputs.items()}
    low["A"] = low["A"].float()
    options: dict[str, Any] = {"chunk_size": 8, "dt_softplus": True}
    expected = mamba_chunk_scan_combined(**{name: tensor.double() for name, tensor in low.items()}, **options)
    out = mamba_chunk_scan_combined(**low, **options, state_dtype=torch.float32)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-6)  # rounding of the result alone
    rounded = mamba_chunk_scan_combined(**low, **options)
    error = (rounded.double() - expected).abs().max() / expected.abs().max()
    assert 2**-12 < error < 2**-6, "by default the states between chunks are rounded too"


@pytest.mark.parametrize("skip_of_each_channel", [True, False])
def test_split_function(skip_of_each_channel: bool) -> None:
    """Every part by its definition: gate, inputs, B, C and steps side by side; convolution; scan; gate."""
    length, groups = 11, 2
    channels, group_channels = HEADS * HEAD_DIM, groups * STATE
    joint = random(BATCH, length, 2 * channels + 2 * group_channels + HEADS)
    weight, bias = random(channels + 2 * group_channels, 4, seed=1), random(channels + 2 * group_channels, seed=2)
    dt_bias, A = random(HEADS, seed=3), -random(HEADS, seed=4).exp()
    D = random(HEADS, HEAD_DIM, seed=5) if skip_of_each_channel else random(HEADS, seed=5)
    out = mamba_split_conv1d_scan_combined(
        joint,
        weight,
        bias,
        dt_bias,
        A,
        D=D,
        chunk_size=4,
        activation="silu",
        headdim=None if skip_of_each_channel else HEAD_DIM,
        ngroups=groups,
        norm_before_gate=False,
    )
    z, rest = joint[..., :channels], joint[..., channels:-HEADS]
    rest = silu(slow_convolution(rest.transpose(1, 2), weight, bias)).transpose(1, 2)
    x = rest[..., :channels].reshape(BATCH, length, HEADS, HEAD_DIM)
    B = rest[..., channels : channels + group_channels].reshape(BATCH, length, groups, STATE)
    C = rest[..., channels + group_channels :].reshape(BATCH, length, groups, STATE)
    expected, _ = slow_scan(x, torch.log1p(torch.exp(joint[..., -HEADS:] + dt_bias)), A, B, C)
    expected = expected + x * (D if skip_of_each_channel else D[:, None])
    torch.testing.assert_close(out, expected.reshape(BATCH, length, channels) * silu(z), **EXACT)


def test_packed_sequences_are_refused() -> None:
    inputs = {name: scan_inputs(4, 1)[name] for name in ("x", "dt", "A", "B", "C")}
    with pytest.raises(NotImplementedError, match="train without sequence packing"):
        mamba_chunk_scan_combined(**inputs, chunk_size=4, seq_idx=torch.zeros(BATCH, 4))


MAMBA: dict[str, Any] = {
    "pattern": "M*M-",
    "num_layers": 4,
    "is_hybrid_model": True,
    "mamba_state_dim": 8,
    "mamba_head_dim": 8,
    "mamba_num_heads": 8,
    "mamba_num_groups": 2,
}


def outputs_of_both_paths() -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """What a real mixer makes of one input on its fused and on its separate path, and the weights without gradient."""
    Layout().initialize()
    model = harness.build_model(Layout(local=True), **MAMBA)[0]
    mixer = model.decoder.layers[0].mixer
    hidden = torch.randn(150, 2, 32)  # more than a chunk of 128 tokens
    fused, _ = mixer(hidden)
    fused.sum().backward()
    missing = [name for name, weight in mixer.named_parameters() if weight.grad is None or not weight.grad.any()]
    mixer.use_mem_eff_path = False
    separate, _ = mixer(hidden)
    return fused.detach(), separate.detach(), missing


def test_the_real_mixer(pool: RankPool) -> None:
    fused, separate, missing = pool.run(outputs_of_both_paths, 1)[0]
    assert fused.shape == (150, 2, 32) and fused.abs().max() > 0
    torch.testing.assert_close(fused, separate)
    assert not missing


def train(layout: Layout, weights: str | None, steps: int, **options: Any) -> list[float]:
    """Of the modules that the CPU runtime chooses."""
    layout = dataclasses.replace(layout, local=True)
    return harness.start(layout, weights=weights, **options).losses(steps)


# float32, and layouts add the same numbers in another order, which changes losses of about 4 by up to 2e-7 (measured,
# over all layouts, models and steps); ten times that is allowed.
TOLERANCE = 2e-6
STEPS = 8
LAYOUTS = {
    "tp2": (2, Layout(tp=2), {}),
    "tp2_sp": (2, Layout(tp=2, sp=True), {}),
    "pp2": (2, Layout(pp=2), {"pattern": "M*|M-"}),
    "dp2": (2, Layout(), {}),
}


@pytest.fixture(scope="module")
def weights(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("mamba") / "initial")
    pool.run(harness.save_initial_weights, 1, folder, local=True, **MAMBA)
    return folder


@pytest.fixture(scope="module")
def reference(pool: RankPool, weights: str) -> list[float]:
    return pool.run(train, 1, Layout(), weights, STEPS, **MAMBA)[0]


@pytest.mark.parametrize("name", with_slow(LAYOUTS, "tp2", "dp2"))
def test_losses_do_not_depend_on_the_layout(pool: RankPool, weights: str, reference: list[float], name: str) -> None:
    world_size, layout, changes = LAYOUTS[name]
    losses = pool.run(train, world_size, layout, weights, STEPS, **{**MAMBA, **changes})[0]
    assert losses == pytest.approx(reference, abs=TOLERANCE)
    assert reference[-1] < 0.8 * reference[0], "the model must have learnt something for this to mean anything"


def test_bfloat16_stays_close(pool: RankPool, reference: list[float]) -> None:
    losses = pool.run(train, 1, Layout(), None, STEPS, bf16=True, **MAMBA)[0]  # the same seed, so the same weights
    assert losses == pytest.approx(reference, rel=2**-8)  # bfloat16 has eight bits


def test_states_in_bfloat16(pool: RankPool, weights: str, reference: list[float]) -> None:
    """``mamba_training_ssm_states_dtype`` has an effect, and a small one."""
    # A chunk has 128 tokens and no state crosses chunks in shorter sequences.
    longer = {"data": harness.Data(sequence=160, global_batch=1), **MAMBA}
    exact, rounded = (
        pool.run(train, 1, Layout(), weights, 2, **longer, mamba_training_ssm_states_dtype=dtype)[0]
        for dtype in (None, torch.bfloat16)
    )
    assert exact != rounded
    assert rounded == pytest.approx(exact, abs=0.01)


OTHER_LAYERS: dict[str, dict[str, Any]] = {
    "gated_delta_net_and_experts": {
        "pattern": "MG*E",
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 24,
        "moe_grouped_gemm": False,
    },
    "latent_attention": {
        "pattern": "M+M-",
        "multi_latent_attention": True,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_head_dim": 8,
        "qk_pos_emb_head_dim": 4,
        "v_head_dim": 8,
        "num_query_groups": 4,
        "rope_type": "rope",
    },
    "multi_token_prediction": {"pattern": "M*-/*-/*-", "mtp_num_layers": 2},
}


@pytest.mark.parametrize("name", with_slow(OTHER_LAYERS, "gated_delta_net_and_experts", "latent_attention"))
def test_other_layers_of_hybrid_models(pool: RankPool, tmp_path: Path, name: str) -> None:
    model = {**MAMBA, **OTHER_LAYERS[name]}
    folder = str(tmp_path / "initial")
    pool.run(harness.save_initial_weights, 1, folder, local=True, **model)
    expected = pool.run(train, 1, Layout(), folder, STEPS, **model)[0]
    losses = pool.run(train, 2, Layout(tp=2, sp=True), folder, STEPS, **model)[0]
    assert losses == pytest.approx(expected, abs=TOLERANCE)
    assert expected[-1] < expected[0]


def keys_and_refusal() -> tuple[list[str], str]:
    Layout().initialize()
    model = harness.build_model(Layout(local=True), **MAMBA)[0]
    keys = sorted({value.key for value in model.sharded_state_dict().values() if hasattr(value, "key")})
    try:
        harness.build_model(Layout(local=True), **{**MAMBA, "pattern": "MDM-"})
    except NotImplementedError as error:
        return keys, str(error)
    return keys, ""


def test_checkpoint_names_and_sparse_attention(pool: RankPool) -> None:
    """Norms have the names of TransformerEngine's fused layers; what cannot be built says so."""
    keys, message = pool.run(keys_and_refusal, 1)[0]
    assert {
        "decoder.layers.0.mixer.in_proj.layer_norm_weight",
        "decoder.layers.0.mixer.norm.weight",
        "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.3.mlp.linear_fc1.layer_norm_weight",
        "decoder.final_norm.weight",
    } <= set(keys)
    assert "D in --hybrid-layer-pattern" in message
