"""No compilation of Megatron-Core's small functions, and none of C++.

``megatron.core.jit.jit_fuser`` is ``torch.compile``. On the CPU that needs a C++ compiler and seconds per function and
process, for functions that take microseconds. The functions themselves are plain torch. Selective recomputation
compiles an extension in C++, for tens of seconds, which gives an output the memory of what was computed again; here it
is copied.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from operator import attrgetter
from types import ModuleType
from typing import Any

import torch

from megatron_muon._patching import Patch, replace_by

_REASON = "torch.compile takes seconds per function and process on the CPU and gains nothing here"


def _copy_storage(output: torch.Tensor, recomputed: torch.Tensor) -> None:
    """Fill the storage of ``output``, which was given up: below autograd, which counts no change."""
    given, storage = recomputed.untyped_storage(), output.untyped_storage()
    storage.resize_(given.nbytes())
    storage.copy_(given)


PATCHES: list[Patch] = [
    Patch(
        "megatron.core.tensor_parallel.random:_get_share_storage",
        replace_by(lambda: _copy_storage),
        "compiles an extension in C++ when the first output is recomputed, for tens of seconds",
        optional=True,
    ),
    Patch("megatron.core.jit:jit_fuser", replace_by(lambda function: function), _REASON),
    Patch(
        "megatron.training.initialize:set_jit_fusion_options",
        replace_by(lambda *args, **kwargs: None),
        "runs the fused functions at full size to warm up their compilation",
    ),
]


def patches_of_compiled_functions() -> list[Patch]:
    """Patches for the functions and methods of imported Megatron-Core modules that ``jit_fuser`` has decorated."""
    return [
        Patch(f"{module.__name__}:{path}", attrgetter("_torchdynamo_orig_callable"), _REASON)
        for name, module in list(sys.modules.items())
        if name.startswith("megatron.core.") and isinstance(module, ModuleType)
        for path in _compiled_paths(module)
    ]


def _compiled_paths(module: ModuleType) -> Iterator[str]:
    for name, value in vars(module).items():
        if getattr(value, "__module__", None) != module.__name__:
            continue  # imported from elsewhere; it is patched there, and copies follow
        if isinstance(value, type):
            yield from (f"{name}.{member}" for member, function in vars(value).items() if _is_compiled(function))
        elif _is_compiled(value):
            yield name


def _is_compiled(value: Any) -> bool:
    return callable(value) and not isinstance(value, type) and hasattr(value, "_torchdynamo_orig_callable")
