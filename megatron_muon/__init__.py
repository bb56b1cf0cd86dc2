"""Muon for Megatron-Core: ``--optimizer muon`` in pretraining scripts, under any parallel layout.

    import megatron_muon
    megatron_muon.install()

or, without touching the script, ``torchrun ... -m megatron_muon run SCRIPT ARGS...``.

Without Megatron, ``optimizer_for(model, lr=1e-3)`` is an optimizer of torch for a whole model, and :class:`Muon` one
for matrices: ``Muon(params, lr=1e-3, variant="normuon")``.
"""

import megatron_muon.leaving  # noqa: F401  before torch is imported: see there
from megatron_muon.config import MuonConfig
from megatron_muon.errors import ConfigError
from megatron_muon.optimizers.adaptive import NAMO, AdaMuon, AdaMuonEO, NorMuon
from megatron_muon.optimizers.joint import JointOptimizer, optimizer_for
from megatron_muon.optimizers.muon import Muon
from megatron_muon.optimizers.registry import register_variant
from megatron_muon.optimizers.sizes import Hyperball, PolarGrad
from megatron_muon.optimizers.sphere import SpectralSphere
from megatron_muon.optimizers.stages import Variant
from megatron_muon.optimizers.stiefel import StiefelMuon
from megatron_muon.options import MuonOptions
from megatron_muon.orthogonalize import Iteration, iteration, newton_schulz
from megatron_muon.orthogonalize.scale import scale_factor
from megatron_muon.plugin import install, is_installed, uninstall
from megatron_muon.plugin.sleeping import sleep, wake
from megatron_muon.plugin.state import StateBytes, reset, state_bytes
from megatron_muon.routing.layout import MatrixLayout, Section
from megatron_muon.routing.partition import ParamGroups, check_partition, param_groups
from megatron_muon.version import __version__

__all__ = [
    "NAMO",
    "AdaMuon",
    "AdaMuonEO",
    "ConfigError",
    "Hyperball",
    "Iteration",
    "JointOptimizer",
    "MatrixLayout",
    "Muon",
    "MuonConfig",
    "MuonOptions",
    "NorMuon",
    "ParamGroups",
    "PolarGrad",
    "Section",
    "SpectralSphere",
    "StateBytes",
    "StiefelMuon",
    "Variant",
    "__version__",
    "check_partition",
    "install",
    "is_installed",
    "iteration",
    "newton_schulz",
    "optimizer_for",
    "param_groups",
    "register_variant",
    "reset",
    "scale_factor",
    "sleep",
    "state_bytes",
    "uninstall",
    "wake",
]
