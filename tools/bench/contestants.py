"""The optimizers that are measured against each other."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

from megatron_muon.engine.modes import EXACT, GRAM
from megatron_muon.orthogonalize.coefficients import MADE_FOR
from tools.bench.forms import FUSED, LOGICAL, UPSTREAM
from tools.bench.ranks import Groups

__all__ = ["ADAMW", "OURS", "UPSTREAM_DISTRIBUTED", "UPSTREAM_DUPLICATED", "UPSTREAM_FP32"]
__all__ += ["Contestant", "contestants", "forms_of"]

OURS = "megatron_muon auto"
UPSTREAM_DUPLICATED = "megatron-core duplicated"
UPSTREAM_DISTRIBUTED = "megatron-core distributed"
UPSTREAM_FP32 = "megatron-core duplicated, fp32"
ADAMW = "torch AdamW"

HYPERPARAMETERS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1}
MOMENTUM: dict[str, Any] = {"momentum": 0.95, "nesterov": False}

# float32 products as torch's setting has it: bfloat16 in Newton-Schulz for "medium".
PRECISIONS = {"fp32": "highest", "bf16": "medium", "fp16": "medium"}

Params = list[torch.nn.Parameter]


@dataclass(frozen=True)
class Contestant:
    """An optimizer with its options.

    Attributes:
        name: unique in a case.
        package: that it is from.
        form: of the weights that it gets, see :mod:`tools.bench.forms`.
        make: builds it.
        mode: of tensor parallelism; empty where nothing is divided, or for one that knows none.
        dtype: of the products that are asked for, as ``--dtype`` says it; empty if it has none.
        polynomial: name of the coefficients whose update it gives; empty for AdamW.
        scale_mode: factor on its update, see :func:`megatron_muon.orthogonalize.scale.scale_factor`.
        extra_scale: a further one.
        exact: whether its update must be that of the whole logical matrices.
        note: what the reader must know.
    """

    name: str
    package: str
    form: str
    make: Callable[[Params, Groups], torch.optim.Optimizer] = field(repr=False)
    mode: str = ""
    dtype: str = ""
    polynomial: str = ""
    scale_mode: str = "spectral"
    extra_scale: float = 1.0
    exact: bool = True
    note: str = ""


def contestants(dtype: str, tp: int, coefficients: Iterable[str] = ()) -> list[Contestant]:
    """All for one case, ours first.

    Args:
        dtype: as ``--dtype`` says it.
        tp: tensor-parallel size. With 1 all modes of an optimizer do the same, and one of them stands for all.
        coefficients: further sets that ours is measured with.
    """
    found = [_ours(dtype, mode) for mode in _our_modes(dtype, tp)]
    found += [_ours(dtype, "auto", name) for name in coefficients if name != "quintic"]
    found += [_upstream(f"megatron-core {mode}", dtype, mode) for mode in _upstream_modes(tp)]
    if tp == 1:
        if dtype != "fp32":
            found.append(_upstream(UPSTREAM_FP32, "fp32", "duplicated"))
        found.append(_emerging(dtype))
        if dtype == "bf16" and hasattr(torch.optim, "Muon"):  # torch has it since 2.9
            found.append(_torch_muon())
    return [*found, Contestant(ADAMW, "torch", FUSED, _make_adamw)]


def forms_of(lists: Iterable[Iterable[Contestant]]) -> list[str]:
    """The forms that some contestants need, each once."""
    return list(dict.fromkeys(contestant.form for each in lists for contestant in each))


def _our_modes(dtype: str, tp: int) -> tuple[str, ...]:
    if tp == 1:
        return ("auto",)
    return tuple(mode for mode in EXACT if (mode, dtype) != (GRAM, "bf16"))  # refused: not accurate in bfloat16


def _upstream_modes(tp: int) -> tuple[str, ...]:
    return ("duplicated",) if tp == 1 else ("duplicated", "distributed", "blockwise")


def _ours(dtype: str, mode: str, coefficients: str = "quintic") -> Contestant:
    def make(params: Params, groups: Groups) -> torch.optim.Optimizer:
        from megatron_muon.optimizers.muon import Muon

        return Muon(
            params,
            **HYPERPARAMETERS,
            **MOMENTUM,
            fp32_matmul_prec=PRECISIONS[dtype],
            ns_dtype=dtype,
            coefficient_type=coefficients,
            num_ns_steps=steps_of(coefficients),
            tp_mode=mode,
            tp_group=groups.tp,
            expert_tp_group=groups.expert_tp,
        )

    name = f"megatron_muon {mode}" + (f" {coefficients}" if coefficients != "quintic" else "")
    return Contestant(name, "megatron-muon", FUSED, make, mode, dtype, coefficients)


def steps_of(coefficients: str) -> int:
    """How many steps of a set are measured: as many as it is made for, or five."""
    return MADE_FOR.get(coefficients, 5)


def _upstream(name: str, dtype: str, mode: str) -> Contestant:
    def make(params: Params, groups: Groups) -> torch.optim.Optimizer:
        optimizer_class = _import("megatron.core.optimizer.emerging_optimizers").TensorParallelMuon
        pair = {"tp": groups.tp, "expt_tp": groups.expert_tp}
        collection: Any = SimpleNamespace(**pair, gtp_remat=None, expt_gtp_remat=None) if groups.tp else None
        return optimizer_class(
            params,
            **HYPERPARAMETERS,
            **MOMENTUM,
            split_qkv=True,
            is_qkv_fn=lambda param: hasattr(param, "is_qkv"),
            fp32_matmul_prec=PRECISIONS[dtype],
            pg_collection=collection,
            tp_mode=mode,
        )

    exact = mode != "blockwise"
    note = "" if exact else "another update: that of each shard alone"
    # fp16 is no choice there; "medium" is bfloat16.
    asked = "bf16" if dtype == "fp16" else dtype
    return Contestant(name, "megatron-core", UPSTREAM, make, mode, asked, "quintic", exact=exact, note=note)


def _emerging(dtype: str) -> Contestant:
    def make(params: Params, groups: Groups) -> torch.optim.Optimizer:
        optimizer_class = _import("emerging_optimizers.orthogonalized_optimizers").Muon
        return optimizer_class(params, **HYPERPARAMETERS, **MOMENTUM, fp32_matmul_prec=PRECISIONS[dtype])

    asked = "bf16" if dtype == "fp16" else dtype
    return Contestant("emerging_optimizers Muon", "emerging-optimizers", LOGICAL, make, "", asked, "quintic")


def _import(name: str) -> Any:
    """A module, without the warnings about every optional package that is missing."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module(name)
    finally:
        logging.disable(before)


def _torch_muon() -> Contestant:
    def make(params: Params, groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.Muon(params, **HYPERPARAMETERS, **MOMENTUM, adjust_lr_fn="match_rms_adamw")

    note = "its own coefficients: one polynomial in all steps"
    return Contestant("torch.optim.Muon", "torch", LOGICAL, make, "", "bf16", "simple", extra_scale=0.2, note=note)


def _make_adamw(params: Params, groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, **HYPERPARAMETERS, foreach=True)
