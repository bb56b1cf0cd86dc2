"""Multi-latent attention of the local specification under tensor parallelism.

The local specification splits the key/value down projection over tensor-parallel ranks and gathers its output. The
rotary part of the keys then goes into each rank's own heads, so each rank has a part of its gradient; but the backward
pass of the gather takes a slice of that part and never adds up the parts. (TransformerEngine's specification, which
GPUs use, keeps the projection whole and adds them up under sequence parallelism.) Here the output is gathered in a way
whose backward pass adds up the parts.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from megatron_muon._patching import Original, Patches

_REASON = "with the local specification the gradient of the rotary keys is not summed over tensor-parallel ranks"
_ATTENTION = "megatron.core.transformer.multi_latent_attention"
PATCHES = Patches()


def _whole_output(attention: Any, part: torch.Tensor) -> torch.Tensor:
    """``[s, b, width / tp]`` becomes what a whole projection would give, ``[s or s / tp, b, width]``."""
    mappings = importlib.import_module("megatron.core.tensor_parallel.mappings")
    config, group = attention.config, attention.tp_group
    whole = mappings.gather_from_tensor_model_parallel_region(part, group=group)
    if config.sequence_parallel:
        # Upstream gathers the rotary part along the sequence next, and the backward pass of that adds up.
        return mappings.scatter_to_sequence_parallel_region(whole, group=group)
    latent, rotary = whole.split([config.kv_lora_rank, whole.size(-1) - config.kv_lora_rank], dim=-1)
    rotary = mappings.copy_to_tensor_model_parallel_region(rotary, group=group)
    return torch.cat([latent, rotary], dim=-1)


def _is_divided(attention: Any, projection: Any) -> bool:
    linear = importlib.import_module("megatron.core.tensor_parallel").ColumnParallelLinear
    return isinstance(projection, linear) and attention.tp_group.size() > 1


@PATCHES.around(f"{_ATTENTION}:MLASelfAttention.__init__", _REASON)
def _wrap_init(original: Original, self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    projection: Any = getattr(self, "linear_kv_down_proj", None)
    if _is_divided(self, projection):
        projection.register_forward_hook(lambda module, inputs, outputs: (_whole_output(self, outputs[0]), outputs[1]))


@PATCHES.around(f"{_ATTENTION}:FusedMLASelfAttention._qkv_down_projection", _REASON)
def _wrap_fused_projection(
    original: Original, self: Any, hidden_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    queries, keys = original(self, hidden_states)
    return queries, _whole_output(self, keys) if _is_divided(self, self.linear_qkv_down_proj) else keys
