"""Megatron-Core's modules with fused weights, built at any tensor-parallel size in one process.

Modules of large tensor-parallel groups are built on one rank of a group of which the other ranks are missing (torch's
fake backend): their constructors exchange nothing.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from megatron_muon.config import MuonConfig
from megatron_muon.routing.layout import MatrixLayout
from tests.megatron import harness
from tests.megatron.harness import Layout

HEADS, HEAD, HIDDEN, FFN = 8, 4, 32, 48
SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "kv_channels": HEAD,
    "num_query_groups": 2,
    "ffn_hidden_size": FFN,
}
Q_LORA, KV_LORA, NOPE, ROPE, VALUE = 16, 20, 6, 4, 5
MLA: dict[str, Any] = {
    "multi_latent_attention": True,
    "num_query_groups": HEADS,
    "q_lora_rank": Q_LORA,
    "kv_lora_rank": KV_LORA,
    "qk_head_dim": NOPE,
    "qk_pos_emb_head_dim": ROPE,
    "v_head_dim": VALUE,
    "qk_layernorm": True,
    "rope_type": "rope",
}
KEY_HEADS, VALUE_HEADS, KEY_HEAD, VALUE_HEAD = 8, 16, 4, 3
GDN: dict[str, Any] = {
    "experimental_attention_variant": "gated_delta_net",
    "linear_attention_freq": 2,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": KEY_HEAD,
    "linear_value_head_dim": VALUE_HEAD,
    "linear_num_key_heads": KEY_HEADS,
    "linear_num_value_heads": VALUE_HEADS,
    "attention_output_gate": True,
}
MOE_FFN, SHARED_FFN, EXPERTS = 24, 16, 4
MOE: dict[str, Any] = {
    "num_moe_experts": EXPERTS,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": MOE_FFN,
    "moe_shared_expert_intermediate_size": SHARED_FFN,
    "moe_shared_expert_gate": True,
    "moe_grouped_gemm": False,
}
MAMBA_HEADS, MAMBA_HEAD, STATE, GROUPS = 8, 4, 6, 8
MAMBA: dict[str, Any] = {
    "pattern": "M*",
    "mamba_num_heads": MAMBA_HEADS,
    "mamba_head_dim": MAMBA_HEAD,
    "mamba_state_dim": STATE,
    "mamba_num_groups": GROUPS,
}


class Weight(NamedTuple):
    """What annotation says about one weight of one rank."""

    shape: tuple[int, ...]
    layout: MatrixLayout | None
    reason: str | None
    """Why Muon does not update it; None if it does."""
    divided: int | None
    """The dimension that tensor parallelism divides."""
    expert: bool


def weights(
    builder: Callable[..., torch.nn.Module], model: dict[str, Any], choices: list[dict[str, Any]], sizes: Sequence[int]
) -> dict[int, list[dict[str, Weight]]]:
    """Runs on a rank: what annotation says about the weights of a module.

    Args:
        builder: makes it.
        model: changes to the config.
        choices: options of :class:`MuonConfig` to annotate it with, one after the other.
        sizes: tensor-parallel sizes to build it at.

    Returns:
        Size -> for each of the choices, name -> weight.
    """
    from megatron_muon.routing.annotate import annotate

    found = {}
    for tp in sizes:
        with fake_world(tp):
            module = builder(Layout(tp=tp), **{**SIZES, **model})
            found[tp] = []
            for options in choices:
                annotate(module, MuonConfig(**options).validate())
                found[tp].append(annotated(module, tp))
    return found


def annotated(module: torch.nn.Module, tp: int) -> dict[str, Weight]:
    from megatron_muon.routing.annotate import global_names
    from megatron_muon.routing.predicate import exclusion_reason

    return {
        name: Weight(
            tuple(param.shape),
            getattr(param, "matrix_layout", None),
            exclusion_reason(param),
            param.partition_dim if getattr(param, "tensor_model_parallel", False) and tp > 1 else None,
            getattr(param, "expert_tp", False),
        )
        for name, param in global_names(module)
    }


@contextlib.contextmanager
def fake_world(size: int) -> Iterator[None]:
    """Megatron's groups for ``size`` tensor-parallel ranks, of which only this one exists; then one real rank again."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    new_group = dist.new_group  # on the CPU, groups without a backend are gloo's, which would look for the other ranks

    def new_fake_group(**options: Any) -> Any:
        return new_group(**{**options, "backend": "fake", "pg_options": None})

    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        with mock.patch.object(dist, "new_group", new_fake_group):
            parallel_state.initialize_model_parallel(size, create_gloo_process_groups=False)
        model_parallel_cuda_manual_seed(1)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def gpt(layout: Layout, **model: Any) -> torch.nn.Module:
    return harness.build_model(layout, **model)[0]


def t5_decoder_layer(layout: Layout, **model: Any) -> torch.nn.Module:
    """Self-attention, cross-attention and MLP of one decoder layer."""
    from megatron.core.models.T5.t5_spec import decoder_model_with_local_spec
    from megatron.core.transformer.spec_utils import build_module

    config = harness.transformer_config(layout, **{**model, "num_query_groups": HEADS})
    return build_module(decoder_model_with_local_spec(), config=config, layer_number=1)


def fused_latent_attention(layout: Layout, **model: Any) -> torch.nn.Module:
    """MLA with one down projection, divided over tensor parallelism as the split ones of the local specification."""
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.multi_latent_attention import FusedMLASelfAttention
    from megatron.core.transformer.spec_utils import build_module

    config = harness.transformer_config(layout, **model)
    spec = copy.deepcopy(harness.layer_spec(config, local=True).submodules.self_attention)
    spec.module = FusedMLASelfAttention
    spec.submodules = dataclasses.replace(spec.submodules, linear_qkv_down_proj=ColumnParallelLinear)
    return build_module(spec, config=config, layer_number=1)


def multi_token_prediction(layout: Layout, **model: Any) -> torch.nn.Module:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

    config = harness.transformer_config(layout, mtp_num_layers=1, **model)
    spec = harness.layer_spec(config)
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=64,
        max_sequence_length=16,
        position_embedding_type="rope",
        mtp_block_spec=get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False),
    )


def bert(layout: Layout, **model: Any) -> torch.nn.Module:
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel

    config = harness.transformer_config(layout, normalization="LayerNorm", **model)
    return BertModel(config, 2, bert_layer_local_spec, vocab_size=64, max_sequence_length=16)


def vision_tower(layout: Layout, *, kind: str, **model: Any) -> torch.nn.Module:
    """A tower with a config of its own: 4 heads of 8 rows, no query groups."""
    from megatron.core.models.vision.clip_vit_model import CLIPViTModel
    from megatron.core.models.vision.radio import RADIOViTModel
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    own = {"num_attention_heads": 4, "num_query_groups": 4, "kv_channels": 8, "normalization": "LayerNorm"}
    config = harness.transformer_config(layout, **{**model, **own})
    spec, image = get_vit_layer_with_local_spec(), {"patch_dim": 4, "img_h": 8, "img_w": 8}
    if kind == "clip":
        return CLIPViTModel(config, spec, ln_pre_impl=WrappedTorchNorm, **image)
    return RADIOViTModel(config, spec, use_mask_token=True, max_img_h=16, max_img_w=16, **image)
