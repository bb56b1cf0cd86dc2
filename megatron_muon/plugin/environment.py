"""What decides about the bits of a step beside weights and gradients: compared over all ranks of a model, at its start.

Replicas of a weight that exchange nothing in the step (data-parallel and context-parallel ranks, weights that are whole
on all tensor-parallel ranks) have to come to the same bits each by itself, or drift apart without a sign.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import torch

from megatron_muon.agree import Ranks
from megatron_muon.config import MuonConfig, flag
from megatron_muon.errors import ConfigError, ranges
from megatron_muon.optimizers.engines import Offers
from megatron_muon.optimizers.muon import Muon
from megatron_muon.optimizers.precision import precision_of
from megatron_muon.orthogonalize.backends import fastest_on_all
from megatron_muon.version import __version__

_PACKAGES = ("triton", "emerging-optimizers", "gram-newton-schulz", "quack-kernels", "transformer-engine")
_VARIABLES = ("NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "TORCH_BLAS_PREFER_CUBLASLT")


def compare_environments(muon: MuonConfig, ranks: Ranks, device: torch.device) -> list[str]:
    """Refuse ranks with other software, switches or options than the rest, and tell of other devices.

    These are not refused: clusters are mixed on purpose, and a weight with one owner cannot drift.

    Args:
        muon: the options of the model's optimizer.
        ranks: the model's.
        device: of the model, on this rank.

    Returns:
        lines of the report.

    Raises:
        ConfigError: on all ranks, with what differs, and where.
    """
    found = ranks.by_number(lambda: _environment(muon, device))
    names = dict.fromkeys(name for its in found.values() for name in its)
    texts = {name: _differing({rank: its.get(name) for rank, its in found.items()}) for name in names}
    devices = texts.pop("device")
    if differing := [f"{name} is {text}" for name, text in texts.items() if text]:
        raise ConfigError(
            f"Ranks of one model differ: {'; '.join(differing)}. Copies of a weight would get other bits and drift "
            "apart: start all ranks from one image, with the same flags and environment variables."
        )
    advice = (
        "Copies of a weight that ranks update each by itself may drift apart in their last bits: give each weight one "
        "owner (--use-distributed-optimizer), or watch them (--check-weight-hash-across-dp-replicas-interval)"
    )
    return [f"DEVICES DIFFER: {devices}. {advice}"] if devices else []


def agree_on_products(muons: Sequence[Muon], ranks: Ranks) -> list[str]:
    """Have all ranks of a model multiply by the same kernels: those that take the least time on all together.

    Args:
        muons: of the model, on this rank, with one set of options. None of them has planned its step.
        ranks: the model's.

    Returns:
        lines of the report.

    Raises:
        ConfigError: on all ranks, for a backend that is asked for by name and that one of them cannot use.
    """
    mine = ranks.together(lambda: _offers(muons))
    costs = {key: {name: offer[1:] for name, offer in its.items()} for key, its in mine.items()}
    found = ranks.by_number(lambda: costs)
    lines = []
    for key in sorted({key for its in found.values() for key in its}, key=str):
        theirs = {rank: its[key] for rank, its in found.items() if key in its}
        chosen = fastest_on_all([{name: cost for name, (cost, _) in its.items()} for its in theirs.values()])
        for muon in muons if key in mine else ():
            muon.engines.products[key] = mine[key][chosen][0]
        own = _differing({rank: next(iter(its)) for rank, its in theirs.items()})
        where = f"; on all {len(theirs)} ranks" if len(theirs) > 1 else ""
        line = next(iter(theirs.values()))[chosen][1]
        lines.append(f"products: {line}{where}" + (f" (best for each: {own})" if own else ""))
    return lines


def agree_on_plans(muons: Sequence[Muon], ranks: Ranks) -> None:
    """Have the ranks of each group compare their plans for all weights; none need be compared in the first step.

    Args:
        muons: of the model, on this rank; each has planned its step.
        ranks: the model's.

    Raises:
        ConfigError: on all ranks, naming those that differ.
    """

    def digests() -> dict[tuple[Any, ...], str]:
        found = [(number, muon.engines.digests(_params(muon), muon.directions)) for number, muon in enumerate(muons)]
        return {(number, *key): digest.hex() for number, its in found for key, digest in its.items()}

    found = ranks.by_number(digests)
    for key in sorted(set().union(*found.values())):
        _, name, members = key
        if _differing({rank: found.get(rank, {}).get(key) for rank in members}):
            raise ConfigError(
                f"Ranks {ranges(members)}, one {name} group, plan different steps: their weights, shapes, splits or "
                "param groups differ. All ranks of a group must build the same layers."
            )


def _offers(muons: Sequence[Muon]) -> dict[tuple[str, torch.dtype], Offers]:
    """For each kind of device and type of the iteration, the kernels that could multiply there."""
    found: dict[tuple[str, torch.dtype], Offers] = {}
    for params, engines in ((_params(muon), muon.engines) for muon in muons):
        for param in params:
            key = param.device.type, precision_of(engines.config, param.dtype).iteration
            if key not in found:
                found[key] = engines.offers([*map(engines.weight, params)], param.device, key[1], timed=True)
    return found


def _params(muon: Muon) -> list[torch.Tensor]:
    return [param for group in muon.param_groups for param in group["params"]]


def _environment(muon: MuonConfig, device: torch.device) -> dict[str, Any]:
    """What is to be the same, by the names that users know it by."""
    found: dict[str, Any] = {"megatron_muon": __version__, "torch": torch.__version__, "CUDA": torch.version.cuda}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    found |= {name: os.environ.get(name) for name in _VARIABLES}
    found["torch.use_deterministic_algorithms"] = torch.are_deterministic_algorithms_enabled()
    options = {field.name: getattr(muon, field.name) for field in dataclasses.fields(muon)}
    found |= {flag(name): value for name, value in options.items() if name != "log_jsonl"}
    if device.type == "cuda":
        return {**found, "device": f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"}
    return {**found, "device": f"CPU with {torch.backends.cpu.get_cpu_capability()}"}


def _differing(found: Mapping[int, Any]) -> str:
    """Which ranks have which value; empty if all have one."""
    ranks: dict[str, list[int]] = {}
    for rank, value in sorted(found.items()):
        ranks.setdefault(str(value), []).append(rank)
    return ", ".join(f"{value} on ranks {ranges(which)}" for value, which in ranks.items()) if len(ranks) > 1 else ""
