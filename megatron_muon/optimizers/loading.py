"""State dicts of an optimizer: with all bits, and in the form of this run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon.optimizers.handled import STEP
from megatron_muon.optimizers.precision import own_dtype
from megatron_muon.optimizers.storage import MOMENTUM, SCALE


class AsItIs:
    """A tensor in a state dict that torch's optimizers would convert to the dtype of its weight."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    @classmethod
    def hook(cls, _: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Before a state dict is loaded."""
        state = {
            key: {name: cls(value) if isinstance(value, torch.Tensor) else value for name, value in each.items()}
            if isinstance(each, dict)
            else each
            for key, each in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    def of(self, param: torch.Tensor, name: str, on_host: Sequence[str]) -> torch.Tensor:
        """On the device of its weight, in a dtype with all bits that the optimizer's own would have.

        Args:
            param: the weight.
            name: of the state.
            on_host: state that lives on the host: it stays where it is, and never comes to the device as a whole.
        """
        if name == STEP or name in on_host:
            return self._tensor
        keeps = name in (MOMENTUM, SCALE) or not self._tensor.is_floating_point()
        return self._tensor.to(param.device, None if keeps else own_dtype(param.dtype))


def tell(others: Mapping[str, int]) -> None:
    """Tell of weights whose state had another form, on the first rank."""
    is_first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    for what, count in others.items() if is_first else ():
        print(f"megatron_muon: {count} weight{'s' * (count > 1)} {what}", flush=True)
