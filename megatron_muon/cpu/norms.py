"""Layer and RMS norms for Megatron-Core's local specification that accept sequence parallelism.

``WrappedTorchNorm`` refuses ``sequence_parallel``, ``persist_layer_norm`` and ``layernorm_zero_centered_gamma``, and
MoE with tensor parallelism insists on the first. On the CPU nothing speaks against them: under sequence parallelism a
norm only has to mark its parameters, because each tensor-parallel rank sees its own part of the sequence and
Megatron-Core sums the gradients of marked parameters (``finalize_model_grads``).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from megatron_muon._patching import Patch


class _Norm(torch.nn.Module):
    """What both norms add to torch's.

    Args:
        hidden_size: size of the last dimension.
        eps: added to the variance.
        zero_centered: whether the scale is ``1 + weight``, so that weight decay pulls the scale to one.
    """

    weight: torch.nn.Parameter

    def __init__(self, hidden_size: int, eps: float, zero_centered: bool = False) -> None:
        super().__init__(hidden_size, eps)
        self.zero_centered = zero_centered
        if zero_centered:
            torch.nn.init.zeros_(self.weight)

    def _scale(self, x: torch.Tensor) -> torch.Tensor:
        """What the normalized ``x`` is multiplied by, in its dtype."""
        return (1 + self.weight if self.zero_centered else self.weight).to(x.dtype)


class LayerNorm(_Norm, torch.nn.LayerNorm):
    """LayerNorm in the dtype of what it is given, returned in that of its weights: fp32 residuals become bfloat16."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize over the last dimension."""
        weight, bias = self._scale(input), self.bias.to(input.dtype)
        return functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)


class RMSNorm(_Norm, torch.nn.RMSNorm):
    """RMSNorm with the dtypes and arguments of :class:`LayerNorm`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize over the last dimension."""
        out = functional.rms_norm(x, self.normalized_shape, self._scale(x), self.eps)
        return out.to(self.weight.dtype)


_NORMS: dict[str, type[LayerNorm | RMSNorm]] = {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}


def build_norm(config: Any, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:
    """The norm that ``config.normalization`` names, as a plain torch module.

    Returns:
        A module with ``weight`` (and ``bias`` for LayerNorm) of shape ``(hidden_size,)``, marked ``sequence_parallel``
        as ``config`` says. ``L2Norm`` has no parameters.

    Raises:
        ValueError: ``config.normalization`` is none of LayerNorm, RMSNorm and L2Norm.
    """
    if config.normalization == "L2Norm":
        return importlib.import_module("megatron.core.transformer.torch_norm").L2Norm(hidden_size, eps=eps)
    if config.normalization not in _NORMS:
        raise ValueError(f"normalization must be LayerNorm, RMSNorm or L2Norm, not {config.normalization!r}")
    norm = _NORMS[config.normalization](hidden_size, eps, config.layernorm_zero_centered_gamma)
    parameter: Any
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm


def _new(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, *args: Any, **kwargs: Any) -> torch.nn.Module:
    # The remaining arguments repeat what config says, and upstream ignores them too.
    return build_norm(config, hidden_size, eps)


def _build_in_new(original: Any) -> Callable[..., Any]:
    return staticmethod(_new)


def local_norm(original: Any) -> Any:
    """Megatron-Core's own norm in place of TransformerEngine's, for a :class:`~megatron_muon._patching.Patch`."""
    return importlib.import_module("megatron.core.transformer.torch_norm").WrappedTorchNorm


def _build_local_norms(original: Callable[..., Any]) -> Callable[..., Any]:
    def build_module(spec: Any, *args: Any, **kwargs: Any) -> Any:
        if spec is torch.nn.LayerNorm or getattr(spec, "__name__", "") == "TENorm":
            spec = local_norm(spec)
        return original(spec, *args, **kwargs)

    return build_module


PATCHES: list[Patch] = [
    Patch(
        "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__",
        _build_in_new,
        "the local specification's norm refuses sequence parallelism, zero-centered gamma and persist_layer_norm",
    ),
    Patch(
        "megatron.core.fusions.fused_layer_norm:FusedLayerNorm.__new__",
        _build_in_new,
        "chosen wherever apex is importable, and its kernels need a GPU",
        create=True,
    ),
    # No copies: this file builds nothing but norms with it.
    Patch(
        "megatron.core.models.vision.clip_vit_model:build_module",
        _build_local_norms,
        "norms before and after a vision transformer are TransformerEngine's, or torch's, with other arguments",
        copies_in=(),
    ),
]
