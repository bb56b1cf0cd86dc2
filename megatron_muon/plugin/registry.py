"""This package's entries in Megatron-Core's registry of emerging optimizers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from megatron_muon._patching import Patch
from megatron_muon.config import MuonConfig
from megatron_muon.routing.predicate import _is_nonlinear_or_embedding

__all__ = ["patches"]

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

    from megatron_muon.optimizers.muon import Muon

    ours = ParamKey(predicate=ParamPredicate(name=_PREDICATE, fn=_is_nonlinear_or_embedding))

    def with_our_predicate(entry: Any) -> Any:
        overrides = {
            ours if getattr(key.predicate, "name", None) == _PREDICATE else key: value
            for key, value in entry.default_param_overrides.items()
        }
        return dataclasses.replace(entry, default_param_overrides=overrides)

    entries = {name: with_our_predicate(entry) for name, entry in original.items()}
    entries["muon"] = EmergingOptimizerEntry(
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
    muon = dataclasses.asdict(MuonConfig.from_optimizer_config(config))
    del muon["scalar_optimizer"], muon["log_jsonl"]  # the factory's and the monitor's business
    return {
        **muon,
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "tp_group": pg_collection.tp,
        "expert_tp_group": getattr(pg_collection, "expt_tp", pg_collection.tp),
    }
