"""How much an optimizer keeps of a weight: asked of the optimizer itself, about a weight without contents."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from megatron_muon.config import MuonConfig
from megatron_muon.optimizers import storage
from megatron_muon.optimizers.muon import Muon
from megatron_muon.optimizers.registry import variant_asked_for
from megatron_muon.optimizers.windows import OFFLOADED
from megatron_muon.orthogonalize.scale import SPECTRAL_NORM, UPDATE_NORM
from megatron_muon.planning.accounts import MASTERS, MOMENTS, MOMENTUM, MUON, Entry
from megatron_muon.routing.layout import MatrixLayout

_OF_FORMS = {
    storage.REMAINDER: MASTERS,
    storage.TIES: MASTERS,
    storage.MOMENTUM: MOMENTUM,
    storage.SCALE: MOMENTUM,
}


class StateCounter:
    """Counts the bytes of the state of one optimizer."""

    def __init__(self, optimizer: str, options: MuonConfig, moment2_method: str = "adamuon") -> None:
        self.optimizer, self.options, self.moment2_method = optimizer, options, moment2_method
        self._counted: dict[tuple[object, ...], tuple[tuple[Entry, int], ...]] = {}

    @property
    def sums(self) -> bool:
        """Whether the step adds something up over whole matrices, which tensor-parallel ranks hold parts of."""
        own = self._made(torch.nn.Parameter(torch.empty(1, 1, device="meta")))
        return own.variant.adapts or own.variant.retracts or own.config.scale_mode in (UPDATE_NORM, SPECTRAL_NORM)

    def bytes(
        self, shape: tuple[int, ...], layout: MatrixLayout, shards: int = 1, shard_dim: int = -1, element_bytes: int = 4
    ) -> tuple[tuple[Entry, int], ...]:
        """What is kept of one rank's shard of a whole weight of this shape, and how many bytes that is."""
        key = (shape, layout, shards, shard_dim, element_bytes)
        if key not in self._counted:
            found = Counter(self._forms(shape, shards, shard_dim, element_bytes))
            found[Entry(MOMENTS, MUON)] = sum(
                # Numbers of whole rows are on every rank that has a part of the row.
                tensor.nbytes if tensor.size(shard_dim) == 1 else tensor.nbytes // shards
                for name, tensor in self._state(shape, layout).items()
                if name not in _OF_FORMS and isinstance(tensor, torch.Tensor)  # counts of steps are numbers
            )
            self._counted[key] = tuple(found.items())
        return self._counted[key]

    def _forms(self, shape: tuple[int, ...], shards: int, shard_dim: int, element_bytes: int) -> Counter[Entry]:
        """Bytes of master weights and of momentum."""
        own = list(shape)
        own[shard_dim] //= shards
        keeps_masters = element_bytes == 2
        remains = keeps_masters and self.options.master == "remainder"
        param = torch.empty(own, dtype=torch.bfloat16 if remains else torch.float32, device="meta")
        state = storage.initial(param, self.options.master, self.options.momentum_dtype)
        found: Counter[Entry] = Counter()
        if keeps_masters and not remains:
            found[Entry(MASTERS, MUON)] = param.nbytes
        on_host = OFFLOADED.get(self.options.offload, ())
        for name, tensor in state.items():
            found[Entry(_OF_FORMS[name], MUON, name in on_host)] += tensor.nbytes
        return found

    def _state(self, shape: tuple[int, ...], layout: MatrixLayout) -> dict[str, Any]:
        """Of a whole weight in float32."""
        param = torch.nn.Parameter(torch.empty(shape, device="meta"))
        param.matrix_layout = layout  # type: ignore[attr-defined]
        optimizer = self._made(param)
        optimizer._init_group(optimizer.param_groups[0], skip_non_grad_params=False)
        return optimizer.state[param]

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
