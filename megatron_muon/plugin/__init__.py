"""The hooks into Megatron-Core. No other package but ``cpu`` knows its internals.

Each file holds the hooks of one subject in ``PATCHES``; :func:`install` applies them all. In a Megatron-LM
with the git patches of ``patches/`` they are given to its extension points, and :func:`load` needs no call.
"""

from __future__ import annotations

import dataclasses
import os
import threading

from megatron_muon._patching import Patch, PatchSet
from megatron_muon.config import MuonConfig
from megatron_muon.plugin import (
    arguments,
    building,
    checkpoint_files,
    checkpoint_writers,
    checkpointing,
    config_fields,
    datasets,
    expert_scalars,
    factory,
    frameworks,
    layer_wise,
    local_checkpoints,
    logged,
    mimo,
    native,
    options,
    ownership,
    qk_clip,
    recording,
    registry,
    step_graph,
    transfer,
    uneven_buckets,
    without_copies,
    wrapping,
)
from megatron_muon.plugin.telling import TELLING
from megatron_muon.plugin.version import check_megatron_core

__all__ = ["describe", "hooks", "install", "is_installed", "load", "uninstall"]


def _all_patches() -> list[Patch]:
    subjects = (
        config_fields,
        arguments,
        ownership,
        registry,
        transfer,
        factory,
        step_graph,
        layer_wise,
        without_copies,
        expert_scalars,
        wrapping,
        uneven_buckets,
        logged,
        checkpointing,
        checkpoint_files,
        checkpoint_writers,
        local_checkpoints,
        mimo,
        datasets,
        qk_clip,
        recording,
        building,
    )
    return native.for_points(patch for subject in subjects for patch in subject.PATCHES)


_PATCHES = PatchSet("megatron_muon", _all_patches())
_LOCK = threading.RLock()
"""Of threads that install or uninstall at once: none goes on with half of the hooks."""


def install(config: MuonConfig | None = None) -> None:
    """Make Megatron-Core's optimizer factory and command line use this package's Muon.

    May be called any number of times, before or after the import of Megatron-Core; nothing is imported for it. Call it
    before arguments are parsed, the ``OptimizerConfig`` and the model are built. :func:`uninstall` undoes it. Where
    Megatron-LM has extension points for some of the hooks, or needs them no more, only the others are made, and a line
    says so.

    Args:
        config: options other than the defaults. Every ``OptimizerConfig`` that is built afterwards starts from them,
            and so do the flags of ``megatron.training``, and what is asked for before there is a config, such as DDP's
            buffers for the layer-wise optimizer.

    Raises:
        ConfigError: if megatron-core is missing or of a version that these hooks do not fit.
    """
    if config is not None:
        config.validate()
    with _LOCK:
        if not _PATCHES.active:
            check_megatron_core()
            _PATCHES.apply()
            frameworks.PATCHES.apply()
            TELLING.turn(on=True)
            _print_native()
    if config is not None:
        options.take_installed(dataclasses.replace(config))


def uninstall() -> None:
    """Undo :func:`install`: every replaced attribute of Megatron-Core is what it was."""
    with _LOCK:
        frameworks.PATCHES.revert()
        _PATCHES.revert()
        TELLING.turn(on=False)
    options.forget()


def is_installed() -> bool:
    """Whether the hooks are in place."""
    return _PATCHES.active


def load() -> None:
    """What a patched Megatron-LM calls before its first extension point runs, if ``MEGATRON_CORE_PLUGINS`` names us."""
    install()


def describe() -> list[tuple[str, str]]:
    """``(target, reason)`` of every hook; the reason says so where the Megatron-Core on the path needs no hook."""
    found = set(native.native_targets(_PATCHES.patches))
    return [
        (target, f"{reason} (native: nothing is hooked)" if target in found else reason)
        for target, reason in _PATCHES.describe()
    ]


def hooks() -> list[Patch]:
    """All of Megatron-Core's functions that are replaced, in the order of replacement."""
    return list(_PATCHES.patches)


def _print_native() -> None:
    """Say what is native, if anything is, on the first rank."""
    found = native.native_targets(_PATCHES.patches)
    if not found or os.environ.get("RANK", "0") != "0":
        return
    hooked = list(dict.fromkeys(patch.target for patch in _PATCHES.patches if patch.target not in found))
    rest = f"hooked: {', '.join(hooked)}" if hooked else "nothing is hooked"
    print(
        f"megatron_muon: this Megatron-LM has {len(found)} of {len(found) + len(hooked)} hooks natively; {rest}",
        flush=True,
    )
