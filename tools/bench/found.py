"""What is found of a case: of each optimizer, and of the machine in the same rounds."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_muon.planning.timing import Times
from tools.bench.accuracy import Errors
from tools.bench.contestants import Contestant

__all__ = ["Measured", "Rate", "Traffic"]


@dataclass(frozen=True)
class Traffic:
    """What one step of one rank took.

    Attributes:
        peak_bytes: greatest size of what the step allocates and has not freed.
        product_dtype: of most matrix products that were seen.
        collectives: number of collective operations.
        bytes: sent to other ranks.
        flops: operations of matrix products.
        flops_needed: the same with symmetric results once; 0 if not known.
    """

    peak_bytes: int
    product_dtype: str
    collectives: int
    bytes: float
    flops: int
    flops_needed: int = 0


@dataclass
class Measured:
    """A contestant and what was found.

    Attributes:
        contestant: it.
        optimizer: its optimizer.
        errors: of its update; None if it orthogonalizes nothing.
        traffic: of a step, by rank.
        seconds: of each round, those of the slowest rank.
        predicted: how long our step takes by the rates of the device; None for others.
        method: what our engine does for which shapes; empty for others.
    """

    contestant: Contestant
    optimizer: torch.optim.Optimizer
    errors: Errors | None = None
    traffic: list[Traffic] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    predicted: Times | None = None
    method: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rate:
    """The large square product of the same rounds.

    Attributes:
        size: its rows and columns.
        dtype: of what is multiplied, as ``--dtype`` says it.
        flops: operations of one rank in one call.
        seconds: of each round, those of the slowest rank.
    """

    size: int
    dtype: str
    flops: int
    seconds: list[float]

    @property
    def flops_per_second(self) -> float:
        """Of one rank, while all multiply."""
        return self.flops / statistics.median(self.seconds)
