"""Options of param groups: their names, and how they are checked."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any

import torch

from megatron_muon.choices import AUTO_STEPS, COEFFICIENTS, STEPS
from megatron_muon.errors import ConfigError, shown, sizes
from megatron_muon.optimizers.handled import STEP
from megatron_muon.options import UpdateKnobs
from megatron_muon.routing.annotate import OVERRIDE_ATTRIBUTE
from megatron_muon.routing.blocks import DTYPES
from megatron_muon.routing.layout import BALLS, LAYOUT_ATTRIBUTE, MSIGN, WHOLE, MatrixLayout

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

MEANT = {
    **{"wd": "weight_decay", "learning_rate": "lr", "beta": "momentum", "mu": "momentum", "ns_steps": "num_ns_steps"},
    **dict.fromkeys(("ns_coefficients", "ns_coefs"), "coefficient_type"),
    **dict.fromkeys(("adjust_lr_fn", "adjust_lr", "rms_scale"), "scale_mode"),
}
"""What other implementations call an option."""

OF_TORCHS = {
    *("betas", "amsgrad", "maximize", "foreach", "fused", "capturable", "dampening", "decoupled_weight_decay"),
}
"""Options of torch's optimizers in param groups that are loaded from them."""

_MARKS = {"use_muon": True, "algorithm": "muon", "optim_type": "muon", "kind": "muon"}
"""By which optimizers of other packages that are Muon and Adam at once tell the groups of both apart, and what says
Muon: KellerJordan's and DeepSpeed's, Dion's, others', and nanochat's."""

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
    for name in (name for name in group if not any(name in names for names in (_OF_OTHERS, known, _MARKS))):
        if name in constructor:
            way_out = f"a rule of {BUDGETS[name]}" if name in BUDGETS else "to an optimizer of their own"
            raise ConfigError(
                f"{name} in a param group: it is an option of the whole optimizer. Give it to the constructor, or "
                f"these weights {way_out}."
            )
        near = difflib.get_close_matches(name, known, 1)
        meant = MEANT.get(name) or (near[0] if near else "")
        raise ConfigError(
            f"{name} in a param group: there is no such option{f' (did you mean {meant}?)' if meant else ''}. A group "
            f"may have {', '.join(known)}."
        )


def check_marks(group: Mapping[str, Any]) -> None:
    """Refuse a group that is marked as another optimizer's, as other packages mark groups.

    Raises:
        ConfigError: naming the mark, and the way out.
    """
    wrong = [name for name, own in _MARKS.items() if group.get(name, own) != own]
    if group.get("optimizer") in ("adam", "adamw", "lion", "sgd"):  # Megatron-Core's, which says Muon in many words
        wrong.append("optimizer")
    for name in wrong:
        raise ConfigError(
            f"{name} {group[name]!r} in a param group: megatron_muon.Muon updates all its weights by Muon, and by "
            f"one variant. Give these to an optimizer of their own, such as torch.optim.AdamW, or leave {name} out."
        )


def check_weights(group: Mapping[str, Any]) -> None:
    """Refuse, before a step, weights and gradients of which no matrices can be made; looks at no values.

    Raises:
        ConfigError: naming the weight and the way out.
    """
    # Few calls for each weight, in each step: a sparse gradient is always ``grad``.
    for index, param in enumerate(group["params"]):
        layout = getattr(param, LAYOUT_ATTRIBUTE, WHOLE)
        dims = 3 if layout.stacked and not layout.turns else 2
        if param.ndim != dims:
            raise ConfigError(f"{name_of(group, index)} {no_matrix(param, dims)}")
        if param.dtype not in DTYPES:
            raise ConfigError(
                f"{name_of(group, index)} is of {param.dtype}, and Muon updates real numbers of 16 bits and more."
            )
        if (grad := param.grad) is not None and grad.layout is not torch.strided:
            raise ConfigError(
                f"{name_of(group, index)} has a sparse gradient, and Muon updates dense ones: make it dense "
                "(sparse=False of the layer), or give the weight to torch.optim.SparseAdam."
            )


def no_matrix(param: torch.Tensor, dims: int) -> str:
    """That a weight is of the wrong number of dimensions, to follow its name."""
    way_out = "give it to Adam."
    if param.dim() == 1:
        way_out = (
            "give vectors to Adam. A part of a flattened weight, as FSDP1 (FullyShardedDataParallel) and DeepSpeed's "
            "ZeRO make them, is no matrix: use fully_shard (FSDP2), or DDP."
        )
    return f"has shape {sizes(param.shape)}, and Muon updates {dims}-D weights: {way_out}"


def name_of(group: Mapping[str, Any], index: int) -> str:
    """What messages call a weight of a group: its name, where ``named_parameters()`` was given."""
    names = group.get("param_names", ())
    return names[index] if index < len(names) else f"weight {index} of its param group"


def check_numbers(group: Mapping[str, Any], *, read: bool = True) -> None:
    """Refuse wrong values of the options that every group has.

    Args:
        group: the options.
        read: whether to look at what tensors on a GPU hold, for which the host waits.

    Raises:
        ConfigError: naming option, value and way out.
    """
    for name in _NOT_NEGATIVE:
        value: Any = group.get(name)
        unseen = isinstance(value, torch.Tensor) and not read and value.device.type != "cpu"
        if not is_number(value) or not (unseen or -_ROUNDING <= value < math.inf):
            raise ConfigError(f"{name} {shown(value)}: give a finite number of at least 0")
    momentum: Any = group.get("momentum")
    if not _is_real(momentum) or not 0.0 <= float(momentum) < 1.0:
        raise ConfigError(f"momentum {shown(momentum)}: give a number from 0 to below 1 (0.95 is usual)")
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
    """Whether a value is a real number (True is none), or a tensor of one element."""
    return _is_real(value) or (isinstance(value, torch.Tensor) and value.numel() == 1)


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
