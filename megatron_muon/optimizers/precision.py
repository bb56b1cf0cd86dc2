"""The dtypes of a step: they follow from the options and the weights alone, for the step and for its plan."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from megatron_muon.config import MuonConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """The dtypes of a step.

    Attributes:
        own: dtype of the momentum, in which matrices that are not sent are packed.
        iteration: dtype of Newton-Schulz.
        wire: dtype in which tensor-parallel ranks send each other matrices.
    """

    own: torch.dtype
    iteration: torch.dtype
    wire: torch.dtype


@functools.cache
def own_dtype(weights: torch.dtype) -> torch.dtype:
    """The dtype in which matrices are packed whose weights have the dtype ``weights``."""
    return torch.promote_types(weights, torch.float32)


def precision_of(config: MuonConfig, weights: torch.dtype, *, slow_bfloat16: bool = False) -> Precision:
    """What ``ns_dtype``, ``fp32_matmul_prec`` and ``tp_wire_dtype`` mean for weights of a dtype.

    Args:
        config: validated.
        weights: dtype of the weights that the optimizer updates (main copies, where the model's have 16 bits).
        slow_bfloat16: whether the device has no fast bfloat16
            (:func:`megatron_muon.orthogonalize.bfloat16.slow_bfloat16`): where the options ask for bfloat16 at least,
            and not by name, it is float32 there.
    """
    own = own_dtype(weights)
    iteration = {"own": own, **_DTYPES}[config.ns_type]
    if slow_bfloat16 and leaves_bfloat16(config):
        iteration = torch.float32
    # The iteration rounds to 16 bits anyway; bfloat16 keeps the range that float16 lacks before matrices are scaled.
    automatic = torch.bfloat16 if iteration.itemsize == 2 else own
    wire = {"auto": automatic, "fp32": own, "bf16": torch.bfloat16}[config.tp_wire_dtype]
    return Precision(own, iteration, wire)


def leaves_bfloat16(config: MuonConfig) -> bool:
    """Whether the iteration is in bfloat16 because that is enough, and not because it was asked for by name."""
    return config.ns_dtype == "auto" and config.ns_type == "bf16"
