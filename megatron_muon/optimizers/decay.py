"""The methods of weight decay: where in a step each of them acts."""

from __future__ import annotations

from typing import Any

import torch

from megatron_muon.errors import ConfigError

__all__ = ["WeightDecay"]


class WeightDecay:
    """One method of weight decay, see :class:`megatron_muon.Muon`.

    Attributes:
        on_gradients: whether it is added to gradients (``l2``).
        is_cautious: whether only elements that the update makes smaller decay, when it is added.
    """

    def __init__(self, method: str, acts: bool) -> None:
        """
        Args:
            method: its name.
            acts: False for variants that would undo it.
        """
        self._method = method if acts else "none"
        self.on_gradients = self._method == "l2"
        self.is_cautious = self._method == "cautious"

    def factor(self, group: dict[str, Any], first_lr: float) -> float:
        """What weights are multiplied by before the update is added; 1 for the methods that act elsewhere.

        Args:
            group: parameter group.
            first_lr: the rate that it had at first: its peak, where no scheduler has noted one.

        Raises:
            ConfigError: ``independent_scheduled`` without a peak rate.
        """
        decay: float = group["weight_decay"]
        match self._method:
            case "decoupled":
                return 1.0 - group["lr"] * decay
            case "independent":
                return 1.0 - decay
            case "independent_scheduled":
                return 1.0 - decay * group["lr"] / _peak_lr(group, first_lr)
        return 1.0

    @staticmethod
    def decay_cautiously(views: list[tuple[torch.Tensor, torch.Tensor]], rate: float) -> None:
        """Decay the elements that the update makes smaller (as Dion's cautious decay).

        Args:
            views: weights with their directions, of equal shapes.
            rate: the share that is taken away.
        """
        for weight, direction in views:
            weight.sub_(weight * (weight * direction > 0), alpha=rate)


def _peak_lr(group: dict[str, Any], first_lr: float) -> float:
    """Of the schedule, which Megatron-Core's and torch's schedulers note in the group; without, the first rate."""
    peak: float = group.get("max_lr") or group.get("initial_lr") or first_lr
    if not peak:
        raise ConfigError("--muon-weight-decay-method independent_scheduled without --lr: give the peak rate.")
    return peak
