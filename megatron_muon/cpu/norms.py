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

from megatron_muon._patching import Patch

__all__ = ["PATCHES", "ZeroCenteredLayerNorm", "ZeroCenteredRMSNorm", "build_norm", "local_norm"]


class ZeroCenteredLayerNorm(torch.nn.LayerNorm):
    """LayerNorm whose scale is ``1 + weight``, so that weight decay pulls the scale to one."""

    def reset_parameters(self) -> None:
        """Weight and bias start at zero."""
        super().reset_parameters()
        torch.nn.init.zeros_(self.weight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize over the last dimension."""
        return torch.nn.functional.layer_norm(input, self.normalized_shape, 1 + self.weight, self.bias, self.eps)


class ZeroCenteredRMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose scale is ``1 + weight``, so that weight decay pulls the scale to one."""

    def reset_parameters(self) -> None:
        """The weight starts at zero."""
        torch.nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize over the last dimension."""
        return torch.nn.functional.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)


_PLAIN: dict[str, type[torch.nn.Module]] = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
_ZERO_CENTERED: dict[str, type[torch.nn.Module]] = {
    "LayerNorm": ZeroCenteredLayerNorm,
    "RMSNorm": ZeroCenteredRMSNorm,
}


def build_norm(config: Any, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:
    """The norm that ``config.normalization`` names, as a plain torch module.

    Args:
        config: Megatron-Core's ``TransformerConfig``.
        hidden_size: size of the last dimension.
        eps: added to the variance.

    Returns:
        A module with ``weight`` (and ``bias`` for LayerNorm) of shape ``(hidden_size,)``, marked ``sequence_parallel``
        as ``config`` says. ``L2Norm`` has no parameters.

    Raises:
        ValueError: ``config.normalization`` is none of LayerNorm, RMSNorm and L2Norm.
    """
    if config.normalization == "L2Norm":
        return importlib.import_module("megatron.core.transformer.torch_norm").L2Norm(hidden_size, eps=eps)
    classes = _ZERO_CENTERED if config.layernorm_zero_centered_gamma else _PLAIN
    if config.normalization not in classes:
        raise ValueError(f"normalization must be LayerNorm, RMSNorm or L2Norm, not {config.normalization!r}")
    norm = classes[config.normalization](hidden_size, eps=eps)
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
]
