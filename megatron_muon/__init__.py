"""Muon for Megatron-Core: ``--optimizer muon`` in pretraining scripts, under any parallel layout.

    import megatron_muon
    megatron_muon.install()

or, without touching the script, ``torchrun ... -m megatron_muon run SCRIPT ARGS...``.
"""

import megatron_muon.leaving  # noqa: F401  before torch is imported: see there
from megatron_muon.config import MuonConfig
from megatron_muon.errors import ConfigError
from megatron_muon.options import MuonOptions
from megatron_muon.plugin import install, is_installed, uninstall
from megatron_muon.version import __version__

__all__ = [
    "AdaptiveMuon",
    "ConfigError",
    "Muon",
    "MuonConfig",
    "MuonOptions",
    "ParamGroups",
    "StateBytes",
    "__version__",
    "check_partition",
    "install",
    "is_installed",
    "param_groups",
    "reset",
    "sleep",
    "state_bytes",
    "uninstall",
    "wake",
]


def __getattr__(name: str) -> object:
    # These import torch, which takes seconds; the command line's --help does without.
    if name == "Muon":
        from megatron_muon.optimizers.muon import Muon

        return Muon
    if name == "AdaptiveMuon":
        from megatron_muon.optimizers.adaptive import AdaptiveMuon

        return AdaptiveMuon
    if name in ("ParamGroups", "check_partition", "param_groups"):
        from megatron_muon.routing import partition

        return getattr(partition, name)
    if name in ("StateBytes", "reset", "sleep", "state_bytes", "wake"):
        from megatron_muon.plugin import state

        return getattr(state, name)
    raise AttributeError(f"module 'megatron_muon' has no attribute {name!r}")
