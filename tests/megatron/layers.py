"""Configurations and layer specifications of the harness's models, which need no TransformerEngine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tests.megatron.harness import Layout


def transformer_config(layout: Layout, *, bf16: bool = False, **changes: Any) -> Any:
    """Four layers of RMSNorm, grouped-query attention and SwiGLU."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    dtype = torch.bfloat16 if bf16 else torch.float32
    values: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "ffn_hidden_size": 48,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": 0.1,
        "bf16": bf16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "transformer_impl": "local",
        "gradient_accumulation_fusion": False,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp or layout.tp,
        "sequence_parallel": layout.sp,
        # With two stages, batched exchanges of the interleaved schedule mix up forward and backward messages:
        # megatron.training refuses them too.
        "overlap_p2p_comm": layout.vpp is not None,
        "batch_p2p_comm": layout.vpp is None,
    }
    values.update(changes)
    cls = MLATransformerConfig if values.get("multi_latent_attention") else TransformerConfig
    return cls(**values)


def layer_spec(config: Any, vp_stage: int | None = None, local: bool = False) -> Any:
    """The layer spec that fits ``config``: weights as TransformerEngine's modules have them, or ``local`` ones."""
    if local:
        return local_spec(config, vp_stage)
    from megatron.core.models.gpt import gpt_layer_specs

    from tests.megatron.fused_layers import Provider, in_place_of_transformer_engine

    with in_place_of_transformer_engine():
        if config.experimental_attention_variant is not None:
            return hybrid_spec(config, vp_stage, Provider())
        if config.num_moe_experts:
            return gpt_layer_specs.get_gpt_decoder_block_spec(
                config, use_transformer_engine=True, normalization=config.normalization, vp_stage=vp_stage
            )
        return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=config.qk_layernorm,
            qk_l2_norm=config.qk_l2_norm,
            multi_latent_attention=config.multi_latent_attention,
            mla_down_proj_fusion=getattr(config, "mla_down_proj_fusion", False),
        )


def local_spec(config: Any, vp_stage: int | None) -> Any:
    """Megatron-Core's own (no TransformerEngine) layer spec: norms are modules of their own."""
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec

    if config.experimental_attention_variant is not None:
        return hybrid_spec(config, vp_stage, LocalSpecProvider())
    if config.num_moe_experts:
        return get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
        )
    return get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm,
        qk_l2_norm=config.qk_l2_norm,
        multi_latent_attention=config.multi_latent_attention,
        normalization=config.normalization,
    )


def hybrid_spec(config: Any, vp_stage: int | None, backend: Any) -> Any:
    """GatedDeltaNet layers with softmax attention between them."""
    from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
        get_transformer_layer_with_experimental_attention_variant_spec,
    )
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    layers = get_transformer_layer_with_experimental_attention_variant_spec(config, backend)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    mine = layers[first : first + get_num_layers_to_build(config, vp_stage=vp_stage)]
    return TransformerBlockSubmodules(layer_specs=mine, layer_norm=backend.layer_norm(rms_norm=True))


def model_class(config: Any, pattern: str | None, vp_stage: int | None, local: bool = False) -> Callable[..., Any]:
    """The class of the model with the arguments that make its layers."""
    from megatron.core.models.gpt import GPTModel

    from tests.megatron import fused_layers

    if pattern is None:
        spec = layer_spec(config, vp_stage, local)
        build = functools.partial(GPTModel, transformer_layer_spec=spec)
    else:
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
        from megatron.core.models.hybrid.hybrid_model import HybridModel

        spec = hybrid_stack_spec if local else fused_layers.hybrid_stack_spec(hybrid_stack_spec)
        build = functools.partial(HybridModel, hybrid_stack_spec=spec, hybrid_layer_pattern=pattern)
    return build if local else fused_layers.in_place_of_transformer_engine()(build)
