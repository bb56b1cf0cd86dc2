"""Megatron-Core's dataset helpers on the released wheel."""

from __future__ import annotations

import importlib.util

from megatron_muon._patching import Original, Patches

PATCHES = Patches()


@PATCHES.around(
    "megatron.core.datasets.utils:compile_helpers",
    "the wheel ships the compiled helpers and no Makefile, so that compiling them would end the process",
)
def _where_missing(original: Original) -> None:
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        original()
