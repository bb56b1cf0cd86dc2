"""Megatron-Core on the CPU: the released wheel, unmodified, on gloo ranks.

Megatron-Core assumes CUDA and NCCL in many small places. This package redirects these places, and nothing else: with it
the same model, parallelism, optimizer and checkpoint code runs on any machine, a laptop included. Nothing is changed
until :func:`install` is called, and :func:`uninstall` restores every attribute::

    import megatron_muon.cpu

    megatron_muon.cpu.install()  # before or after importing megatron
    from megatron.training import pretrain

Messages that only concern users of GPUs are hidden (:mod:`~megatron_muon.cpu.messages`).

Each redirect is one :class:`~megatron_muon._patching.Patch` with its reason in the file of its subject; ``describe()``
lists them all.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator

import torch

from megatron_muon._patching import PatchSet
from megatron_muon.cpu import (
    attention,
    checkpoint_worker,
    collectives,
    cuda_api,
    gated_delta_net,
    hybrid_stack,
    jit,
    latent_attention,
    mamba,
    megatron_core,
    messages,
    norms,
    optimizers,
    tensors,
    training,
    transformer_engine,
)

__all__ = ["describe", "enabled", "install", "is_installed", "uninstall"]

_SUBJECTS = (
    cuda_api,
    tensors,
    collectives,
    megatron_core,
    optimizers,
    jit,
    norms,
    attention,
    latent_attention,
    gated_delta_net,
    mamba,
    hybrid_stack,
    training,
    checkpoint_worker,
    transformer_engine,
)
_REDIRECTS = PatchSet("megatron_muon.cpu", [patch for subject in _SUBJECTS for patch in subject.PATCHES])
_COMPILED = PatchSet("megatron_muon.cpu")


def install() -> None:
    """Redirect what Megatron-Core asks of CUDA and NCCL to the CPU and gloo. Does nothing when installed.

    May be called before or after ``megatron`` is imported, but before process groups and models are made.

    Raises:
        RuntimeError: CUDA is in use in this process: tensors on a GPU would meet redirects that move them to the CPU.
    """
    if is_installed():
        return
    if torch.cuda.is_initialized():
        raise RuntimeError(
            "megatron_muon.cpu cannot be installed: CUDA is already initialized in this process. Install it before "
            "anything uses the GPU, or start the process with CUDA_VISIBLE_DEVICES= (empty)."
        )
    messages.hide()  # before the next imports, which say some of them
    # torch.compile's tables list torch's functions by identity. Let it make them from the originals: it refuses two
    # names of one function, and would not know the originals again after uninstall(). `with torch.device(...)` has such
    # a table too, and would overlook the originals, which are what its mode is told.
    importlib.import_module("torch._dynamo")
    torch.utils._device._device_constructors()
    _COMPILED.patches = jit.patches_of_compiled_functions()
    try:
        _REDIRECTS.apply()
        _COMPILED.apply()
    except BaseException:
        uninstall()
        raise


def uninstall() -> None:
    """Restore everything. Does nothing when not installed."""
    _COMPILED.revert()
    _REDIRECTS.revert()
    messages.show()


def is_installed() -> bool:
    """Whether the redirects are in place."""
    return _REDIRECTS.active


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """A context with the redirects; on leaving, what was there before is restored."""
    before = is_installed()
    install()
    try:
        yield
    finally:
        if not before:
            uninstall()


def describe() -> list[tuple[str, str]]:
    """``(target, reason)`` of every redirect."""
    return _REDIRECTS.describe()
