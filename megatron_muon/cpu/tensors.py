"""``device="cuda"`` and ``Tensor.cuda()`` mean the CPU.

The functions that make or move tensors are wrapped by name, which costs one or two microseconds at each. A
``TorchFunctionMode`` would catch them all, but it puts a Python call around *every* operation (8 % of a training step
of a tiny model, where the wrappers are lost in the noise) and does not reach autograd's threads. In turn, wrappers must
be what they wrap where it is looked up by identity or name: for TorchScript, pickle and ``with torch.device(...)``.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch.jit import _builtins

from megatron_muon._patching import Original, Patch, Patches

PATCHES = Patches()

CPU = torch.device("cpu")

_FACTORIES = (
    "arange",
    "as_tensor",
    "asarray",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "linspace",
    "logspace",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randint_like",
    "randn",
    "randn_like",
    "randperm",
    "tensor",
    "tril_indices",
    "triu_indices",
    "zeros",
    "zeros_like",
)
_NEW_METHODS = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")


def to_cpu(device: Any) -> Any:
    """The CPU where ``device`` names a GPU (by string, index or ``torch.device``), otherwise ``device`` itself."""
    if isinstance(device, torch.device):
        return CPU if device.type == "cuda" else device
    if isinstance(device, str):
        return CPU if device.startswith("cuda") else device
    return CPU if type(device) is int else device


def _in_place_of(original: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``functools.wraps``, with the names by which pickle finds functions and methods that are written in C."""

    def named(replacement: Callable[..., Any]) -> Callable[..., Any]:
        functools.update_wrapper(replacement, original)
        if not isinstance(original, FunctionType):
            replacement.__module__ = "torch"
            replacement.__qualname__ = f"{'Tensor.' * hasattr(original, '__objclass__')}{original.__name__}"
        return replacement

    return named


@functools.cache  # one for each, for good: TorchScript's table has the id, which must not become another object's
def _wrap_factory(original: Callable[..., Any]) -> Callable[..., Any]:
    """Redirect the keyword ``device`` and drop ``pin_memory``, which needs an accelerator."""

    @_in_place_of(original)
    def factory(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = to_cpu(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return original(*args, **kwargs)

    if (operator := _builtins._find_builtin(original)) is not None:
        _builtins._register_builtin(factory, operator)
    return factory


def _wrap_to(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Tensor.to(device, ...)``, ``Tensor.to(device=...)``."""

    @_in_place_of(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            args = (to_cpu(args[0]), *args[1:])
        elif "device" in kwargs:
            kwargs["device"] = to_cpu(kwargs["device"])
        return original(self, *args, **kwargs)

    return to


def _wrap_type(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Tensor.type()`` answers ``torch.cuda.FloatTensor`` to Megatron-Core, and the truth to everyone else."""

    @_in_place_of(original)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        name = original(self)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return name.replace("torch.", "torch.cuda.", 1) if caller.startswith("megatron.core.") else name

    return type_


def _stay(original: Any) -> Callable[..., Any]:
    @_in_place_of(original)
    def stay(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    return stay


def _forget(original: Any) -> Callable[..., None]:
    @_in_place_of(original)
    def forget(self: Any, *args: Any, **kwargs: Any) -> None:
        pass

    return forget


@PATCHES.around(
    "torch.utils._device:DeviceContext.__init__",
    "`with torch.device('cuda')` would make tensors on a device that is not there",
)
def _wrap_device_context(original: Original, self: Any, device: Any) -> None:
    original(self, to_cpu(device))


PATCHES += [
    # No copies: torch's own modules hold these functions to compare with them or to register kernels for them.
    *(
        Patch(f"torch:{name}", _wrap_factory, 'Megatron-Core makes tensors with device="cuda"', copies_in=())
        for name in _FACTORIES
    ),
    *(
        Patch(f"torch:Tensor.{name}", _wrap_factory, 'Megatron-Core makes tensors with device="cuda"')
        for name in _NEW_METHODS
    ),
    Patch("torch:Tensor.to", _wrap_to, "tensors and modules are moved to the GPU"),
    Patch("torch:Tensor.cuda", _stay, "tensors are moved to the GPU"),
    Patch("torch:Tensor.pin_memory", _stay, "page-locked memory needs an accelerator"),
    Patch("torch:Tensor.record_stream", _forget, "there is no caching allocator to warn"),
    Patch("torch:Tensor.type", _wrap_type, "optimizers and gradient clipping insist on 'torch.cuda.FloatTensor'"),
    Patch("torch.nn:Module.cuda", _stay, "modules are moved to the GPU"),
]
