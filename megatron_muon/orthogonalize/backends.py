"""Which implementation of the matrix products is used on a device, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module

import torch

from megatron_muon.choices import NS_BACKENDS
from megatron_muon.errors import ConfigError, sizes
from megatron_muon.orthogonalize.kernels import KernelProducts
from megatron_muon.orthogonalize.kernels.gate import Trial, examine
from megatron_muon.orthogonalize.kernels.onednn import OneDnnProducts
from megatron_muon.orthogonalize.products import BlockProducts, TorchProducts
from megatron_muon.orthogonalize.switches import float32_is_exact

_FLAG = "--muon-ns-backend"

_CPU_BLOCK_ROWS = {torch.float32: 128, torch.float64: 64, torch.bfloat16: 256, torch.float16: 256}
"""The fewest rows of a block with which four blocks take less time than the whole product (measured). With blocks
of 64 rows of float32, matrices of 256 rows take half as long again (AVX2, two cores)."""

_KERNELS = {
    "gram_newton_schulz": ("vendor", "VendorProducts"),
    "triton": ("triton_symmetric", "TritonProducts"),
    "emerging": ("emerging", "EmergingProducts"),
    "onednn": ("onednn", "OneDnnProducts"),
}
"""For each backend its module in :mod:`megatron_muon.orthogonalize.kernels` and its class there. Where nothing is timed
the first that can be used is preferred: made for the device; then for any device; then emerging-optimizers'."""


@dataclass(frozen=True)
class Candidate:
    """A backend on a device.

    Attributes:
        backend: its name, one of :data:`megatron_muon.choices.NS_BACKENDS`.
        products: its implementation of the products; None if it cannot be used.
        text: what the numeric check found, or why it cannot be used.
        seconds: of one iteration, see :class:`megatron_muon.orthogonalize.kernels.gate.Trial`; 0 if it was not timed,
            infinite if it cannot be used.
    """

    backend: str
    products: TorchProducts | None
    text: str
    seconds: float = 0.0


def choose_products(
    backend: str, device: torch.device, dtype: torch.dtype, trial: Trial | None = None
) -> tuple[TorchProducts, str]:
    """The first of :func:`candidates` and a line for the report, for callers that share no weight with other ranks."""
    found = candidates(backend, device, dtype, trial)
    assert found[0].products is not None
    return found[0].products, report(found[0], found, device, dtype, trial)


def candidates(backend: str, device: torch.device, dtype: torch.dtype, trial: Trial | None = None) -> list[Candidate]:
    """The backends that may be used, the fastest first (at least one), and then those that cannot.

    Kernels other than torch's must first pass :func:`megatron_muon.orthogonalize.kernels.gate.examine` on the device.
    That takes seconds (kernels are compiled) and waits for the device, so call this at set-up; it is done once for each
    backend, device and dtype. Then those that passed, and torch, are timed. Time differs from rank to rank: ranks that
    hold copies or shards of one weight take :func:`fastest_on_all`, or their copies drift apart.

    Args:
        backend: one of :data:`megatron_muon.choices.NS_BACKENDS`. ``auto`` is the fastest of all that pass; on CPUs
            oneDNN if it passes, else torch, by blocks.
        device: where it will multiply.
        dtype: of the matrices. For float32, call this under the :func:`matmul_precision` of the step: what is best
            depends on whether products may be TF32.
        trial: what to time; without it nothing is timed, and torch comes last.

    Raises:
        ConfigError: for an unknown backend, and for one that is asked for by name and is not there, does not support
            the device or dtype, or fails the check.
    """
    if backend not in NS_BACKENDS:
        raise ConfigError(f"{_FLAG} {backend}: choose one of {', '.join(NS_BACKENDS)}.")
    device, is_exact = _numbered(device), float32_is_exact()
    if backend == "torch":
        return [Candidate("torch", TorchProducts(), f"as {_FLAG} says")]
    if backend != "auto":
        named = _checked(backend, device, dtype, is_exact)
        if named.products is None:
            raise ConfigError(f"{_FLAG} {backend}, {_where(device, dtype)}: it {named.text}. Use auto or torch.")
        return [replace(named, text=f"as {_FLAG} says; {named.text}")]
    if device.type == "cpu":
        rows = _CPU_BLOCK_ROWS[dtype]
        by_blocks = Candidate("torch", BlockProducts(rows), f"blocks of {rows} rows or more")
        if dtype != torch.float32:
            return [by_blocks]
        # Not by time: a run that starts again on the same processors is to give the same bits.
        onednn = _checked("onednn", device, dtype, is_exact)
        return [by_blocks, onednn] if onednn.products is None else [onednn, by_blocks]
    if dtype == torch.float32 and is_exact:
        # Exact float32 has no tensor cores; without them, Triton's products are no match for torch's.
        return [Candidate("torch", TorchProducts(), "symmetric kernels are for 16 bits and TF32")]
    kernels = [each for each in _KERNELS if each != "onednn"]
    return _in_order([_checked(each, device, dtype, is_exact) for each in kernels], device, dtype, trial)


