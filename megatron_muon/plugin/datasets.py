"""Megatron-Core's dataset helpers on the released wheel."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

from megatron_muon._patching import Patch

__all__ = ["patches"]


def patches() -> list[Patch]:
    """The hook on the compilation of the helpers."""
    return [
        Patch(
            "megatron.core.datasets.utils:compile_helpers",
            _where_missing,
            "the wheel ships the compiled helpers and no Makefile, so that compiling them would end the process",
        )
    ]


def _where_missing(original: Callable[[], None]) -> Callable[[], None]:
    @functools.wraps(original)
    def compile_helpers() -> None:
        if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
            original()

    return compile_helpers
