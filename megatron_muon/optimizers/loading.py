"""State dicts of an optimizer: with all bits, and in the form of this run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_muon.errors import sizes
from megatron_muon.optimizers.groups import name_of
from megatron_muon.optimizers.handled import STEP
from megatron_muon.optimizers.precision import own_dtype
from megatron_muon.optimizers.storage import MOMENTUM, SCALE
from megatron_muon.routing.wrappers import strip_wrappers


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


def in_order(groups: Sequence[Mapping[str, Any]], state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict in the order of an optimizer's weights, by the names of both where both have them.

    Args:
        groups: param groups of the optimizer.
        state_dict: as it was saved; of other numbers of weights it is left to torch, which refuses it.

    Raises:
        ValueError: for other names.
    """
    saved = [dict(group) for group in state_dict["param_groups"]]
    if [len(group["params"]) for group in saved] != [len(group["params"]) for group in groups]:
        return state_dict
    for its, own in zip(saved, groups, strict=True):
        if "param_names" in its and "param_names" in own:
            its["params"] = _in_order_of(own["param_names"], its)
            its["param_names"] = own["param_names"]
    return {**state_dict, "param_groups": saved}


def check_state(groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]) -> None:
    """Refuse state that is not of these weights, or not Muon's.

    Args:
        groups: param groups of the optimizer.
        state_dict: of :func:`in_order`.

    Raises:
        ValueError: naming the weight.
    """
    for saved, own in zip(state_dict["param_groups"], groups, strict=False):
        for index, (key, param) in enumerate(zip(saved["params"], own["params"], strict=False)):
            state = state_dict["state"].get(key)
            if not isinstance(state, Mapping) or not state:
                continue
            momentum = state.get(MOMENTUM)
            if momentum is None and "exp_avg" in state:
                raise ValueError(
                    f"{name_of(own, index)}: its state has {', '.join(sorted(state))}, and no {MOMENTUM}: it is of "
                    "another optimizer, such as AdamW. Load its weights, and begin with a new state."
                )
            if not isinstance(momentum, torch.Tensor) or not momentum.is_floating_point():
                continue
            if momentum.shape != param.shape:
                raise ValueError(
                    f"{name_of(own, index)}: its {MOMENTUM} has shape {sizes(momentum.shape)}, and the weight "
                    f"{sizes(param.shape)}: the state is of other weights, or in another order."
                )


def _in_order_of(names: Sequence[str], saved: Mapping[str, Any]) -> list[Any]:
    """The numbers of a saved group's weights in the order of names, which may have other wrappers than the saved."""
    if any(isinstance(number, str) for number in saved["params"]):  # torch.distributed.checkpoint has put them in order
        return list(saved["params"])
    own, its = ([strip_wrappers(name) for name in each] for each in (names, saved["param_names"]))
    if own == its:
        return list(saved["params"])
    number = dict(zip(its, saved["params"], strict=True))
    if len(number) < len(its) or number.keys() != set(own):
        first = next((name for name in own if name not in number), own[0])
        raise ValueError(
            f"{first}: no weight of that name is in the saved state, which has {its[0]}, ...: it is of other weights. "
            "Take param_names out of its param groups to load it in the order of the weights."
        )
    return [number[name] for name in own]


def tell(others: Mapping[str, int]) -> None:
    """Tell of weights whose state had another form, on the first rank."""
    is_first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    for what, count in others.items() if is_first else ():
        print(f"megatron_muon: {count} weight{'s' * (count > 1)} {what}", flush=True)
