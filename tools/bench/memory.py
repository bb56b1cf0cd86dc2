"""Does a case fit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_muon.errors import ConfigError
from tools.bench.cases import Case
from tools.bench.contestants import contestants, forms_of
from tools.bench.forms import FUSED

__all__ = ["free_bytes", "needed_bytes", "refuse_too_large"]

WORKING_BYTES = 1 << 30
"""What a step needs besides: chunks of our engine, gathered matrices."""


def needed_bytes(case: Case, forms: Sequence[str], optimizers: int) -> int:
    """About how much memory one rank needs, from above.

    Weights and gradients of each form (the last two share most of theirs), a momentum for each optimizer and a second
    moment, all float32; and this rank's part of the exact updates, float64, for two sets of coefficients where
    matrices are given one by one.

    Args:
        case: the weights.
        forms: that are needed.
        optimizers: how many there are at once.
    """
    local = case.local_elements
    copies = 2 * (1 + len([form for form in forms if form != FUSED]))
    exact = 8 * sum(weight.numel for weight in case.weights) // case.tp * min(2, len(forms))
    largest = max(weight.numel for weight in case.weights)
    return 4 * local * (copies + optimizers + 1) + exact + 64 * largest + WORKING_BYTES


def free_bytes(device: torch.device) -> int | None:
    """Of the device, for all ranks on it together; None if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_PHYS_PAGES" in names else None


def refuse_too_large(case: Case, dtypes: Sequence[str], device: torch.device, coefficients: Sequence[str] = ()) -> None:
    """Refuse what would end in the middle for want of memory.

    Args:
        case: the weights; on CPUs all ranks share the memory.
        dtypes: as ``--dtype`` says them.
        device: of the ranks.
        coefficients: further sets that ours is measured with.

    Raises:
        ConfigError: with the sizes and the way out.
    """
    lists = [contestants(dtype, case.tp, coefficients) for dtype in dtypes]
    optimizers = max(map(len, lists))
    needed = needed_bytes(case, forms_of(lists), optimizers) * (case.ranks if device.type == "cpu" else 1)
    free = free_bytes(device)
    if free is not None and needed > free:
        raise ConfigError(
            f"{case.option}: {optimizers} optimizers on {case.label} need about {needed / 2**30:.0f} GiB, and "
            f"{free / 2**30:.0f} GiB are free. Use --layers N for fewer layers, --shapes for some matrices, or more "
            "ranks (--tp, --ep) on more devices."
        )
