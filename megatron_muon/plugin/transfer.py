"""Learning rates, weight decay and eps by weight, and initial weights: what ``--muon-transfer``, Megatron's
``--use-mup``, ``--muon-scalar-lr`` and ``--muon-scalar-weight-decay-method`` make of Megatron-Core's param groups."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_muon._patching import Original, Patches
from megatron_muon.config import PREFIX, MuonConfig, flag
from megatron_muon.errors import ConfigError
from megatron_muon.plugin import options
from megatron_muon.plugin.optimizer_config import is_ours
from megatron_muon.routing.annotate import global_names
from megatron_muon.routing.predicate import _is_nonlinear_or_embedding
from megatron_muon.transfer import BASE_ATTRIBUTE, KINDS, Role, Transfer, roles, scale_initialization

PATCHES = Patches()

Override = dict[str, float]


@PATCHES.around(
    "megatron.core.optimizer:get_mup_config_overrides",
    "--use-mup: Megatron-Core looks for 'muon' in the optimizer's name, and for 'adam' before it scales eps",
)
def _with_rule_of_adam(original: Original, config: Any, mup_width_mult: float, optimizer_type: str = "adam") -> Any:
    """muP (arXiv 2203.03466): rates and eps of the scalar optimizer's matrices are divided by the width.

    Those of Muon's are not: the size of its updates follows from the scale mode, not from the width of a sum.
    """
    if not is_ours(optimizer_type):
        return original(config, mup_width_mult, optimizer_type)
    muon = MuonConfig.from_optimizer_config(config)
    if muon.scalar_lr and config.lr:
        factor, config = muon.scalar_lr / config.lr, copy.copy(config)
        config.lr, config.min_lr = muon.scalar_lr, (config.min_lr or 0.0) * factor
    # It asks which words are in the name. Both are: Adam's rule, but not for the weights that Muon has.
    return original(config, mup_width_mult, f"{muon.scalar_optimizer}_muon")


@PATCHES.around(
    "megatron.training.argument_utils:core_transformer_config_from_args",
    "--muon-transfer: initial weights fit the size of the model",
)
def _with_scaled_initialization(original: Original, args: Any, *rest: Any, **kwargs: Any) -> Any:
    config = original(args, *rest, **kwargs)
    if base := getattr(args, PREFIX + "transfer", options.current().transfer):
        scale_initialization(config, base)
    return config


@PATCHES.around(
    "megatron.core.models.common.language_module.language_module:LanguageModule.setup_embeddings_and_output_layer",
    "--muon-transfer: the output layer starts smaller than hidden layers; Megatron-Core gives both one method",
)
def _with_scaled_readout(original: Original, self: Any) -> None:
    base = getattr(self.config, BASE_ATTRIBUTE, "")
    layer = getattr(self, "output_layer", None)
    weight = None if self.share_embeddings_and_output_weights else getattr(layer, "weight", None)
    if base and weight is not None:
        with torch.no_grad():
            weight.mul_(Transfer.of(base, self.config).width ** -0.5)
    original(self)


def transfer_of(muon: MuonConfig, model_chunks: Sequence[torch.nn.Module]) -> Transfer | None:
    """The sizes of the model against those of ``--muon-transfer``; None without the flag.

    Raises:
        ConfigError: if the model was built without initial weights that fit.
    """
    if not muon.transfer:
        return None
    from megatron.core.utils import get_model_config

    config = get_model_config(model_chunks[0])
    found = Transfer.of(muon.transfer, config)
    scaled = getattr(config, BASE_ATTRIBUTE, "")
    if scaled != muon.transfer:
        raise ConfigError(
            f"{flag('transfer')} {muon.transfer}: the model was built with initial weights "
            + (f"for {scaled}" if scaled else "that do not fit its size")
            + f". Call megatron_muon.transfer.scale_initialization(config, {muon.transfer!r}) before it is built."
        )
    return found


def group_overrides(
    config: Any, muon: MuonConfig, model_chunks: Sequence[torch.nn.Module], others: Mapping[Any, Any]
) -> dict[Any, Any]:
    """Megatron's overrides for the param groups.

    Args:
        config: the ``OptimizerConfig``, checked.
        muon: its options.
        model_chunks: with routes on their weights.
        others: the overrides that there are already. A weight whose rate one of them sets (``--decoupled-lr``) keeps
            it.

    Raises:
        ConfigError: for two rules for one thing.
    """
    if not (muon.transfer or muon.scalar_lr or muon.scalar_weight_decay_method != "decoupled"):
        return {}
    transfer = transfer_of(muon, model_chunks)
    found: dict[tuple[tuple[str, float], ...], set[torch.nn.Parameter]] = {}
    for chunk in model_chunks:
        known = {} if transfer is None else roles(chunk, global_names(chunk))
        for name, param in chunk.named_parameters():  # the names that Megatron's keys are matched with
            taken = [override for key, override in others.items() if "max_lr" in override and key.matches(param, name)]
            rate = taken[0]["max_lr"] if taken else None
            override = _override(config, muon, transfer, param, known.get(param), rate)
            _check_conflicts(name, param, override, others)
            found.setdefault(tuple(sorted(override.items())), set()).add(param)
    return {_key(number, params): dict(override) for number, (override, params) in enumerate(found.items()) if override}


def _check_conflicts(name: str, param: torch.nn.Parameter, override: Override, others: Mapping[Any, Any]) -> None:
    """Refuse what Megatron-Core would call a conflict without saying between what."""
    for key, other in others.items():
        both = sorted(override.keys() & other.keys())
        if both and key.matches(param, name):
            raise ConfigError(
                f"{name}: {flag('transfer')} (or {flag('scalar_weight_decay_method')}, {flag('scalar_lr')}) sets "
                f"{', '.join(both)} of its param group, and so does an override of yours. Give one of them."
            )


def _key(number: int, params: set[torch.nn.Parameter]) -> Any:
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

    predicate = ParamWithNamePredicate(name=f"megatron_muon_{number}", fn=lambda param, name: param in params)
    return ParamKey(with_name_predicate=predicate)


def _override(
    config: Any,
    muon: MuonConfig,
    transfer: Transfer | None,
    param: torch.nn.Parameter,
    role: Role | None,
    rate: float | None,
) -> Override:
    """What is particular about one weight's group."""
    scalar = _is_nonlinear_or_embedding(param)
    override: Override = {}
    factor = muon.scalar_lr / config.lr if scalar and muon.scalar_lr else 1.0
    if transfer is not None and role is not None:
        factor *= transfer.rate(role) if scalar else transfer.branch(role)
        if not scalar:
            override["damping_depth"] = transfer.damping_depth(role)
        elif muon.scalar_optimizer == "adam":
            override["eps"] = config.adam_eps * transfer.eps(role)
    if rate is None and factor != 1.0:
        # "lr" for loops without Megatron's scheduler, which sets it from the other two.
        override["lr"] = override["max_lr"] = config.lr * factor
        override["min_lr"] = (config.min_lr or 0.0) * factor
    static = muon.transfer or muon.scalar_weight_decay_method == "independent_scheduled"
    mark = 0 if role is None else _number(role)
    width = 1.0 if transfer is None else transfer.width
    if scalar and static:
        # AdamW shrinks a weight by its learning rate times this: by the schedule times weight decay / width.
        peak = rate or override.get("max_lr", config.lr)
        override.update(_decay(config.weight_decay / width / peak, mark))
    elif transfer is not None:
        override.update(_decay(config.weight_decay / width, mark))
    return override


