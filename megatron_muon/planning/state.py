"""How much an optimizer keeps of a weight: asked of the optimizer itself, about a weight without contents."""

from __future__ import annotations

from typing import Any

import torch

from megatron_muon.config import MuonConfig
from megatron_muon.optimizers.muon import Muon
from megatron_muon.optimizers.registry import variant_asked_for
from megatron_muon.orthogonalize.scale import SPECTRAL_NORM, UPDATE_NORM
from megatron_muon.routing.layout import MatrixLayout


class StateCounter:
    """Counts the elements of the state of one optimizer."""

    def __init__(self, optimizer: str, options: MuonConfig, moment2_method: str = "adamuon") -> None:
        self.optimizer, self.options, self.moment2_method = optimizer, options, moment2_method
        self._counted: dict[tuple[object, ...], int] = {}

    @property
    def sums(self) -> bool:
        """Whether the step adds something up over whole matrices, which tensor-parallel ranks hold parts of."""
        own = self._made(torch.nn.Parameter(torch.empty(1, 1, device="meta")))
        return own.variant.adapts or own.variant.retracts or own.config.scale_mode in (UPDATE_NORM, SPECTRAL_NORM)

    def elements(self, shape: tuple[int, ...], layout: MatrixLayout, shards: int = 1, shard_dim: int = -1) -> int:
        """Of the state of one rank's shard of a whole weight of this shape, without a main copy."""
        key = (shape, layout, shards, shard_dim)
        if key not in self._counted:
            param = torch.nn.Parameter(torch.empty(shape, device="meta"))
            param.matrix_layout = layout  # type: ignore[attr-defined]
            optimizer = self._made(param)
            optimizer._init_group(optimizer.param_groups[0], skip_non_grad_params=False)
            self._counted[key] = sum(
                # Numbers of whole rows are on every rank that has a part of the row.
                tensor.numel() if tensor.size(shard_dim) == 1 else tensor.numel() // shards
                for tensor in optimizer.state[param].values()
                if isinstance(tensor, torch.Tensor)  # counts of steps are numbers
            )
        return self._counted[key]

    def _made(self, param: torch.nn.Parameter) -> Muon:
        options = self.options
        common: dict[str, Any] = {
            "scalar_optimizer": options.scalar_optimizer,
            "scale_mode": options.scale_mode,
            "coefficient_type": options.coefficient_type,
            "custom_coefficients": options.custom_coefficients,
            "hidden_size": 1,
        }
        asked = {"optimizer": self.optimizer, "adaptive_muon_moment2_method": self.moment2_method}
        return Muon([param], variant=variant_asked_for(asked, options.as_settings()), **common)
