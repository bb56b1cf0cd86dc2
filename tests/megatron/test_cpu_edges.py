"""Flags and models at the edges of the CPU runtime: they train as they should, or the start says why not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.pool import RankPool

STEPS = 4
MLA = {
    "multi_latent_attention": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
    "rope_type": "rope",
}
GDN = {
    "experimental_attention_variant": "gated_delta_net",
    "linear_attention_freq": 2,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
LATENT = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_grouped_gemm": False,
    "moe_latent_size": 16,
}


def train(layout: Layout, weights: str | None, *runs: dict[str, Any]) -> list[list[float]]:
    """The losses of each run, of the modules that the CPU runtime chooses."""
    layout = dataclasses.replace(layout, local=True)
    return [harness.start(layout, weights=weights, **run).losses(STEPS) for run in runs]


def recomputed(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


def extension_in_cpp() -> Any:
    """What this process has compiled to share the memory of what is computed again."""
    from megatron.core.tensor_parallel import random

    return random._share_storage_ext and "compiled"


def errors_of_hidden_states(**changes: Any) -> tuple[float, float]:
    """How far the states after 16 layers are from those in float32: in bfloat16, and with residuals in float32."""
    precisions: list[dict[str, Any]] = [{}, {"bf16": True}, {"bf16": True, "fp32_residual_connection": True}]
    states = []
    for precision in precisions:
        run = harness.start(Layout(local=True), num_layers=16, **changes, **precision)
        model = harness.unwrap(run.chunks[0])
        for param in model.parameters():
            param.data = param.bfloat16().to(param.dtype)  # the same weights in each
        seen: list[torch.Tensor] = []
        model.decoder.final_layernorm.register_forward_pre_hook(
            lambda module, inputs, seen=seen: seen.append(inputs[0].detach())
        )
        run.losses(1)
        states.append(torch.cat(seen))
    assert [state.dtype for state in states] == [torch.float32, torch.bfloat16, torch.float32]
    exact, *others = (state.float() for state in states)
    low, mixed = (((other - exact).norm() / exact.norm()).item() for other in others)
    return low, mixed


@pytest.mark.parametrize(
    ("normalization", "centered"),
    [
        ("LayerNorm", True),
        ("RMSNorm", False),
        pytest.param("LayerNorm", False, marks=pytest.mark.slow),
        pytest.param("RMSNorm", True, marks=pytest.mark.slow),
    ],
)
def test_residuals_in_float32(pool: RankPool, normalization: str, centered: bool) -> None:
    changes = {"normalization": normalization, "layernorm_zero_centered_gamma": centered}
    low, mixed = pool.run(errors_of_hidden_states, 1, **changes)[0]
    assert mixed < 0.6 * low < 0.6 * 0.02  # 0.0043 and 0.0101 were measured


@pytest.mark.parametrize(
    "model,modules",
    [
        ({}, ("layernorm", "core_attn")),
        (MLA, ("mla_up_proj",)),
        pytest.param(GDN, ("gdn_norm_out",), marks=pytest.mark.slow),
    ],
    ids=["attention", "latent", "delta_net"],
)
def test_what_is_recomputed_is_the_same(pool: RankPool, model: dict[str, Any], modules: tuple[str, ...]) -> None:
    kept, again = pool.run(train, 1, Layout(), None, model, model | recomputed(*modules))[0]
    assert again == pytest.approx(kept, abs=1e-6)
    assert pool.run(extension_in_cpp, 1) == [None], "Megatron-Core's is compiled for tens of seconds"


def test_experts_with_a_latent_size(pool: RankPool, tmp_path: Path) -> None:
    folder = str(tmp_path / "initial")
    pool.run(harness.save_initial_weights, 1, folder, local=True, **LATENT)
    one = pool.run(train, 1, Layout(), folder, LATENT)[0]
    two = pool.run(train, 2, Layout(tp=2, sp=True), folder, LATENT)[0]
    assert two[0] == pytest.approx(one[0], abs=2e-5)
    assert one[0][-1] < one[0][0]


def vision_models() -> list[tuple[int, ...]]:
    """Shapes of what vision transformers and LLaVA give; each has trained backwards."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.multimodal.llava_model import LLaVAModel
    from megatron.core.models.vision.clip_vit_model import CLIPViTModel
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules

    Layout().initialize()
    image = {"img_h": 28, "img_w": 28, "patch_dim": 14}
    pictures = torch.randn(2, 3, 28, 28)
    layers = get_vit_layer_with_local_spec()
    clip = CLIPViTModel(harness.transformer_config(Layout()), layers, **image)
    siglip = CLIPViTModel(
        harness.transformer_config(Layout()),
        layers,
        model_subtype="siglip",
        add_class_token=False,
        class_token_len=0,
        **image,
    )
    language, vision, projection = (harness.transformer_config(Layout()) for _ in range(3))
    language.language_model_type, vision.vision_model_type = "any", "siglip"
    llava = LLaVAModel(
        language_transformer_config=language,
        language_transformer_layer_spec=get_gpt_layer_local_spec(),
        language_vocab_size=128,
        language_max_sequence_length=64,
        vision_transformer_config=vision,
        vision_transformer_layer_spec=layers,
        drop_vision_class_token=False,
        vision_projection_config=projection,
        vision_projection_layer_spec=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        **image,
    )
    tokens = torch.arange(16).repeat(2, 1)
    labels = tokens.clone()
    tokens[:, 3] = -200  # the image
    losses, _ = llava(pictures, tokens, torch.arange(16).repeat(2, 1), None, labels, torch.ones(2, 16))
    outputs = [clip(pictures), siglip(pictures), losses]
    for output in outputs:
        output.sum().backward()
    return [tuple(output.shape) for output in outputs]


def test_vision_models(pool: RankPool) -> None:
    shapes = pool.run(vision_models, 1)[0]
    assert shapes[:2] == [(2, 5, 32), (2, 4, 32)] and shapes[2][0] == 2