def _decay(value: float, mark: int) -> Override:
    """Weight decay, for Megatron's scheduler and for loops that have none.

    Where it loads param groups, Megatron-Core tells them apart by rates and weight decay alone, not by what else we set
    (eps, depth), and would give one group the numbers of another. So groups of different roles differ in digits of
    their weight decay that do not matter: in the twelfth, or by 1e-24 where there is none.
    """
    value = value * (1.0 + mark * 2.0**-40) + mark * 2.0**-80
    return {"start_wd": value, "end_wd": value, "weight_decay": value}


def _number(role: Role) -> int:
    """Another one for each role."""
    return 4 * KINDS.index(role.kind) + 2 * role.in_layer + role.ends_branch


def scalar_numbers(
    config: Any, muon: MuonConfig, model_chunks: Sequence[torch.nn.Module], others: Mapping[Any, Any]
) -> dict[str, float]:
    """Of Muon's param groups, for rows within its weights that follow the scalar optimizer's rule.

    They are rows of input projections, and get what a whole one would get from that optimizer: to the rule of transfer,
    and to overrides of others (muP's, rates of Muon alone), it is a matrix.

    Args:
        config: the ``OptimizerConfig``, checked.
        muon: its options.
        model_chunks: the model.
        others: as of :func:`group_overrides`.
    """
    whole, of_muon = _hidden_matrix(others, scalar=True), _hidden_matrix(others, scalar=False)
    transfer, role = transfer_of(muon, model_chunks), Role("matrix", in_layer=True)
    rate = whole.get("max_lr") or (muon.scalar_lr or config.lr) * (transfer.rate(role) if transfer else 1.0)
    static = transfer is not None or muon.scalar_weight_decay_method == "independent_scheduled"
    return {
        "scalar_lr_mult": rate / (of_muon.get("max_lr") or config.lr) if rate else 1.0,
        "scalar_wd_mult": 1.0 / rate if static else 1.0,
        "scalar_eps": whole.get("eps", config.adam_eps * (transfer.eps(role) if transfer else 1.0)),
    }


def _hidden_matrix(overrides: Mapping[Any, Any], *, scalar: bool) -> dict[str, Any]:
    """What overrides give to the weight of a linear layer that is the scalar optimizer's, or Muon's."""
    weight = torch.nn.Parameter(torch.empty(2, 2))
    weight.skip_orthogonalization = scalar  # type: ignore[attr-defined]
    given = (each for key, each in overrides.items() if key.matches(weight, "linear.weight"))
    return {name: value for each in given for name, value in each.items()}
