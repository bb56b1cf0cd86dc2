"""This package's entries in Megatron-Core's registry of emerging optimizers."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_muon._patching import Patch
from megatron_muon.config import MuonConfig, flag
from megatron_muon.errors import ConfigError
from megatron_muon.routing.predicate import _is_nonlinear_or_embedding

__all__ = ["patches", "scalar_overrides"]

_PREDICATE = "nonlinear_or_embedding"


def patches() -> list[Patch]:
    """The hook on the registry."""
    return [
        Patch(
            "megatron.core.optimizer.emerging_optimizers:_EMERGING_OPTIMIZERS",
            _with_our_entries,
            "--optimizer muon builds this package's Muon; the entries that stay Megatron's ask the same predicate, "
            "since buffer ownership does",
        )
    ]


def _with_our_entries(original: dict[str, Any]) -> dict[str, Any]:
    from megatron.core.optimizer.emerging_optimizers import EmergingOptimizerEntry
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

    from megatron_muon.optimizers.adaptive import AdaptiveMuon
    from megatron_muon.optimizers.muon import Muon
    from megatron_muon.optimizers.sphere import SpectralSphere

    ours = ParamKey(predicate=ParamPredicate(name=_PREDICATE, fn=_is_nonlinear_or_embedding))

    def with_our_predicate(entry: Any) -> Any:
        overrides = {
            ours if getattr(key.predicate, "name", None) == _PREDICATE else key: value
            for key, value in entry.default_param_overrides.items()
        }
        return dataclasses.replace(entry, default_param_overrides=overrides)

    entries = {name: with_our_predicate(entry) for name, entry in original.items()}
    for name, cls, kwargs in (
        ("muon", Muon, _muon_kwargs),
        ("adaptive_muon", AdaptiveMuon, _adaptive_kwargs),
        ("spectral_sphere", SpectralSphere, _sphere_kwargs),
    ):
        entries[name] = EmergingOptimizerEntry(
            optimizer_cls=cls,
            init_state_fn=_init_state,
            config_to_kwargs=kwargs,
            default_param_overrides={ours: {"optimizer": "adam"}},
        )
    return entries


def _init_state(optimizer: Any, config: Any = None) -> None:
    """Create the state of every parameter: the template by which a checkpoint is read."""
    for group in optimizer.param_groups:
        optimizer._init_group(group, skip_non_grad_params=False)


def scalar_overrides(config: Any, muon: MuonConfig, others: Mapping[Any, Any]) -> dict[Any, Any]:
    """Megatron's override that gives what the scalar optimizer updates its own learning rate (``--muon-scalar-lr``).

    Weights whose rate another override sets (``--decoupled-lr``) keep that.

    Raises:
        ConfigError: if there is no learning rate to scale.
    """
    if not muon.scalar_lr:
        return {}
    if not config.lr:
        raise ConfigError(f"{flag('scalar_lr')} {muon.scalar_lr} without --lr: give --lr, the rate of Muon's weights.")
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

    def is_scalar(param: torch.nn.Parameter, name: str) -> bool:
        taken = any("max_lr" in override and key.matches(param, name) for key, override in others.items())
        return _is_nonlinear_or_embedding(param) and not taken

    key = ParamKey(with_name_predicate=ParamWithNamePredicate(name="muon_scalar_lr", fn=is_scalar))
    min_lr = (config.min_lr or 0.0) * muon.scalar_lr / config.lr
    return {key: {"max_lr": muon.scalar_lr, "min_lr": min_lr}}


@functools.cache
def _knobs() -> list[str]:
    """Knobs that the optimizer itself takes; the others are routing's, the factory's and the monitor's."""
    from megatron_muon.optimizers.muon import Muon

    return [name for name in inspect.signature(Muon.__init__).parameters if name in MuonConfig.__dataclass_fields__]


def _muon_kwargs(config: Any, model_chunks: Sequence[torch.nn.Module], pg_collection: Any) -> dict[str, Any]:
    """Constructor arguments of :class:`megatron_muon.Muon` from Megatron's ``OptimizerConfig``."""
    muon = MuonConfig.from_optimizer_config(config)
    scalar = ("adam_beta1", "adam_beta2") if muon.scalar_optimizer == "adam" else ("lion_beta1", "lion_beta2")
    return {
        **{name: getattr(muon, name) for name in _knobs()},
        "scalar_betas": tuple(getattr(config, name) for name in scalar),
        "scalar_eps": config.adam_eps,
        "scalar_lr_mult": muon.scalar_lr / config.lr if muon.scalar_lr else 1.0,
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "tp_group": pg_collection.tp,
        "expert_tp_group": getattr(pg_collection, "expt_tp", pg_collection.tp),
    }


def _adaptive_kwargs(config: Any, model_chunks: Sequence[torch.nn.Module], pg_collection: Any) -> dict[str, Any]:
    """Those of :class:`megatron_muon.optimizers.adaptive.AdaptiveMuon`: Megatron's own flags, too."""
    return {
        **_kwargs_without_variant(config, model_chunks, pg_collection),
        "moment2_method": config.adaptive_muon_moment2_method,
        "beta2": config.adaptive_muon_beta2,
        "moment2_eps": config.adaptive_muon_eps,
    }


def _sphere_kwargs(config: Any, model_chunks: Sequence[torch.nn.Module], pg_collection: Any) -> dict[str, Any]:
    """Those of :class:`megatron_muon.optimizers.sphere.SpectralSphere`."""
    muon = MuonConfig.from_optimizer_config(config)
    if muon.scalar_optimizer != "adam":
        raise ConfigError(
            f"{flag('scalar_optimizer')} {muon.scalar_optimizer} with --optimizer spectral_sphere: Megatron-Core knows "
            "it for muon and adaptive_muon only; use adam."
        )
    return {
        **_kwargs_without_variant(config, model_chunks, pg_collection),
        "radius": muon.sphere_radius,
        "tolerance": muon.sphere_tolerance,
    }


def _kwargs_without_variant(config: Any, model_chunks: Any, pg_collection: Any) -> dict[str, Any]:
    kwargs = _muon_kwargs(config, model_chunks, pg_collection)
    variant = kwargs.pop("variant")
    if variant != "none":
        raise ConfigError(
            f"{flag('variant')} {variant} with --optimizer {config.optimizer}: these are two variants; give one."
        )
    return kwargs
