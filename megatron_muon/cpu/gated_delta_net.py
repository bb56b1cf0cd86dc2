"""What GatedDeltaNet takes from flash-linear-attention, in plain torch.

The ``fla`` kernels are Triton, so they need a GPU. Megatron-Core has a torch version of the gated delta rule for its
deterministic mode; with the two small functions below it serves without that mode (which also changes other modules).
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from megatron_muon._patching import Original, Patch, Patches, replace_by

_SPECS = "megatron.core.models.gpt.experimental_attention_variant_module_specs"
_NO_LOCAL_SPEC = "the layer specification of hybrids exists for TransformerEngine only"
_PACKAGE = "megatron.core.ssm.gated_delta_net"
PATCHES = Patches()


def l2norm(x: torch.Tensor, dim: int = -1, eps: float = 1e-6) -> torch.Tensor:
    """``x / sqrt(sum(x^2) + eps)`` along ``dim``, summed in fp32 and returned in the dtype of ``x``."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return (wide * torch.rsqrt(wide.square().sum(dim, keepdim=True) + eps)).to(x.dtype)


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, None]:
    """Depth-wise causal convolution, followed by SiLU where ``activation`` says so.

    Args:
        x: ``[batch, seq, channels]``.
        weight: ``[channels, width]``.
        bias: ``[channels]``.
        activation: None, ``"silu"`` or ``"swish"``.
        initial_state: not supported.
        output_final_state: not supported.
        cu_seqlens: not supported.

    Returns:
        ``[batch, seq, channels]`` and no state.
    """
    _refuse_packing_and_state(cu_seqlens, initial_state, output_final_state)
    width = weight.size(-1)
    padded = torch.nn.functional.pad(x.transpose(1, 2), (width - 1, 0))
    out = torch.nn.functional.conv1d(padded, weight.unsqueeze(1), bias, groups=weight.size(0)).transpose(1, 2)
    return (torch.nn.functional.silu(out) if activation in ("silu", "swish") else out), None


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *args: Any,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Megatron-Core's torch version of the chunked gated delta rule, under the name and signature of ``fla``."""
    _refuse_packing_and_state(cu_seqlens, initial_state, output_final_state)
    rule = importlib.import_module("megatron.core.ssm.gated_delta_net.common").torch_chunk_gated_delta_rule
    return rule(q, k, v, *args, initial_state=None, output_final_state=False, **kwargs)


def _refuse_packing_and_state(cu_seqlens: Any, initial_state: Any, output_final_state: bool) -> None:
    if cu_seqlens is not None:
        raise NotImplementedError(
            "packed sequences (cu_seqlens) in GatedDeltaNet need flash-linear-attention and a GPU; on the CPU train "
            "without sequence packing"
        )
    if initial_state is not None or output_final_state:
        raise NotImplementedError("recurrent state (inference) in GatedDeltaNet needs flash-linear-attention and a GPU")


@PATCHES.around(
    f"{_PACKAGE}.common:_GDNBase.__init__",
    "without sequence parallelism nobody sums the gradient of the output norm, which is shared by the heads that "
    "tensor-parallel ranks hold: the replicas would drift apart",
)
def _wrap_init(original: Original, self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    # Under sequence parallelism Megatron-Core sums the gradients of all norms itself.
    if self.tp_size > 1 and not self.config.sequence_parallel:
        for parameter in self.out_norm.parameters():
            parameter.register_hook(functools.partial(_sum_over, self.tp_group))


def _sum_over(group: Any, gradient: torch.Tensor) -> torch.Tensor:
    total = gradient.clone()
    torch.distributed.all_reduce(total, group=group)
    return total


def _local_provider(config: Any) -> Any:
    return importlib.import_module("megatron.core.models.backends").LocalSpecProvider()


@PATCHES.around(f"{_SPECS}:_get_self_attention_module_spec", _NO_LOCAL_SPEC)
def _wrap_attention_spec(original: Original, config: Any, backend: Any = None) -> Any:
    """The softmax-attention layers of a hybrid, with their input norm outside of the linear layer."""
    if backend is not None and not _is_local(backend):
        return original(config, backend)
    layer = importlib.import_module("megatron.core.models.gpt.gpt_layer_specs").get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
    )
    spec = layer.submodules.self_attention
    spec.metainfo["fuse_input_layernorm"] = False
    return spec


@PATCHES.around(f"{_SPECS}:get_gated_delta_net_module_spec", _NO_LOCAL_SPEC)
def _wrap_gated_delta_net_spec(original: Original, config: Any, backend: Any = None) -> Any:
    if backend is not None and not _is_local(backend):
        return original(config, backend)
    backend = backend or _local_provider(config)
    spec = original(config, backend)
    spec.submodules.in_proj = backend.column_parallel_linear()
    spec.metainfo["fuse_input_layernorm"] = False
    return spec


def _is_local(backend: Any) -> bool:
    """Whether ``backend`` is Megatron-Core's own; one of TransformerEngine is never chosen here, only honoured."""
    return isinstance(backend, importlib.import_module("megatron.core.models.backends").LocalSpecProvider)


PATCHES += [
    # The package and gdn hold copies of common's names, which are None where fla is absent: copies of None cannot be
    # found, so each place is named.
    *(
        Patch(f"{module}:HAVE_FLA", replace_by(True), "GatedDeltaNet refuses to be built without fla")
        for module in (_PACKAGE, f"{_PACKAGE}.common")
    ),
    *(
        Patch(f"{module}:{function.__name__}", replace_by(function), "fla's kernel needs a GPU")
        for module, functions in (
            (_PACKAGE, (causal_conv1d, chunk_gated_delta_rule, l2norm)),
            (f"{_PACKAGE}.common", (causal_conv1d, chunk_gated_delta_rule, l2norm)),
            (f"{_PACKAGE}.gdn", (causal_conv1d, chunk_gated_delta_rule)),
        )
        for function in functions
    ),
    Patch(f"{_SPECS}:_get_backend_spec_provider", replace_by(_local_provider), _NO_LOCAL_SPEC),
]
