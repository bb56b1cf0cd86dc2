"""The numbers of a param group in one step: learning rate, and by how much weights decay.

A rate may be a tensor, which schedules fill in place: one on the CPU is read, one on a GPU never is. What is refused of
numbers that the host knows becomes NaN there, so that it shows. At rate 0 a step leaves every weight as it is, whatever
the method of its decay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_muon.config import MuonConfig
from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.groups import OPTIONAL
from megatron_muon.orthogonalize.kernels.elementwise import Rate
from megatron_muon.routing.layout import layout_of

PEAK_RATE = "max_lr"
"""Entry of param groups: the peak rate of ``independent_scheduled``, as Megatron-Core's and torch's schedulers call it.
Where nobody gives it, it is the largest rate that the group has had."""


@dataclass(frozen=True)
class Options:
    """The options of a param group in one step, which can be a key of a dictionary: tensors count by identity.

    Attributes:
        lr: learning rate; a tensor has no dimension.
        momentum: decay of the momentum.
        nesterov: weight of the momentum in its mix with the gradient; 1 if it is taken as it is.
        kept: factor on the weights by which they decay; None if they do not decay, or by another method.
        l2: factor on the weights that are added to their gradients; 0 with other methods of decay.
        cautious: factor on the weights that are subtracted where the update makes an element smaller (as Dion's
            cautious decay); None with other methods.
        scale_mode: see :func:`megatron_muon.orthogonalize.scale.scale_factor`.
        extra_scale_factor: a further factor on updates.
        ball_radius: factor on the updates of weights in balls.
        damping_depth: see :class:`megatron_muon.Muon`.
    """

    lr: Rate
    momentum: float
    nesterov: float
    kept: Rate | None
    l2: float
    cautious: Rate | None
    scale_mode: str
    extra_scale_factor: float
    ball_radius: float
    damping_depth: float

    @property
    def is_still(self) -> bool:
        """Whether the rate is known to be 0: not a bit of a weight changes, not even the sign of a zero."""
        return not isinstance(self.lr, torch.Tensor) and self.lr == 0.0


def options_of(group: dict[str, Any], config: MuonConfig, decays: bool, first_lr: Rate) -> Options:
    """The options of a group in this step, which :func:`check_decay` has seen.

    Args:
        group: the param group.
        config: of the optimizer.
        decays: False for variants that would undo weight decay.
        first_lr: see :func:`peak_of`.
    """
    own = {name: group.get(name, getattr(config, name)) for name in OPTIONAL}
    lr, momentum = rate_of(group, "lr"), float(group["momentum"])
    decay = rate_of(group, "weight_decay") if decays else 0.0
    method = own.pop("weight_decay_method")
    share = 0.0 if method == "l2" else _share(method, lr, decay, _with_weights(peak_of(group, first_lr), group))
    is_cautious = method == "cautious"
    return Options(
        lr=lr,
        momentum=momentum,
        nesterov=momentum if own.pop("nesterov") else 1.0,
        kept=None if is_cautious else kept_of(share),
        l2=float(decay) if method == "l2" else 0.0,  # a tensor of the CPU
        cautious=_within(share) if is_cautious and _is_there(share) else None,
        damping_depth=group["damping_depth"],
        **own,
    )


def check_decay(group: dict[str, Any], config: MuonConfig, decays: bool, first_lr: Rate) -> None:
    """Refuse a weight decay that would turn weights in this step, as far as the host knows its numbers.

    Args:
        group: as of :func:`options_of`.
        config: likewise.
        decays: likewise.
        first_lr: likewise.

    Raises:
        ConfigError: naming rate, decay and method, and the way out.
    """
    method = group.get("weight_decay_method", config.weight_decay_method)
    decay, lr, peak = (on_host(each) for each in (group["weight_decay"], group["lr"], peak_of(group, first_lr)))
    if method == "l2" and decay is None and decays:
        raise ConfigError("weight_decay as a tensor on a GPU with weight_decay_method l2: give a number.")
    if decay is None or lr is None or peak is None:
        return
    found = [(_share(method, lr, decay, peak), f"weight_decay_method {method}")] if decays and method != "l2" else []
    rows = lr * group["scalar_lr_mult"] * decay * group["scalar_wd_mult"]
    if rows > 1.0 and any(layout_of(param).has_scalar_rows for param in group["params"]):
        found.append((rows, f"multiples of both for rows under {group['scalar_optimizer']}"))
    for share, what in found:
        if share > 1.0:
            raise ConfigError(
                f"weight_decay {decay:g} with lr {lr:g} and {what}: a step would multiply weights by {1.0 - share:g}, "
                "and turn them. Give a smaller weight_decay, or a smaller lr."
            )


def peak_of(group: dict[str, Any], first_lr: Rate) -> Rate:
    """The peak rate of a group: the one that it is given, or a larger one if it has that now.

    Args:
        group: the param group.
        first_lr: the rate that it had when it was added. That of a scheduler's beginning counts, too.
    """
    given = group.get(PEAK_RATE)
    rates = (first_lr, group.get("initial_lr")) if given is None else (given,)
    return _largest([each for each in (*rates, group["lr"]) if each is not None])


def note_peak(group: dict[str, Any], config: MuonConfig, first_lr: Rate) -> None:
    """In a step, keep the peak rate for those to come, in this process or another; where it is of any use."""
    is_scheduled = group.get("weight_decay_method", config.weight_decay_method) == "independent_scheduled"
    if is_scheduled and _is_there(group["weight_decay"]):
        group[PEAK_RATE] = peak_of(group, first_lr)


def rate_of(group: dict[str, Any], name: str) -> Rate:
    """A rate of a group with all its bits; a tensor has no dimension, and is where the group's weights are."""
    return _with_weights(group[name], group)


