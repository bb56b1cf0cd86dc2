"""Which options which optimizer reads, what does not go together, and what a run says of its variant."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import torch

from megatron_muon.config import PREFIX, MuonConfig, flag, parse_param_rule
from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.sphere import evaluations
from megatron_muon.routing.layout import BALLS, STIEFEL
from megatron_muon.routing.predicate import _is_nonlinear_or_embedding
from megatron_muon.routing.rules.linear import LORA_FACTOR

__all__ = ["ADAPTIVE_FIELDS", "check_adapters", "check_other_optimizer", "check_variant", "describe"]

_SPHERE, _STIEFEL, _ADAPTIVE = "spectral_sphere", "stiefel_muon", "adaptive_muon"

_READERS = {
    "sphere_radius": _SPHERE,
    "sphere_tolerance": _SPHERE,
    "stiefel_solver": _STIEFEL,
    "stiefel_iterations": _STIEFEL,
    "stiefel_radius": _STIEFEL,
}
"""Knob -> the only optimizer that reads it."""

ADAPTIVE_FIELDS = ("adaptive_muon_moment2_method", "adaptive_muon_beta2", "adaptive_muon_eps")
"""Fields of Megatron-Core's ``OptimizerConfig`` that ``adaptive_muon`` alone reads."""

_BEYOND_MUON = ("transfer", "scalar_lr", "scalar_weight_decay_method")
"""Knobs about what the scalar optimizer updates, beside Muon."""

DEFAULTS = MuonConfig()


def check_variant(settings: Any, muon: MuonConfig) -> None:
    """Refuse options that the optimizer would not read, and rules that it cannot follow.

    Args:
        settings: an ``OptimizerConfig`` or parsed arguments, of one of this package's optimizers.
        muon: the options in it.

    Raises:
        ConfigError: naming the flags, the values and the way out.
    """
    name = settings.optimizer.removeprefix("dist_")
    for knob, reader in _READERS.items():
        if name != reader and getattr(muon, knob) != getattr(DEFAULTS, knob):
            raise ConfigError(
                f"{flag(knob)} {getattr(muon, knob)} with --optimizer {name}, which does not read it: it is "
                f"{reader}'s. Leave it away."
            )
    if name != _ADAPTIVE:
        _check_adaptive_fields(settings, name)
    if name != "muon" and muon.variant != DEFAULTS.variant:
        raise ConfigError(
            f"{flag('variant')} {muon.variant} with --optimizer {settings.optimizer}: these are two variants; give one."
        )
    if name in (_SPHERE, _STIEFEL) and muon.scalar_optimizer != DEFAULTS.scalar_optimizer:
        raise ConfigError(
            f"{flag('scalar_optimizer')} {muon.scalar_optimizer} with --optimizer {name}: Megatron-Core knows "
            "it for muon and adaptive_muon only; use adam."
        )
    if name == _SPHERE:
        _check_sphere(muon)
    _check_rules(name, muon)


def _check_adaptive_fields(settings: Any, name: str) -> None:
    from megatron.core.optimizer import OptimizerConfig

    defaults = {field.name: field.default for field in fields(OptimizerConfig)}
    for field in ADAPTIVE_FIELDS:
        value = getattr(settings, field, defaults[field])
        if value != defaults[field]:
            raise ConfigError(
                f"--{field.replace('_', '-')} {value} with --optimizer {name}, which has no second moments: use "
                "--optimizer adaptive_muon, or leave it away."
            )


def _check_sphere(muon: MuonConfig) -> None:
    for knob, why in (
        ("scale_mode", "the radius decides about the size of updates"),
        ("extra_scale_factor", "the radius decides about the size of updates"),
        ("weight_decay_method", "weights keep their norm, and do not decay"),
    ):
        value = getattr(muon, knob)
        if value != getattr(DEFAULTS, knob):
            raise ConfigError(
                f"{flag(knob)} {value} with --optimizer {_SPHERE}: {why}. Leave it away "
                f"({flag('sphere_radius')} is the radius)."
            )


