"""The layers of ``HybridModel``, whose pattern mixes Mamba, attention, MLP and others, without TransformerEngine.

Megatron-Core's specification of these layers, ``hybrid_stack_spec``, exists for TransformerEngine only. Here it is made
of Megatron-Core's own modules. Norms are then modules of their own; in checkpoints they have the names that
TransformerEngine's fused layers give them, as the local specification of GPT does it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_muon._patching import Patch
from megatron_muon.cpu.norms import local_norm


class _SparseAttention:
    """Takes the place of a layer that cannot be built."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "DeepSeek's sparse attention (D in --hybrid-layer-pattern) needs TransformerEngine and a GPU; on the CPU "
            "use * (softmax attention) or + (multi-latent attention)"
        )


def _local_stack_spec(original: Any) -> Any:
    """``hybrid_stack_spec`` of local modules."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer

    gpt = get_gpt_layer_local_submodules(normalization="RMSNorm")  # any norm: WrappedTorchNorm asks the configuration
    latent = get_gpt_layer_local_submodules(normalization="RMSNorm", multi_latent_attention=True)
    delta = GatedDeltaNetSubmodules(in_proj=ColumnParallelLinear, out_norm=WrappedTorchNorm, out_proj=RowParallelLinear)
    gated = ModuleSpec(module=GatedDeltaNet, submodules=delta)
    experts = get_moe_module_spec(use_te=False, num_experts=8)  # any number: the configuration has the right one
    submodules = type(original.submodules)(
        mamba_layer=_mamba_layer(),
        attention_layer=_layer(TransformerLayer, "self_attention", gpt.self_attention, "linear_qkv"),
        gdn_layer=_layer(TransformerLayer, "self_attention", gated, "in_proj"),
        mla_layer=_layer(TransformerLayer, "self_attention", latent.self_attention),
        dsa_layer=ModuleSpec(module=_SparseAttention),
        mlp_layer=_layer(MLPLayer, "mlp", gpt.mlp, "linear_fc1"),
        moe_layer=_layer(MoETransformerLayer, "mlp", experts),
        mtp_block_spec=_mtp_block(original.submodules.mtp_block_spec),
    )
    return ModuleSpec(module=original.module, submodules=submodules)


def _mamba_layer() -> Any:
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    projections = MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    submodules = MambaLayerSubmodules(
        norm=WrappedTorchNorm,
        mixer=ModuleSpec(module=MambaMixer, submodules=projections),
        mamba_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
    )
    return ModuleSpec(module=MambaLayer, submodules=submodules)


def _layer(module: type, part: str, content: Any, norm_in: str = "") -> Any:
    """A layer of one part alone; ``norm_in`` is the linear layer that has its norm in TransformerEngine's form."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

    norm, add = {"self_attention": ("input_layernorm", "self_attn_bda"), "mlp": ("pre_mlp_layernorm", "mlp_bda")}[part]
    names = {f"{norm}.": f"{part}.{norm_in}.layer_norm_"} if norm_in else {}
    parts = {norm: WrappedTorchNorm, part: content, add: get_bias_dropout_add, "sharded_state_dict_keys_map": names}
    return ModuleSpec(module=module, submodules=TransformerLayerSubmodules(**parts))


def _mtp_block(original: Any) -> Any:
    """Multi-token prediction; the layers inside are those above, by their part of the pattern."""
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    (layer,) = original.submodules.layer_specs
    local = {"enorm": WrappedTorchNorm, "hnorm": WrappedTorchNorm, "layer_norm": WrappedTorchNorm}
    submodules = replace(layer.submodules, eh_proj=ColumnParallelLinear, **local)
    return replace(original, submodules=type(original.submodules)(layer_specs=[replace(layer, submodules=submodules)]))


PATCHES: list[Patch] = [
    Patch(
        "megatron.core.models.hybrid.hybrid_layer_specs:hybrid_stack_spec",
        _local_stack_spec,
        "the layer specification of HybridModel exists for TransformerEngine only",
    ),
    # No copies: others hold this class to build TransformerEngine's layers with it.
    Patch(
        "megatron.core.models.hybrid.hybrid_block:TENorm",
        local_norm,
        "the final norm of HybridModel is TransformerEngine's, whatever the specification says",
        copies_in=(),
    ),
]
