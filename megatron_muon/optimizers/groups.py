"""Options of param groups: their names, how they are checked, and their values in a step."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

from megatron_muon.choices import AUTO_STEPS, COEFFICIENTS, STEPS
from megatron_muon.config import MuonConfig
from megatron_muon.errors import ConfigError, sizes
from megatron_muon.optimizers.handled import STEP
from megatron_muon.options import UpdateKnobs
from megatron_muon.orthogonalize.kernels.elementwise import Rate
from megatron_muon.routing.annotate import OVERRIDE_ATTRIBUTE
from megatron_muon.routing.layout import BALLS, MSIGN, MatrixLayout

OPTIONAL = ("nesterov", "scale_mode", "extra_scale_factor", "weight_decay_method", "ball_radius")
"""Options that a group may set for itself; otherwise the optimizer's value holds. All other options that a group may
have are always in it (``torch.optim.Optimizer.defaults``)."""

PER_GROUP = ("damping_depth", "scalar_optimizer", "scalar_betas", "scalar_eps", "scalar_lr_mult", "scalar_wd_mult")
"""Options of :class:`megatron_muon.MuonOptions` that every group has."""

_OF_TORCH = ("params", "param_names", "initial_lr", "base_momentum", "max_momentum", "swa_lr", "name", "group_name")
_OF_MEGATRON = ("max_lr", "min_lr", "start_wd", "end_wd", "wd_mult", "lr_mult", "optimizer", "is_expert_parallel")
_OF_OTHERS = {*_OF_TORCH, *_OF_MEGATRON, "is_decoupled_lr", "default_config", "pre_wd_mult", "pre_lr_mult"}
"""What torch, Megatron-Core (with NeMo's names for two), and schedulers write to groups and read from them."""

AUTO = "auto_steps"
"""Entry of param groups that :mod:`megatron_muon.optimizers.auto_steps` makes: (class, steps) of all classes of weights
of the model whose number of Newton-Schulz steps has been measured."""

_RULE = "MuonConfig(param_rule=('GLOB={}:...',)) in megatron_muon.param_groups"
BUDGETS = {"num_ns_steps": _RULE.format(STEPS), "coefficient_type": _RULE.format(COEFFICIENTS)}
"""Options of the whole optimizer that weights may have of their own, and how."""

_MEANT = {"wd": "weight_decay", "learning_rate": "lr", "beta": "momentum", "mu": "momentum"}
_NOT_NEGATIVE = ("lr", "weight_decay", "damping_depth", "scalar_eps", "scalar_lr_mult", "scalar_wd_mult")

_ROUNDING = 1e-12
"""How far below 0 a rate may be: schedules that end at 0 miss it, as torch's ``LinearLR`` by 1e-17 of the peak."""


def check_names(group: Collection[str], defaults: Collection[str], constructor: Collection[str]) -> None:
    """Refuse options that a param group cannot have.

    Args:
        group: names of the group's entries.
        defaults: names of the options that every group has.
        constructor: names of all options of the optimizer.

    Raises:
        ConfigError: naming the option, and the way out.
    """
    known = [*defaults, *OPTIONAL, AUTO]
    for name in (name for name in group if name not in _OF_OTHERS and name not in known):
        if name in constructor:
            way_out = f"a rule of {BUDGETS[name]}" if name in BUDGETS else "to an optimizer of their own"
            raise ConfigError(
                f"{name} in a param group: it is an option of the whole optimizer. Give it to the constructor, or "
                f"these weights {way_out}."
            )
        near = difflib.get_close_matches(name, known, 1)
        meant = _MEANT.get(name) or (near[0] if near else "")
        raise ConfigError(
            f"{name} in a param group: there is no such option{f' (did you mean {meant}?)' if meant else ''}. A group "
            f"may have {', '.join(known)}."
        )


def check_numbers(group: Mapping[str, Any], *, read: bool = True) -> None:
    """Refuse wrong values of the options that every group has.

    Args:
        group: the options.
        read: whether to look at what tensors hold, for which the host waits.

    Raises:
        ConfigError: naming option, value and way out.
    """
    for name in _NOT_NEGATIVE:
        value: Any = group.get(name)
        unseen = isinstance(value, torch.Tensor) and not read
        if not is_number(value) or not (unseen or -_ROUNDING <= value < math.inf):
            raise ConfigError(f"{name} {value}: give a finite number of at least 0")
    betas: Any = group.get("scalar_betas")
    are_two = isinstance(betas, list | tuple) and len(betas) == 2
    if not are_two or not all(is_number(beta) and 0.0 <= beta < 1.0 for beta in betas):
        raise ConfigError(f"scalar_betas {betas}: give two numbers from 0 to below 1")


def check_layout(optimizer: Any, param: torch.Tensor, layout: MatrixLayout) -> None:
    """Refuse what a :class:`megatron_muon.Muon` cannot do with a weight of this layout.

    Raises:
        ConfigError: naming the rule or the part of the layout, and the way out.
    """
    variant = optimizer.variant
    if layout.budget is not None and layout.direction != MSIGN:
        raise ConfigError(
            f"a budget of {layout.budget} for a weight of {sizes(param.shape)} by {layout.direction}: what is not "
            "orthogonalized has no steps and coefficients. Leave one of both out of its layout."
        )
    if layout.budget is not None and layout.budget.steps == AUTO_STEPS:
        problem = "" if layout.budget.measured else "no name of its class (Budget.measured)"
        problem = problem if variant.lends else f"{variant.name}, which iterates more than the momentum"
        if problem:
            raise ConfigError(
                f"--muon-param-rule 'GLOB=steps:{AUTO_STEPS}' (a {layout.kind} weight) with {problem}: give a number, "
                "such as steps:7."
            )
    if layout.is_turned and (optimizer.config.master == "remainder" or optimizer.config.momentum_dtype == "int8"):
        raise ConfigError(
            f"master {optimizer.config.master}, momentum_dtype {optimizer.config.momentum_dtype} with a weight of "
            f"{sizes(param.shape)} whose rows are inputs (or experts in turns): remainders and numbers of 8 bits are "
            "kept by rows of outputs. Use master fp32 and momentum in another dtype."
        )
    rule = getattr(param, OVERRIDE_ATTRIBUTE, f"NAME={layout.direction}")
    if layout.direction not in optimizer.directions:
        raise ConfigError(
            f"--muon-param-rule '{rule}' (a {layout.kind} weight) with an optimizer that has no such "
            "updates: use --optimizer stiefel_muon, or another choice."
        )
    if layout.direction in BALLS and not variant.decays:
        raise ConfigError(
            f"--muon-param-rule '{rule}' (a {layout.kind} weight) with {variant.name}, which "
            "has no weight decay: such a weight would leave its ball. Give it to Adam, or use --optimizer muon."
        )


def all_options(optimizer: Any) -> dict[str, Any]:
    """Every option of a :class:`megatron_muon.Muon` by its name, for ranks to compare; tensors are left out, unread."""
    variant, config = optimizer.variant, optimizer.config
    found = {field.name: getattr(config, field.name) for field in dataclasses.fields(UpdateKnobs)}
    if config.blockwise_period > 1:  # ranks of which one steps in blocks would wait for each other
        found["this step is one of blocks"] = optimizer.steps_in_blocks
    found |= {"nesterov": config.nesterov, "hidden_size": optimizer.hidden_size, "variant": variant.name}
    found |= {name: getattr(variant, name) for name in variant.flags}
    for number, group in enumerate(optimizer.param_groups):
        own = {name: value for name, value in group.items() if name not in _OF_OTHERS and name != STEP}
        found |= {f"{name} of param group {number}": own[name] for name in own if not torch.is_tensor(own[name])}
    return found


def is_number(value: Any) -> bool:
    """Whether a value is a real number, or a tensor of one element."""
    return isinstance(value, Real) or (isinstance(value, torch.Tensor) and value.numel() == 1)


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


def options_of(group: dict[str, Any], config: MuonConfig, decays: bool, first_lr: Rate) -> Options:
    """The options of a group in this step.

    Args:
        group: the param group.
        config: of the optimizer.
        decays: False for variants that would undo weight decay.
        first_lr: the rate that the group had when it was added: the peak rate if no scheduler has noted one.

    Raises:
        ConfigError: if its weight decay needs a peak rate, and there is none, or a number, and is a tensor.
    """
    own = {name: group.get(name, getattr(config, name)) for name in OPTIONAL}
    lr, decay = (_with_weights(group[name], group) for name in ("lr", "weight_decay"))
    momentum, decay = float(group["momentum"]), decay if decays else 0.0
    method, kept = own.pop("weight_decay_method"), None
    if decay and method == "decoupled":
        kept = 1.0 - lr * decay
    elif decay and method == "independent":
        kept = 1.0 - decay
    elif decay and method == "independent_scheduled":
        kept = 1.0 - decay * lr / _with_weights(_peak_lr(group, first_lr), group)
    l2 = decay if method == "l2" else 0.0
    if isinstance(l2, torch.Tensor):
        raise ConfigError("weight_decay as a tensor with weight_decay_method l2: give a number")
    return Options(
        lr=lr,
        momentum=momentum,
        nesterov=momentum if own.pop("nesterov") else 1.0,
        kept=kept,
        l2=l2,
        cautious=lr * decay if decay and method == "cautious" else None,
        damping_depth=group["damping_depth"],
        **own,
    )


def _with_weights(rate: Rate, group: dict[str, Any]) -> Rate:
    """The rate with all its bits; as a tensor it gets no dimensions, and the device of the group's weights."""
    if not isinstance(rate, torch.Tensor):
        return float(rate)
    if not group["params"]:
        return rate
    return rate.detach().reshape(()).to(group["params"][0].device, non_blocking=True)


def _peak_lr(group: dict[str, Any], first_lr: Rate) -> Rate:
    """The peak rate, which Megatron-Core's and torch's schedulers note in the group; without one, the first rate."""
    for peak in (group.get("max_lr"), group.get("initial_lr"), first_lr):
        if isinstance(peak, torch.Tensor) or peak:
            return peak
    raise ConfigError("--muon-weight-decay-method independent_scheduled without --lr: give the peak rate.")