def fastest_on_all(ranks: Sequence[Mapping[str, float]]) -> str:
    """The backend that all ranks can use and that takes them the least time together.

    Args:
        ranks: for each rank ``{candidate.backend: candidate.seconds}``, in an order that is the same on all of them.

    Raises:
        ConfigError: if there is none, as where they were given different flags.
    """
    common = [name for name in ranks[0] if all(math.isfinite(each.get(name, math.inf)) for each in ranks)]
    if not common:
        raise ConfigError(f"{_FLAG}: no backend can be used on all ranks. Use auto on all of them.")
    return min(common, key=lambda name: sum(each[name] for each in ranks))


def report(
    chosen: Candidate, found: Sequence[Candidate], device: torch.device, dtype: torch.dtype, trial: Trial | None = None
) -> str:
    """One line: what was chosen of what :func:`candidates` found, numbers of check and trial, and why not others."""
    assert chosen.products is not None
    parts = [f"{chosen.products.name}, {_where(_numbered(device), dtype)} ({chosen.text})"]
    timed = [f"{each.backend} {1e3 * each.seconds:.3g} ms" for each in found if 0.0 < each.seconds < math.inf]
    if trial is not None and timed:
        parts.append(f"one iteration of {sizes(trial.shape)}: {', '.join(timed)}")
    return "; ".join([*parts, *(f"{each.backend} {each.text}" for each in found if each.products is None)])


def _in_order(
    kernels: Sequence[Candidate], device: torch.device, dtype: torch.dtype, trial: Trial | None
) -> list[Candidate]:
    """Kernels and torch, the fastest first; torch is timed only if there is another to compare it with."""
    found = [*kernels, Candidate("torch", TorchProducts(), "no check needed")]
    if trial is not None and any(each.products is not None for each in kernels):
        found = [_timed(each, device, dtype, trial) for each in found]
    return sorted(found, key=lambda candidate: candidate.seconds)


def _timed(candidate: Candidate, device: torch.device, dtype: torch.dtype, trial: Trial) -> Candidate:
    if candidate.products is None:
        return candidate
    try:
        return replace(candidate, seconds=trial.seconds(candidate.products, device, dtype))
    except Exception as error:
        if candidate.backend == "torch":
            raise
        return _unusable(candidate.backend, f"fails at {sizes(trial.shape)}: {_first_line(error)}")


@cache
def _checked(backend: str, device: torch.device, dtype: torch.dtype, is_exact: bool) -> Candidate:
    """Load a backend and check it. ``is_exact``, of float32 products, is here a part of the key."""
    del is_exact
    module_name, class_name = _KERNELS[backend]
    try:
        module = import_module(f"megatron_muon.orthogonalize.kernels.{module_name}")
        reason: str | None = module.obstacle(device, dtype)
    except ImportError as error:
        reason = f"is not there ({error})"
    except Exception as error:  # packages that meet a wrong version or driver fail in ways of their own
        reason = f"cannot be loaded ({_first_line(error)})"
    if reason is not None:
        return _unusable(backend, reason)
    products: KernelProducts | OneDnnProducts = getattr(module, class_name)()
    verdict = examine(products, device, dtype)
    if verdict.failure is not None:
        return _unusable(backend, str(verdict))
    return Candidate(backend, products, f"{verdict}; {products.rest}")


def _unusable(backend: str, reason: str) -> Candidate:
    return Candidate(backend, None, reason, math.inf)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition('\n')[0]}"


def _numbered(device: torch.device) -> torch.device:
    """``cuda`` as the device that it means now: the check is remembered for one device."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _where(device: torch.device, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} on {device}"
