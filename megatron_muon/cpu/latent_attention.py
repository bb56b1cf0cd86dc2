"""Multi-latent attention of the local specification under tensor parallelism.

The local specification splits the key/value down projection over tensor-parallel ranks and gathers its output. The
rotary part of the keys then goes into each rank's own heads, so each rank has a part of its gradient; but the backward
pass of the gather takes a slice of that part and never adds up the parts. (TransformerEngine's specification, which
GPUs use, keeps the projection whole and adds them up under sequence parallelism.) Here the output is gathered in a way
whose backward pass adds up the parts.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from megatron_muon._patching import Patch

__all__ = ["PATCHES"]


def _gather_output(
    latent_width: int, sequence_parallel: bool, group: Any, module: Any, inputs: Any, outputs: tuple[torch.Tensor, Any]
) -> tuple[torch.Tensor, Any]:
    """Forward hook: ``[s, b, width / tp]`` becomes what a whole projection would give, ``[s or s / tp, b, width]``."""
    mappings = importlib.import_module("megatron.core.tensor_parallel.mappings")
    part, bias = outputs
    whole = mappings.gather_from_tensor_model_parallel_region(part, group=group)
    if sequence_parallel:
        # Upstream gathers the rotary part along the sequence next, and the backward pass of that adds up.
        return mappings.scatter_to_sequence_parallel_region(whole, group=group), bias
    latent, rotary = whole.split([latent_width, whole.size(-1) - latent_width], dim=-1)
    rotary = mappings.copy_to_tensor_model_parallel_region(rotary, group=group)
    return torch.cat([latent, rotary], dim=-1), bias


def _wrap_init(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        linear = importlib.import_module("megatron.core.tensor_parallel").ColumnParallelLinear
        projection = getattr(self, "linear_kv_down_proj", None)
        if isinstance(projection, linear) and self.tp_group.size() > 1:
            hook = functools.partial(
                _gather_output, self.config.kv_lora_rank, self.config.sequence_parallel, self.tp_group
            )
            projection.register_forward_hook(hook)

    return init


PATCHES: list[Patch] = [
    Patch(
        "megatron.core.transformer.multi_latent_attention:MLASelfAttention.__init__",
        _wrap_init,
        "with the local specification the gradient of the rotary keys is not summed over tensor-parallel ranks",
    ),
]
