"""The check of an ``OptimizerConfig``: code that builds one itself gets the same refusals as the command line."""

from __future__ import annotations

from typing import Any

from megatron_muon.choices import OPTIMIZERS
from megatron_muon.config import UNREAD, MuonConfig
from megatron_muon.refusals import MUON, Chosen, refuse


def is_ours(optimizer: str | None) -> bool:
    """Whether ``--optimizer`` names one of this package's optimizers."""
    return (optimizer or "").removeprefix("dist_") in OPTIMIZERS


def check_optimizer_config(config: Any, *, is_complete: bool = True) -> MuonConfig:
    """Check an ``OptimizerConfig`` for one of our optimizers, knobs and combinations.

    If it is not complete, what has its default counts as not known yet.

    Raises:
        ConfigError: naming flags, values and the way out.
    """
    muon = MuonConfig.from_optimizer_config(config, pairs=False)
    known = (muon.as_settings(), config) if is_complete else (Chosen(config, "optimizer"),)
    refuse((*UNREAD, *MUON), *known)
    return muon
