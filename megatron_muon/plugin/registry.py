"""This package's entries in Megatron-Core's registry of emerging optimizers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from megatron_muon._patching import Patches
from megatron_muon.choices import OPTIMIZERS
from megatron_muon.config import MuonConfig
from megatron_muon.options import UpdateKnobs
from megatron_muon.plugin.transfer import transfer_of
from megatron_muon.routing.predicate import _is_nonlinear_or_embedding

PATCHES = Patches()

_PREDICATE = "nonlinear_or_embedding"


@PATCHES.making(
    "megatron.core.optimizer.emerging_optimizers:_EMERGING_OPTIMIZERS",
    "--optimizer muon builds this package's Muon; the entries that stay Megatron's ask the same predicate, "
    "since buffer ownership does",
)
def _with_our_entries(original: dict[str, Any]) -> dict[str, Any]:
    from megatron.core.optimizer.emerging_optimizers import EmergingOptimizerEntry
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

    from megatron_muon.optimizers.muon import Muon

    ours = ParamKey(predicate=ParamPredicate(name=_PREDICATE, fn=_is_nonlinear_or_embedding))

    def with_our_predicate(entry: Any) -> Any:
        overrides = {
            ours if getattr(key.predicate, "name", None) == _PREDICATE else key: value
            for key, value in entry.default_param_overrides.items()
        }
        return dataclasses.replace(entry, default_param_overrides=overrides)

    entries = {name: with_our_predicate(entry) for name, entry in original.items()}
    for name in OPTIMIZERS:
        entries[name] = EmergingOptimizerEntry(
            optimizer_cls=Muon,
            init_state_fn=_init_state,
            config_to_kwargs=_muon_kwargs,
            default_param_overrides={ours: {"optimizer": "adam"}},
        )
    return entries


def _init_state(optimizer: Any, config: Any = None) -> None:
    """Create the state of every parameter: the template by which a checkpoint is read."""
    for group in optimizer.param_groups:
        optimizer._init_group(group, skip_non_grad_params=False)


def _muon_kwargs(config: Any, model_chunks: Sequence[torch.nn.Module], pg_collection: Any) -> dict[str, Any]:
    """Constructor arguments of :class:`megatron_muon.Muon` from Megatron's ``OptimizerConfig``."""
    from megatron.core.utils import get_model_config

    from megatron_muon.optimizers.registry import variant_asked_for

    muon = MuonConfig.from_optimizer_config(config)
    transfer = transfer_of(muon, model_chunks)
    # Elementwise, after Newton-Schulz: sqrt(m n) grows with the width (arXiv 2512.05620, table 2).
    scaled = {"adaptive_muon_eps": config.adaptive_muon_eps / (1.0 if transfer is None else transfer.width)}
    scalar = ("adam_beta1", "adam_beta2") if muon.scalar_optimizer == "adam" else ("lion_beta1", "lion_beta2")
    return {
        **{field.name: getattr(muon, field.name) for field in dataclasses.fields(UpdateKnobs)},
        "momentum": muon.momentum,
        "nesterov": muon.nesterov,
        "variant": variant_asked_for(scaled, muon.as_settings(), config),
        "scalar_betas": tuple(getattr(config, name) for name in scalar),
        "damping_depth": 0.0 if transfer is None else 1.0,
        "hidden_size": get_model_config(model_chunks[0]).hidden_size,
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "tp_group": pg_collection.tp,
        "expert_tp_group": getattr(pg_collection, "expt_tp", pg_collection.tp),
    }
