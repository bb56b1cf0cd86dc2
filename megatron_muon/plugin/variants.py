"""What variants do not go with, in a model, and what a run says of its variant."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from megatron_muon.config import SECOND_MOMENT, MuonConfig, flag
from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.registry import variant_asked_for
from megatron_muon.optimizers.sphere import evaluations
from megatron_muon.orthogonalize.coefficients import MADE_FOR
from megatron_muon.plugin import options
from megatron_muon.routing.predicate import _is_nonlinear_or_embedding
from megatron_muon.routing.rules.linear import LORA_FACTOR

_SPHERE, _ADAPTIVE = "spectral_sphere", "adaptive_muon"


def check_adapters(named_parameters: Iterable[tuple[str, torch.nn.Parameter]], settings: Any, muon: MuonConfig) -> None:
    """Refuse factors of LoRA among weights that keep their norm: B starts from zeros, and must grow.

    Args:
        named_parameters: with routes on them.
        settings: an ``OptimizerConfig`` or parsed arguments.
        muon: the options in it.

    Raises:
        ConfigError: naming the weight and the way out.
    """
    variant = variant_asked_for(muon.as_settings(), settings)
    if variant.decays:
        return
    for name, param in named_parameters:
        if hasattr(param, LORA_FACTOR) and not _is_nonlinear_or_embedding(param):
            raise ConfigError(
                f"{name}: a factor of a low-rank adapter with {variant.name}, which keeps norms of weights, while B "
                f"must grow from zeros. Give adapters to Adam ({flag('param_rule')} '{name}=adam'; a pattern may stand "
                "for many), or use --optimizer muon."
            )


def blockwise(muon: MuonConfig, tp_size: int) -> str:
    """What is said, before all else, of a run whose tensor-parallel shards are orthogonalized each by itself.

    A framework's recipe that has it by default looks like a user's choice in a config. What was said on the command
    line or to ``install()`` is a choice for certain.
    """
    period, of_mode = muon.blockwise_period, muon.tp_mode == "blockwise"
    if not of_mode and period == 1:
        return ""
    asked, steps, rate, way_out = "muon_tp_mode blockwise", "", "", "auto gives"
    if not of_mode:
        asked, steps = f"muon_blockwise_period {period}", f" in all but every {period}. step"
        rate, way_out = f", at {muon.blockwise_lr_mult:g} x the learning rate", "Leave it out for"
    lines = [
        f"{asked} is another optimizer than Muon on one device: each tensor-parallel shard is",
        f"orthogonalized by itself{steps}, so that it changes with the tensor-parallel size (now {tp_size}), and scale",
        f"factors are those of the shards{rate}. {way_out} the same update at every size.",
    ]
    if tp_size == 1:
        lines = [
            f"{asked}: plain Muon while the tensor-parallel size is 1. Resumed at another size,",
            f"this run would go on with another optimizer. {way_out} the same update at every size.",
        ]
    if of_mode and options.current().tp_mode != "blockwise":
        lines += [
            "Neither the command line nor install() asks for it: the OptimizerConfig has it. Recipes and argument",
            "classes of Megatron-Bridge, ms-swift and verl set it by default. There, set muon_tp_mode to auto.",
        ]
    frame = "*" * 120 + "\n"
    return f"{frame}{'\n'.join(f'WARNING {line}' for line in lines)}\n{frame}"


def describe(settings: Any, muon: MuonConfig) -> list[str]:
    """What the run does to matrices, in words, for the report.

    Args:
        settings: an ``OptimizerConfig`` or parsed arguments.
        muon: the options in it.
    """
    name = settings.optimizer.removeprefix("dist_")
    decays = variant_asked_for(muon.as_settings(), settings).decays
    made_for = MADE_FOR.get(muon.coefficient_type, muon.num_ns_steps)
    note = "" if made_for == muon.num_ns_steps else f" (the set is made for {made_for})"
    lines = [
        f"Newton-Schulz: {muon.num_ns_steps} steps{note}, {muon.coefficient_type} coefficients; {_size(name, muon)}",
        f"momentum {muon.momentum:g}{', Nesterov' if muon.nesterov else ''}; "
        + (f"weight decay {muon.weight_decay_method}" if decays else "no weight decay of what keeps its norm"),
    ]
    if name == _ADAPTIVE:
        method, beta2, eps = (getattr(settings, field) for field in SECOND_MOMENT)
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
    variant = f"{muon.variant}; " if muon.variant != "none" else ""
    return f"{variant}update scale {muon.scale_mode} x {muon.extra_scale_factor:g}"