def _check_rules(name: str, muon: MuonConfig) -> None:
    keeps = name if name == _SPHERE else muon.variant
    directions = set()
    for rule in muon.param_rule:
        _, choice = parse_param_rule(rule)
        directions.add(choice)
        if choice == STIEFEL and name != _STIEFEL:
            raise ConfigError(
                f"{flag('param_rule')} '{rule}' with --optimizer {name}: use --optimizer {_STIEFEL}, or another choice."
            )
        if choice in BALLS and keeps in (_SPHERE, "hyperball"):
            raise ConfigError(
                f"{flag('param_rule')} '{rule}' with {keeps}, which has no weight decay: such a weight would leave its "
                "ball. Give it to Adam, or use --optimizer muon."
            )
    if muon.ball_radius != DEFAULTS.ball_radius and not directions & set(BALLS):
        raise ConfigError(
            f"{flag('ball_radius')} {muon.ball_radius} without a weight that reads it: give some to "
            f"{', '.join(BALLS)} with {flag('param_rule')} 'GLOB=CHOICE', or leave it away."
        )


def check_other_optimizer(settings: Any) -> None:
    """Refuse options that would seem to act on an optimizer that is not this package's.

    Args:
        settings: parsed arguments.

    Raises:
        ConfigError: naming the flag and the way out.
    """
    for knob in _BEYOND_MUON:
        value = getattr(settings, PREFIX + knob, getattr(DEFAULTS, knob))
        if value != getattr(DEFAULTS, knob):
            raise ConfigError(
                f"{flag(knob)} {value} with --optimizer {settings.optimizer}: it acts on what is updated beside Muon. "
                "Use --optimizer muon, or leave it away."
            )


def check_adapters(named_parameters: Iterable[tuple[str, torch.nn.Parameter]], settings: Any, muon: MuonConfig) -> None:
    """Refuse factors of LoRA among weights that keep their norm: B starts from zeros, and must grow.

    Args:
        named_parameters: with routes on them.
        settings: an ``OptimizerConfig`` or parsed arguments.
        muon: the options in it.

    Raises:
        ConfigError: naming the weight and the way out.
    """
    keeps = _SPHERE if settings.optimizer.removeprefix("dist_") == _SPHERE else muon.variant
    if keeps not in (_SPHERE, "hyperball"):
        return
    for name, param in named_parameters:
        if hasattr(param, LORA_FACTOR) and not _is_nonlinear_or_embedding(param):
            raise ConfigError(
                f"{name}: a factor of a low-rank adapter with {keeps}, which keeps norms of weights, while B must "
                f"grow from zeros. Give adapters to Adam ({flag('param_rule')} '{name}=adam'; a pattern may stand for "
                "many), or use --optimizer muon."
            )


def describe(settings: Any, muon: MuonConfig) -> list[str]:
    """What the run does to matrices, in words, for the report.

    Args:
        settings: an ``OptimizerConfig`` or parsed arguments.
        muon: the options in it.
    """
    name = settings.optimizer.removeprefix("dist_")
    keeps = name == _SPHERE or muon.variant == "hyperball"
    decay = f"weight decay {settings.weight_decay} ({muon.weight_decay_method})"
    lines = [
        f"Newton-Schulz: {muon.num_ns_steps} steps, {muon.coefficient_type} coefficients; {_size(name, muon)}",
        f"momentum {muon.momentum:g}{', Nesterov' if muon.nesterov else ''}; "
        + (f"learning rate {settings.lr}, " if settings.lr is not None else "")
        + ("no weight decay of what keeps its norm" if keeps else decay),
    ]
    if name == _ADAPTIVE:
        method, beta2, eps = (getattr(settings, field) for field in ADAPTIVE_FIELDS)
        lines.append(f"second moments: {method}, beta2 {beta2:g}, eps {eps:g}")
    if name == _SPHERE:
        number = evaluations(muon.sphere_tolerance)
        lines.append(
            f"spectral sphere: tolerance {muon.sphere_tolerance:g}, {number} "
            + ("iterations of Newton-Schulz a step" if number > 1 else "iteration, without the multiplier (MuonSphere)")
        )
    return lines


def _size(name: str, muon: MuonConfig) -> str:
    if name == _SPHERE:
        radius = f"{muon.sphere_radius:g} sqrt(m / n)" if muon.sphere_radius else "the norm of each at the start"
        return f"weights are kept at spectral norm {radius}, and move by learning rate x that"
    if muon.variant == "hyperball":
        return "hyperball: weights keep their Frobenius norm, and move by learning rate x that"
    variant = f"{muon.variant}; " if muon.variant != DEFAULTS.variant else ""
    return f"{variant}update scale {muon.scale_mode} x {muon.extra_scale_factor:g}"
