"""Settings on the CPU: which are changed, and what is refused, by the tables of :mod:`megatron_muon.refusals.cpu`."""

from __future__ import annotations

from typing import Any

from megatron_muon.refusals import refuse
from megatron_muon.refusals.cpu import CHANGES, CPU, IN_CONFIG

__all__ = ["change_arguments", "refuse_in_config"]


def change_arguments(args: Any) -> list[str]:
    """Refuse what cannot be done, then change what can be done another way, in place.

    Args:
        args: Megatron-LM's parsed arguments, before they are validated.

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


def refuse_in_config(config: Any) -> None:
    """Check a ``TransformerConfig`` that was made in code.

    Raises:
        ConfigError: for fields that are refused, and for those that must have another value.
    """
    refuse((*CPU, *IN_CONFIG), config)
