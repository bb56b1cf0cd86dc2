"""What decides about the bits of a step beside weights and gradients: compared over all ranks of a model, at its start.

Replicas of a weight that exchange nothing in the step (data-parallel and context-parallel ranks, weights that are whole
on all tensor-parallel ranks) have to come to the same bits each by itself, or drift apart without a sign.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron_muon.agree import Ranks
from megatron_muon.config import PREFIX, MuonConfig, flag
from megatron_muon.errors import ConfigError, ranges
from megatron_muon.optimizers.engines import Offers
from megatron_muon.optimizers.muon import Muon
from megatron_muon.orthogonalize.backends import fastest_on_all
from megatron_muon.plugin.options import training_arguments
from megatron_muon.refusals.rule import flag_of
from megatron_muon.version import __version__

_TOLD = ("emerging-optimizers", "transformer-engine", "transformers", "triton")
"""Packages whose versions a record tells beside those of Megatron-Core, of torch and of this one."""

_PACKAGES = ("triton", "emerging-optimizers", "gram-newton-schulz", "quack-kernels", "transformer-engine")
_VARIABLES = (
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "CUBLAS_WORKSPACE_CONFIG",
    "TORCH_BLAS_PREFER_CUBLASLT",
    "TRITON_F32_DEFAULT",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "MKL_CBWR",
)
_MAY_DIFFER = ("log_jsonl",)
"""Options that one rank alone reads."""
_OF_ARGUMENTS = (
    "lr_",
    "train_iters",
    "train_samples",
    "start_weight_decay",
    "end_weight_decay",
    "weight_decay_incr",
    "seed",
)
"""How the names of Megatron's arguments begin that the schedules of rates follow from, and are in no config."""
_OF_MODEL = ("qk_clip", "log_max_attention_logit")
"""The same of fields of the model's config that the step reads."""


def compare_environments(
    muon: MuonConfig, config: Any, model_chunks: Sequence[torch.nn.Module], ranks: Ranks, device: torch.device
) -> list[str]:
    """Refuse ranks with other software, switches or options than the rest, and tell of other devices.

    These are not refused: clusters are mixed on purpose, and a weight with one owner cannot drift.

    Args:
        muon: the options of the model's optimizer.
        config: Megatron-Core's ``OptimizerConfig``, of which they are.
        model_chunks: of the model on this rank.
        ranks: the model's.
        device: of the model, on this rank.

    Returns:
        lines of the report.

    Raises:
        ConfigError: on all ranks, with what differs, and where.
    """
    mine = functools.partial(_environment, muon, config, model_chunks, device)
    if len(set(ranks.gather(lambda: hashlib.sha256(repr(mine()).encode()).digest()))) == 1:
        return []  # thousands of ranks need not send each other the same pages
    found = ranks.by_number(mine)
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

    Where the device of one of them has no fast bfloat16, and no type of numbers was asked for, all iterate in float32.

    Args:
        muons: of the model, on this rank, with one set of options. None of them has planned its step.
        ranks: the model's.

    Returns:
        lines of the report.

    Raises:
        ConfigError: on all ranks, for a backend that is asked for by name and that one of them cannot use.
    """
    slow = {rank: text for rank, text in ranks.by_number(lambda: _slowness(muons)).items() if text}
    for muon in muons:
        muon.engines.settle_bfloat16(bool(slow))
    mine = ranks.together(lambda: _offers(muons))
    costs = {key: {name: offer[1:] for name, offer in its.items()} for key, its in mine.items()}
    found = ranks.by_number(lambda: costs)
    lines = [f"Newton-Schulz in float32: on rank {rank} {text}" for rank, text in sorted(slow.items())[:1]]
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


def _slowness(muons: Sequence[Muon]) -> str:
    """What is slow about bfloat16 on this rank."""
    found = ((params, muon.engines) for muon in muons if (params := _params(muon)))
    return next(filter(None, (its.slowness([*map(its.weight, some)], some[0].device) for some, its in found)), "")


def _offers(muons: Sequence[Muon]) -> dict[tuple[str, torch.dtype], Offers]:
    """For each kind of device and type of the iteration, the kernels that could multiply there."""
    found: dict[tuple[str, torch.dtype], Offers] = {}
    for params, engines in ((_params(muon), muon.engines) for muon in muons):
        for param in params:
            key = param.device.type, engines.precision(param.dtype).iteration
            if key not in found:
                found[key] = engines.offers([*map(engines.weight, params)], param.device, key[1], timed=True)
    return found


def _params(muon: Muon) -> list[torch.Tensor]:
    return [param for group in muon.param_groups for param in group["params"]]


def _environment(
    muon: MuonConfig, config: Any, model_chunks: Sequence[torch.nn.Module], device: torch.device
) -> dict[str, str]:
    """What is to be the same, by the names that users know it by."""
    from megatron.core.utils import get_model_config

    found: dict[str, Any] = {
        **versions(_PACKAGES),
        "the hash of megatron_muon's files": _hash_of_files(),
        "CUDA": torch.version.cuda,
    }
    found |= {name: os.environ.get(name) for name in _VARIABLES}
    found["torch.use_deterministic_algorithms"] = torch.are_deterministic_algorithms_enabled()
    options = {field.name: getattr(muon, field.name) for field in dataclasses.fields(muon)}
    found |= {flag(name): value for name, value in options.items() if name not in _MAY_DIFFER}
    found |= dict(_settings(config, training_arguments()))
    for chunk in model_chunks[:1]:
        model = get_model_config(chunk)
        found |= {flag_of(name): value for name, value in vars(model).items() if name.startswith(_OF_MODEL)}
    if device.type == "cuda":
        found["device"] = f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"
    else:
        found["device"] = f"CPU with {torch.backends.cpu.get_cpu_capability()}"
    return {name: str(value) for name, value in found.items()}


def _settings(config: Any, arguments: Any) -> Iterator[tuple[str, Any]]:
    """Megatron's own settings that decide about a step: of the optimizer's config, and of the schedules."""
    given = {} if arguments is None else vars(arguments)
    for name, value in vars(config).items():
        if isinstance(value, (bool, int, float, str, torch.dtype, type(None))) and not name.startswith(PREFIX):
            yield (flag_of(name) if name in given else f"OptimizerConfig.{name}"), value
    for name, value in given.items():
        if name.startswith(_OF_ARGUMENTS):
            yield flag_of(name), value


@functools.cache
def _hash_of_files() -> str:
    """Of this package's code: a copy that somebody has changed may have the same version."""
    root, found = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            continue  # an editor's: nothing imports it, and it may be a link to nowhere
        found.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def versions(packages: Sequence[str] = _TOLD) -> dict[str, str]:
    """Of this package, of Megatron-Core, of torch, and of those of ``packages`` that are there."""
    from megatron.core import __version__ as megatron_core

    found = {"megatron_muon": __version__, "megatron-core": megatron_core, "torch": torch.__version__}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _differing(found: Mapping[int, Any]) -> str:
    """Which ranks have which value; empty if all have one."""
    ranks: dict[str, list[int]] = {}
    for rank, value in sorted(found.items()):
        ranks.setdefault(str(value), []).append(rank)
    return ", ".join(f"{value} on ranks {ranges(which)}" for value, which in ranks.items()) if len(ranks) > 1 else ""
