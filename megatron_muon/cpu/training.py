"""Redirects inside ``megatron.training``, so that unmodified pre-training scripts run."""

from __future__ import annotations

import importlib.util
from typing import Any

from megatron_muon._patching import Original, Patches
from megatron_muon.plugin import datasets
from megatron_muon.refusals import refuse
from megatron_muon.refusals.cpu import CHANGES, CPU

PATCHES = Patches(datasets.PATCHES)  # not the CPU's alone, but pretrain() needs it here too


@PATCHES.around(
    "megatron.training.arguments:validate_args",
    "scripts written for GPUs ask for NCCL, TransformerEngine and fused kernels by default",
)
def _wrap_validate_args(original: Original, args: Any, *rest: Any, **kwargs: Any) -> Any:
    lines = change_arguments(args)
    if lines and args.rank == 0:
        print("megatron_muon.cpu changed these arguments:\n" + "\n".join(f"  {line}" for line in lines), flush=True)
    if importlib.util.find_spec("one_logger") is None:
        args.enable_one_logger = False  # a tool inside NVIDIA; each run would be told where to get it
    return original(args, *rest, **kwargs)


@PATCHES.around("megatron.training.yaml_arguments:validate_yaml", "--yaml-cfg passes by validate_args()")
def _refuse_yaml(original: Original, args: Any, *rest: Any, **kwargs: Any) -> Any:
    refuse(CPU, args)
    return original(args, *rest, **kwargs)


@PATCHES.around(
    "megatron.training.initialize:initialize_megatron",
    "asserts torch.cuda.is_available() unless told allow_no_cuda, which pretrain() never says",
)
def _wrap_initialize_megatron(original: Original, allow_no_cuda: bool = True, *args: Any, **kwargs: Any) -> Any:
    return original(True, *args, **kwargs)


def change_arguments(args: Any) -> list[str]:
    """Refuse what cannot be done, then change what can be done another way, in place, before arguments are validated.

    Returns:
        One line ``name: old -> new (reason)`` for each change.

    Raises:
        ConfigError: for arguments that are refused.
    """
    refuse(CPU, args)
    lines = []
    for change in CHANGES:
        current = getattr(args, change.name, None)
        if change.applies(current):
            setattr(args, change.name, change.value)
            lines.append(f"{change.name}: {current} -> {change.value} ({change.reason})")
    return lines
