"""Layers with the weights of TransformerEngine's, in its order, of plain torch.

A norm before a linear layer is a part of that layer: ``linear_qkv.layer_norm_weight`` comes right before
``linear_qkv.weight``, and there is no ``input_layernorm``. The specifications are Megatron-Core's own for
TransformerEngine, with these layers in the place of its ones. Of MLA, the down projections stay Megatron-Core's, which
tensor parallelism divides.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.torch_norm import WrappedTorchNorm


class NormAndLinear(ColumnParallelLinear):
    """``TELayerNormColumnParallelLinear``: ``layer_norm_weight`` (and ``_bias``) before ``weight`` and ``bias``."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        norm = WrappedTorchNorm(config, input_size, config.layernorm_epsilon)
        object.__setattr__(self, "norm", norm)  # no submodule: its weights are this module's
        last = list(self._parameters.items())
        self._parameters.clear()
        for name, param in norm.named_parameters():
            self.register_parameter(f"layer_norm_{name}", param)
        self._parameters.update(last)

    def forward(self, input_: torch.Tensor, *args: Any, **options: Any) -> Any:
        return super().forward(self.norm(input_), *args, **options)


class Provider(BackendSpecProvider):
    """Takes the place of ``TESpecProvider``."""

    def linear(self) -> type:
        return ColumnParallelLinear

    def column_parallel_linear(self) -> type:
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return RowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return NormAndLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> Any:
        return WrappedTorchNorm

    def core_attention(self) -> type:
        return DotProductAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        return LocalSpecProvider().grouped_mlp_modules(moe_use_grouped_gemm)

    def activation_func(self) -> None:
        return None


@contextlib.contextmanager
def in_place_of_transformer_engine() -> Iterator[None]:
    """Megatron-Core's specifications for TransformerEngine, and models that are built by them, have these layers."""
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.transformer import mla_qk_norm_config, multi_latent_attention

    fused = {"TELayerNormColumnParallelLinear": NormAndLinear}
    with (
        mock.patch.multiple(gpt_layer_specs, TESpecProvider=Provider, TENorm=WrappedTorchNorm),
        mock.patch.multiple(multi_latent_attention, **fused),
        mock.patch.multiple(hybrid_block, **fused),
        mock.patch.object(mla_qk_norm_config, "get_backend", lambda kind: Provider()),
    ):
        yield


def hybrid_stack_spec(local: Any) -> Any:
    """``hybrid_stack_spec`` of TransformerEngine from that of the CPU runtime, where norms are modules of their own."""
    spec = copy.deepcopy(local)
    layers = spec.submodules
    for layer, norm in (
        (layers.mamba_layer, "norm"),
        (layers.attention_layer, "input_layernorm"),
        (layers.gdn_layer, "input_layernorm"),
        (layers.mlp_layer, "pre_mlp_layernorm"),
    ):
        setattr(layer.submodules, norm, IdentityOp)
        layer.submodules.sharded_state_dict_keys_map = {}
    layers.mamba_layer.submodules.mixer.submodules.in_proj = NormAndLinear
    layers.attention_layer.submodules.self_attention.submodules.linear_qkv = NormAndLinear
    layers.gdn_layer.submodules.self_attention.submodules.in_proj = NormAndLinear
    layers.mlp_layer.submodules.mlp.keywords["submodules"].linear_fc1 = NormAndLinear
    return spec
