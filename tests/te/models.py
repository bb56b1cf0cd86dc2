"""Megatron-Core models of TransformerEngine's modules, built on gloo ranks: their real weights, never run forward."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from tests.megatron import harness
from tests.megatron.harness import Layout
from tests.megatron.test_routing import GDN, MLA

MOE = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_shared_expert_intermediate_size": 16,
    "moe_shared_expert_gate": True,
}
DSA = {
    **MLA,
    "experimental_attention_variant": "dsa",
    "dsa_indexer_n_heads": 4,
    "dsa_indexer_head_dim": 8,
    "dsa_indexer_topk": 4,
}

GROUPED = {"moe_grouped_gemm": True}
SINGLE_GROUPED = {**GROUPED, "moe_single_grouped_weight": True, "use_transformer_engine_op_fuser": True}

MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "moe": {**MOE, **GROUPED},
    "moe_sequential": MOE,
    "moe_single_weight": {**MOE, **SINGLE_GROUPED},
    "moe_latent": {**MOE, **GROUPED, "moe_latent_size": 16},
    "mla": MLA,
    "mla_without_q_lora": {**MLA, "q_lora_rank": None},
    "mla_fused_down": {**MLA, "mla_down_proj_fusion": True},
    "hybrid": GDN,
    "hybrid_moe": {**GDN, **MOE, **GROUPED},
    "mtp": {"mtp_num_layers": 1},
    "dsa": DSA,
}
"""Changes to the configuration of :func:`tests.megatron.harness.transformer_config`."""


class Weight(NamedTuple):
    """A trainable weight of one rank, with the attributes by which Megatron-Core tells how it is cut."""

    name: str
    shape: tuple[int, ...]
    tensor_model_parallel: bool | None
    partition_dim: int | None
    partition_stride: int | None
    allreduce: bool | None
    dim: int
    owner: str


def build_model(layout: Layout, model: str) -> Any:
    """A GPTModel of :data:`MODELS` from TransformerEngine's layer specification, for the groups that are there."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

    config = transformer_config(layout, MODELS[model])
    spec = layer_spec(config)
    with _kernels_of_grouped_experts():
        return GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=harness.COUNTING.vocabulary,
            max_sequence_length=harness.COUNTING.sequence,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
            mtp_block_spec=get_gpt_mtp_block_spec(config, spec, True) if config.mtp_num_layers else None,
        )


def transformer_config(layout: Layout, changes: dict[str, Any]) -> Any:
    """The configuration of a model of two layers.

    The CPU runtime refuses grouped experts and sparse attention in a configuration, as it could not run them; here they
    are only built.
    """
    late = {name: value for name, value in changes.items() if name in SINGLE_GROUPED or value == "dsa"}
    early = {name: value for name, value in changes.items() if name not in late}
    config = harness.transformer_config(layout, transformer_impl="transformer_engine", num_layers=2, **early)
    for name, value in late.items():
        setattr(config, name, value)
    return config


@contextlib.contextmanager
def _kernels_of_grouped_experts() -> Iterator[None]:
    """The variables without which a model with all experts in one weight is not built; not for TE's import."""
    names = ("NVTE_GROUPED_LINEAR_SINGLE_PARAM", "NVTE_CUTEDSL_FUSED_GROUPED_MLP")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def layer_spec(config: Any) -> Any:
    """Megatron-Core's own specification of TransformerEngine layers, chosen as its pretraining scripts do."""
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
    from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
        get_transformer_layer_with_experimental_attention_variant_spec,
    )
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    if config.experimental_attention_variant is not None:
        # The backend is named because the CPU runtime otherwise takes Megatron-Core's own modules for hybrids.
        layers = get_transformer_layer_with_experimental_attention_variant_spec(config, backend=TESpecProvider())
        return TransformerBlockSubmodules(layer_specs=layers, layer_norm=TENorm)
    if config.num_moe_experts:
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, normalization=config.normalization)
    return get_gpt_layer_with_transformer_engine_spec(
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        mla_down_proj_fusion=getattr(config, "mla_down_proj_fusion", False),
    )


def weights_of(model: torch.nn.Module) -> list[Weight]:
    """Every trainable parameter of ``model``."""
    owners = {
        id(param): type(module).__name__ for module in model.modules() for param in module.parameters(recurse=False)
    }
    return [
        Weight(
            name,
            tuple(param.shape),
            getattr(param, "tensor_model_parallel", None),
            getattr(param, "partition_dim", None),
            getattr(param, "partition_stride", None),
            getattr(param, "allreduce", None),
            param.dim(),
            owners[id(param)],
        )
        for name, param in model.named_parameters()
        if param.requires_grad
    ]


def weights(layout: Layout, model: str) -> list[Weight]:
    """Build ``model`` on this rank; its weights."""
    layout.initialize()
    return weights_of(build_model(layout, model))
