"""Weights beside those of Muon, which another optimizer is to update: whether one does."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

_STEPS = 3
"""Of Muon, between which the other optimizer has taken two, in whichever order both step."""

_BESIDE: Any = WeakTensorKeyDictionary()
"""By the weights of Muon's groups."""


class Beside:
    """Tells once of weights that have gradients, and that nothing changes while Muon steps.

    Optimizers that write to memory without autograd's notice are not taken for none: one entry of each weight is
    compared, too. It is where the first gradient was largest.
    """

    def __init__(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._weights = [(name, weakref.ref(param)) for name, param in named]
        self._seen: list[tuple[str, torch.Tensor, int, torch.Tensor, torch.Tensor]] = []
        self._steps = 0

    def look(self) -> bool:
        """Look at the weights after a step of Muon; whether to do so again."""
        self._steps += 1
        if self._steps == 1:
            self._seen = [
                (name, param, param._version, index, _entry(param, index))
                for name, param in ((name, ref()) for name, ref in self._weights)
                if param is not None and (index := _largest(param)) is not None
            ]
            return bool(self._seen)
        same = [each for each in self._seen if each[1].grad is not None and each[1]._version == each[2]]
        # Waits for the device, twice, where nothing is known to have written to a weight. After each step: signs may
        # bring an entry back to where it was.
        self._seen = [each for each in same if torch.equal(_entry(each[1], each[3]), each[4])]
        if self._steps < _STEPS:
            return bool(self._seen)
        names = [name for name, *_ in self._seen]
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            warnings.warn(
                f"{', '.join(names[:4])}{more}: trained, and not changed in {_STEPS} steps of Muon, which has the "
                "matrices of the model alone. Give param_groups(model).scalar to an AdamW that steps, too; or take "
                "megatron_muon.optimizer_for(model), one optimizer for all weights.",
                stacklevel=4,
            )
        return False


def note(muon: Iterable[torch.Tensor], others: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Note of the weights of a model which are Muon's, and which are not."""
    beside = Beside(others)
    for param in muon:
        _BESIDE[param] = beside


def beside(params: Iterable[torch.Tensor]) -> Beside | None:
    """What is beside these weights of Muon; None if nobody has noted anything."""
    return next((_BESIDE[param] for param in params if param in _BESIDE), None)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _largest(param: torch.Tensor) -> torch.Tensor | None:
    """Where its gradient on this rank is largest, on its device; None if it has none.

    The gradient of a ``DTensor`` may be divided in another way, or not at all: tensor parallelism leaves a table's
    whole.
    """
    grad = None if param.grad is None else _local(param.grad)
    if grad is None or grad.layout != torch.strided or not grad.numel() or grad.shape != _local(param).shape:
        return None
    return grad.abs().argmax()


def _entry(param: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return torch.take(_local(param.detach()), index)
