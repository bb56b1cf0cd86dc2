"""Frameworks that move what Adam has to the host, and leave Muon's state on the GPU: here they move all of it.

The hooks are of functions of theirs, which are found when the framework is imported; in a version that has none by that
name nothing is hooked, and its passes leave what ``docs/frameworks.md`` says. A run without Muon is as ever.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from megatron_muon._patching import Original, Patch, PatchSet, around
from megatron_muon.plugin.sleeping import sleep, wake

_MODULES = ("verl.utils.megatron_utils", "swift.megatron.trainers.utils")


def _offload(original: Original, optimizers: Any, *args: Any, **kwargs: Any) -> Any:
    for optimizer in _ours(optimizers):
        sleep(optimizer)
    return original(optimizers, *args, **kwargs)  # finds everything where it would bring it


def _load(original: Original, optimizers: Any, *args: Any, **kwargs: Any) -> Any:
    for optimizer in _ours(optimizers):
        wake(optimizer)
    return original(optimizers, *args, **kwargs)


def _ours(optimizers: Any) -> Iterator[Any]:
    """Those that :func:`megatron_muon.plugin.sleeping.give_calls` has given calls."""
    for each in optimizers if isinstance(optimizers, (list, tuple)) else (optimizers,):
        call = getattr(each, "sleep", None)
        if isinstance(call, functools.partial) and call.func is sleep:
            yield each


PATCHES = PatchSet(
    "megatron_muon.frameworks",
    [
        Patch(f"{module}:{name}", around(wrapper), "it knows what Adam keeps, and leaves Muon's state", optional=True)
        for module in _MODULES
        for name, wrapper in (("offload_megatron_optimizer", _offload), ("load_megatron_optimizer", _load))
    ],
)
