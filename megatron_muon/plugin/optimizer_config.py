"""An early check of ``OptimizerConfig``.

Code that builds the config itself (NeMo, Megatron-Bridge, own loops) gets the same refusals as the command line.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron_muon._patching import Patch
from megatron_muon.choices import OPTIMIZERS
from megatron_muon.config import UNREAD, MuonConfig
from megatron_muon.refusals import MUON, Chosen, refuse

__all__ = ["check_optimizer_config", "is_ours", "patches"]

_CONFIG = "megatron.core.optimizer.optimizer_config:OptimizerConfig"


def is_ours(optimizer: str | None) -> bool:
    """Whether ``--optimizer`` names one of this package's optimizers."""
    return (optimizer or "").removeprefix("dist_") in OPTIMIZERS


def check_optimizer_config(config: Any, *, is_complete: bool = True) -> MuonConfig:
    """Check an ``OptimizerConfig`` for one of our optimizers, knobs and combinations.

    Args:
        config: the ``OptimizerConfig``.
        is_complete: whether all is set; else what has its default counts as not known yet.

    Raises:
        ConfigError: naming flags, values and the way out.
    """
    muon = MuonConfig.from_optimizer_config(config, pairs=False)
    known = (muon.as_settings(), config) if is_complete else (Chosen(config, "optimizer"),)
    refuse((*UNREAD, *MUON), *known)
    return muon


def patches() -> list[Patch]:
    """The hook on ``OptimizerConfig``'s own check."""
    return [
        Patch(
            f"{_CONFIG}.__post_init__",
            _with_check,
            "a wrong Muon option in an OptimizerConfig is refused when it is built, before the model is",
        ),
    ]


def _with_check(original: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        if is_ours(self.optimizer):
            check_optimizer_config(self, is_complete=False)  # some may be set as attributes later
        original(self)

    return __post_init__
