"""What was found, as plain data: for ``--json``, and for the text."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megatron_muon.planning.rates import Rates
from megatron_muon.version import __version__
from tools.bench.cases import Case
from tools.bench.contestants import (
    ADAMW,
    HYPERPARAMETERS,
    MOMENTUM,
    OURS,
    UPSTREAM_DISTRIBUTED,
    UPSTREAM_DUPLICATED,
    UPSTREAM_FP32,
)
from tools.bench.found import Measured, Rate
from tools.bench.ranks import World, cores
from tools.bench.rounds import quantile, ratios

__all__ = ["load", "machine", "of_case", "settings", "versions"]


def of_case(
    case: Case, dtype: str, world: World, found: Sequence[Measured], rate: Rate, rates: Rates, seconds: float
) -> dict[str, Any]:
    """The entry of one case in one dtype.

    Args:
        case: the weights and their layout.
        dtype: of Newton-Schulz.
        world: the ranks.
        found: all contestants.
        rate: of the machine.
        rates: of a rank, by which the times of our steps were predicted.
        seconds: that it all took.
    """
    times = {each.contestant.name: each.seconds for each in found}
    entry: dict[str, Any] = {"name": case.name, "dtype": dtype, "tp": case.tp, "ep": case.ep}
    entry |= _ratio("ratio_vs_upstream", times.get(UPSTREAM_DUPLICATED), times[OURS])
    entry |= _ratio("ratio_vs_upstream_distributed", times.get(UPSTREAM_DISTRIBUTED), times[OURS])
    entry |= _ratio("ratio_vs_upstream_fp32", times.get(UPSTREAM_FP32), times[OURS])
    entry |= _ratio("ratio_vs_adamw", times[OURS], times[ADAMW])
    return entry | {
        "ranks": world.size,
        "threads_per_rank": world.threads,
        "device": world.device.type,
        "backend": world.backend,
        "parameters": case.parameters,
        "matrices_of_a_rank": [
            {"rows": rows, "columns": columns, "count": count} for (rows, columns), count in case.matrices().items()
        ],
        "rounds": len(times[OURS]),
        "gemm": {
            "size": rate.size,
            "dtype": rate.dtype,
            "flops_per_second_of_a_rank": rate.flops_per_second,
            "seconds": rate.seconds,
        },
        "rates": rates.entry(),
        "contestants": [_contestant(each, times.get(UPSTREAM_DUPLICATED), rate) for each in found],
        "took_seconds": seconds,
    }


def _ratio(name: str, above: Sequence[float] | None, below: Sequence[float]) -> dict[str, Any]:
    """The median of a ratio, and its spread; None where one of the two did not run."""
    if above is None:
        return {name: None, f"{name}_spread": None}
    found = ratios(above, below)
    return {name: found["median"], f"{name}_spread": {"p10": found["p10"], "p90": found["p90"]}}


def _contestant(each: Measured, upstream: Sequence[float] | None, rate: Rate) -> dict[str, Any]:
    contestant, traffic = each.contestant, each.traffic
    median = statistics.median(each.seconds)
    ranks = len(traffic)
    flops = sum(rank.flops for rank in traffic)
    needed = sum(rank.flops_needed for rank in traffic)
    products = max((rank.product_dtype for rank in traffic), default="")
    # The rate is that of products in the case's dtype; it says nothing of others.
    possible = ranks * rate.flops_per_second * median if products == rate.dtype else math.inf
    return {
        "name": contestant.name,
        "package": contestant.package,
        "mode": contestant.mode or None,
        "form": contestant.form,
        "asked_dtype": contestant.dtype or None,
        "product_dtype": products or None,
        "same_update": bool(contestant.polynomial) and contestant.exact and contestant.polynomial == "quintic",
        "note": contestant.note,
        "seconds": {
            "median": median,
            "q1": quantile(each.seconds, 0.25),
            "q3": quantile(each.seconds, 0.75),
            "rounds": each.seconds,
        },
        "predicted_seconds": None
        if each.predicted is None
        else {"total": each.predicted.seconds, **vars(each.predicted)},
        "upstream_over_this": None if upstream is None else ratios(upstream, each.seconds),
        "error": None if each.errors is None else asdict(each.errors),
        "peak_bytes": max(rank.peak_bytes for rank in traffic),
        "collectives": max(rank.collectives for rank in traffic),
        "bytes_of_busiest_rank": max(rank.bytes for rank in traffic),
        "bytes_of_all_ranks": sum(rank.bytes for rank in traffic),
        "flops_of_busiest_rank": max(rank.flops for rank in traffic),
        "flops_of_all_ranks": flops,
        "flops_needed_of_all_ranks": needed or None,
        "share_of_gemm_rate": flops / possible or None,
        "share_of_gemm_rate_needed": needed / possible or None,
        "method": each.method or None,
    }


def settings() -> dict[str, Any]:
    """What all optimizers are given."""
    return {**HYPERPARAMETERS, **MOMENTUM, "num_ns_steps": 5, "weights": "float32", "gradients": "normal"}


def versions() -> dict[str, str]:
    """Of everything that is measured."""
    found = {"python": platform.python_version(), "megatron-muon": __version__}
    for name in ("torch", "megatron-core", "emerging-optimizers", "triton", "gram-newton-schulz"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine(device: str) -> dict[str, Any]:
    """What the numbers were taken on.

    Args:
        device: ``cpu`` or ``cuda``.
    """
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    return {
        "device": device,
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        if device == "cuda"
        else [],
        "cpu": _cpu(),
        "cores": cores(),
        "memory_bytes": pages,
        "system": platform.system(),
        "load_before": load(),
    }


def load() -> float | None:
    """Processes that wanted to run in the last minute, on average; the spread of the times follows from it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
