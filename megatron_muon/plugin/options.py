"""The options in force before an ``OptimizerConfig`` is at hand.

DDP lays out its buffers, and GatedDeltaNet is built, before Megatron-Core shows anybody the optimizer's config. Weights
are tagged then by the options of the command line, or of ``install()``; the optimizer factory compares them with its
config's.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from megatron_muon.config import MuonConfig

__all__ = ["current", "set_current", "training_arguments", "without_refusal"]

_current = MuonConfig()


def current() -> MuonConfig:
    """The options in force."""
    return _current


def without_refusal() -> MuonConfig:
    """The options in force, but weights that no rule knows are Muon's and stop nothing.

    When DDP is built nobody knows yet which optimizer will come: Megatron's other matrix optimizers take such weights,
    and for Muon the optimizer factory refuses them, on all ranks at once.
    """
    options = current()
    return dataclasses.replace(options, unknown_2d="muon") if options.unknown_2d == "error" else options


def set_current(options: MuonConfig | None) -> None:
    """Set the options in force; None sets the defaults."""
    global _current
    _current = options or MuonConfig()


def training_arguments() -> Any:
    """The arguments of ``megatron.training``; None in code that has none."""
    module = sys.modules.get("megatron.training.global_vars")
    return None if module is None else module._GLOBAL_ARGS
