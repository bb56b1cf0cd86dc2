"""Configurations and layer specifications of the harness's models, without TransformerEngine."""

from __future__ import annotations

import copy
import dataclasses
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


def layer_spec(config: Any, vp_stage: int | None = None) -> Any:
    """The local (no TransformerEngine) layer spec that fits ``config``."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec

    if config.num_moe_experts:
        return get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
        )
    spec = get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm,
        qk_l2_norm=config.qk_l2_norm,
        multi_latent_attention=config.multi_latent_attention,
        normalization=config.normalization,
    )
    if getattr(config, "mla_down_proj_fusion", False):
        fuse_down_projections(spec.submodules.self_attention)
    return spec if config.experimental_attention_variant is None else hybrid_spec(config, spec, vp_stage)


def fuse_down_projections(attention: Any) -> None:
    """One down projection for queries, keys and values; Megatron's own function wants TransformerEngine."""
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.multi_latent_attention import FusedMLASelfAttention

    attention.module = FusedMLASelfAttention
    attention.submodules = dataclasses.replace(attention.submodules, linear_qkv_down_proj=ColumnParallelLinear)


def hybrid_spec(config: Any, attention: Any, vp_stage: int | None) -> Any:
    """GatedDeltaNet layers with ``attention`` layers between them; Megatron's own function wants TransformerEngine."""
    from megatron.core.models.gpt.experimental_attention_variant_module_specs import get_linear_attention_pattern
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    norm = attention.submodules.input_layernorm
    linear = copy.deepcopy(attention)
    linear.submodules.self_attention = ModuleSpec(
        module=GatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(in_proj=ColumnParallelLinear, out_norm=norm, out_proj=RowParallelLinear),
    )
    offset = get_transformer_layer_offset(config, vp_stage=vp_stage)
    mine = range(offset, offset + get_num_layers_to_build(config, vp_stage=vp_stage))
    pattern = get_linear_attention_pattern(config)
    specs = [linear if pattern[layer] else attention for layer in mine]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)


def model_class(config: Any, pattern: str | None, vp_stage: int | None) -> Callable[..., Any]:
    """The class of the model with the arguments that make its layers."""
    from megatron.core.models.gpt import GPTModel

    if pattern is None:
        return functools.partial(GPTModel, transformer_layer_spec=layer_spec(config, vp_stage))
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    return functools.partial(HybridModel, hybrid_stack_spec=hybrid_stack_spec, hybrid_layer_pattern=pattern)
