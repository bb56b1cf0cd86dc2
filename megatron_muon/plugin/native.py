"""Megatron-LM with our git patches (``patches/``): which hooks it needs no more, and how its extension points are met.

Read from the sources, so that :func:`installed <megatron_muon.plugin.install>` can be told without an import.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megatron_muon._patching import Patch

_OPTIMIZER = "megatron.core.optimizer"
_LAYER_WISE = f"{_OPTIMIZER}.layer_wise_optimizer:LayerWiseDistributedOptimizer"
_TE_ATTENTION = "megatron.core.extensions.transformer_engine:TEDotProductAttention"

_FIXED_BY = {
    "megatron.core.datasets.utils:compile_helpers": "find_spec",
    "megatron.core.distributed.param_and_grad_buffer:partition_buckets": "_split_by_optimizer",
    f"{_LAYER_WISE}.save_state_dict_to_file": "_file_of_this_rank",
    f"{_LAYER_WISE}.load_state_dict_from_file": "_file_of_this_rank",
}
"""What is in the source of a function that does without its hook, after a git patch that stands alone."""


def for_points(patches: Iterable[Patch]) -> list[Patch]:
    """The hooks, with what differs where Megatron-LM has our git patches."""
    return [_for_point(patch) for patch in patches]


def _for_point(patch: Patch) -> Patch:
    if patch.target in _FIXED_BY:
        return dataclasses.replace(patch, fixed_by=_FIXED_BY[patch.target])
    if patch.target in _AT_POINTS:
        point, translate = _AT_POINTS[patch.target]
        return dataclasses.replace(patch, point=point, make_at_point=functools.partial(translate, patch.make))
    return patch


def _as_function(make: Callable[[Any], Any], original: Callable[[], Any]) -> Callable[[], Any]:
    """For a function that returns what the hook replaces. Asked each time: others may have added to it."""

    @functools.wraps(original)
    def value() -> Any:
        return make(original())

    return value


def _as_constructor(make: Callable[[Any], Any], original: Callable[..., None]) -> Callable[..., None]:
    """For the constructor of a class that the hook derives from, in order to give it another ``config``."""

    class Receiver:
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            self.config = config

    derived = make(Receiver)

    @functools.wraps(original)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, derived(config, *args, **kwargs).config, *args, **kwargs)

    return __init__


_AT_POINTS = {
    f"{_OPTIMIZER}.emerging_optimizers:_EMERGING_OPTIMIZERS": (
        f"{_OPTIMIZER}.emerging_optimizers:get_emerging_optimizers",
        _as_function,
    ),
    _TE_ATTENTION: (f"{_TE_ATTENTION}.__init__", _as_constructor),
}
"""Extension points are functions; these hooks replace a dictionary and a class."""


def hook_of(point: str) -> str:
    """The target of the hook that an extension point is for: the same, but for :data:`_AT_POINTS`."""
    return next((target for target, (name, _) in _AT_POINTS.items() if name == point), point)


def native_targets(patches: Iterable[Patch]) -> list[str]:
    """Targets, each once, whose hooks the Megatron-Core on the path does not need.

    Empty if there is none on the path.
    """
    patches = list(patches)
    points = {name for module in {patch.module for patch in patches} for name in _points_in(module)}
    native = [
        patch.target
        for patch in patches
        if (patch.point or patch.target) in points or (patch.fixed_by is not None and _is_fixed(patch))
    ]
    return list(dict.fromkeys(native))


def _source_of(module: str) -> str:
    """The text of a module of Megatron-Core, without its import; empty if there is none."""
    try:
        root = importlib.util.find_spec("megatron")
    except (ImportError, ValueError):
        return ""
    relative = module.split(".")[1:]
    for folder in (root.submodule_search_locations if root is not None else None) or ():
        # The first folder that has the package hides the others.
        if (Path(folder) / relative[0] / "__init__.py").is_file():
            stem = Path(folder, *relative)
            for file in (stem.with_suffix(".py"), stem / "__init__.py"):
                if file.is_file():
                    return file.read_text()
            return ""
    return ""


_POINT = re.compile(
    r"^(?P<indent> *)@extension_point\n(?: *@.*\n)* *(?:async )?def (?P<function>\w+)"
    r"|^(?P<made>\w+\.\w+) = extension_point\("
    r"|^ *class (?P<class>\w+)",
    re.MULTILINE,
)


def _points_in(module: str) -> list[str]:
    """The extension points of a module, as targets."""
    text = _source_of(module)
    if "extension_point" not in text:
        return []
    found, owner = [], ""
    for match in _POINT.finditer(text):
        if match["class"]:
            owner = match["class"]
        elif match["made"]:
            found.append(f"{module}:{match['made']}")
        else:
            found.append(
                f"{module}:{owner}.{match['function']}" if match["indent"] else f"{module}:{match['function']}"
            )
    return found


def _is_fixed(patch: Patch) -> bool:
    """Whether the source of the target has the word that tells of the fix."""
    name = patch.path.rpartition(".")[2]
    body = re.search(rf"^( *)def {name}\(.*\n(?:\1[ )].*\n|\n)*", _source_of(patch.module), re.MULTILINE)
    return body is not None and str(patch.fixed_by) in body[0]