def kept_of(share: Rate) -> Rate | None:
    """The factor on weights of which a step takes a share away; None if it takes nothing."""
    return 1.0 - _within(share) if _is_there(share) else None


def moving(rate: Rate, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """What takes the place of weights, or is multiplied with them: ``new``; at rate 0 ``old``."""
    if isinstance(rate, torch.Tensor):
        return torch.where(rate != 0, new, old)
    return new if rate else old


def _share(method: str, lr: Rate, decay: Rate, peak: Rate) -> Rate:
    """How much of a weight a step takes away: nothing at rate 0."""
    if method not in ("independent", "independent_scheduled"):
        return lr * decay
    if not isinstance(lr, torch.Tensor):
        return 0.0 if lr <= 0.0 else decay if method == "independent" else decay * lr / peak
    return (lr > 0.0).double() * decay if method == "independent" else torch.where(lr > 0.0, decay * lr / peak, 0.0)


def _within(share: Rate) -> Rate:
    """NaN where more than all would be taken away: it must show. Numbers of the host have been looked at."""
    return torch.where(share <= 1.0, share, math.nan) if isinstance(share, torch.Tensor) else share


def _is_there(rate: Rate) -> bool:
    return isinstance(rate, torch.Tensor) or rate != 0.0


def on_host(rate: Rate) -> float | None:
    """The number that a rate is; None if the host would have to wait for it."""
    if isinstance(rate, torch.Tensor) and rate.device.type != "cpu":
        return None
    return float(rate)


def _largest(rates: Sequence[Rate]) -> Rate:
    numbers = [number for rate in rates if (number := on_host(rate)) is not None]
    found: Rate = max(numbers, default=0.0)
    for rate in rates:
        if isinstance(rate, torch.Tensor) and rate.device.type != "cpu":
            found = torch.clamp_min(rate.detach().reshape(()), found)
    return found


def _with_weights(rate: Rate, group: dict[str, Any]) -> Rate:
    """A rate of 0 that the host knows is a number: a step is to know that it changes nothing."""
    if not isinstance(rate, torch.Tensor) or on_host(rate) == 0.0:
        return float(rate)
    if not group["params"]:
        return rate
    return rate.detach().reshape(()).to(group["params"][0].device, non_blocking=True)
