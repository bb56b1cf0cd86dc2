"""Steps in which one rank does something wrong in its second chunk; a script, too, for ranks of their own."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_muon import Muon
from megatron_muon.engine import StepEngine
from megatron_muon.engine.plan import Peers, Weight
from megatron_muon.engine.slices import Slices
from megatron_muon.optimizers.stages import Variant
from megatron_muon.orthogonalize import iteration
from megatron_muon.orthogonalize.orthogonalizer import Orthogonalizer
from megatron_muon.routing.layout import WHOLE
from tests.distributed.test_engine import Given, random

WRONG = 1
"""The rank that does it."""


class Fault:
    """Something wrong, on one rank, when it is called for the second time."""

    def __init__(self, kind: str, seconds: float) -> None:
        self.kind, self.seconds, self.calls = kind, seconds, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls != 2 or dist.get_rank() != WRONG:
            return
        if self.kind == "sleep":
            time.sleep(self.seconds)
        else:
            torch.empty(1 << 50, dtype=torch.uint8)  # the allocator's own error


class FaultyVariant(Variant):
    """Plain Muon with a fault when a chunk is packed."""

    fault: Callable[[], None]

    def transform(self, batches: Sequence[torch.Tensor]) -> None:
        self.fault()


def divided(group: dist.ProcessGroup, mode: str, fault: Callable[[], None]) -> Callable[[], object]:
    """A step whose weights are divided among all ranks: three chunks, in each a matrix for each rank."""
    ranks = group.size()
    params = [Given((16, 32 * ranks), 1).parameter(group, random((16, 32 * ranks), seed)) for seed in range(3 * ranks)]
    for param in params:
        param.grad = param.detach().clone()
    variant = FaultyVariant()
    variant.fault = fault
    return Muon(params, tp_group=group, tp_mode=mode, ns_dtype="fp32", chunk_mb=0.001, variant=variant).step


class FaultyOrthogonalizer(Orthogonalizer):
    """With a fault where a batch is orthogonalized."""

    fault: Callable[[], None]

    def use_up(self, given: list[torch.Tensor]) -> torch.Tensor:
        self.fault()
        return super().use_up(given)


def lent(group: dist.ProcessGroup, fault: Callable[[], None]) -> Callable[[], object]:
    """A step whose nine matrices are those of the first rank, which shares them with the others."""
    weights = [Weight((256, 256), WHOLE, peers=Peers("data", group.size(), 0)) for _ in range(9)]
    orthogonalizer = FaultyOrthogonalizer(iteration("quintic", 5), torch.float32, 1e-7)
    orthogonalizer.fault = fault
    engine = StepEngine(
        weights,
        {"data": group},
        orthogonalizer,
        mode="owner",
        dtype=torch.float32,
        wire_dtype=torch.float32,
        chunk_mb=0.25,
        device=torch.device("cpu"),
    )
    assert engine.shares

    def read(slices: Sequence[Slices], batches: Sequence[torch.Tensor]) -> None:
        for batch in batches:
            batch.normal_(generator=torch.Generator().manual_seed(0))

    return lambda: engine.run(read, lambda slices, batches, reduce: None)


def step_of(kind: str, seconds: float, fault: Callable[[], None]) -> Callable[[], object]:
    """A step of all ranks, in a group that gives up after some seconds."""
    dist.barrier()  # nobody comes so late that connecting takes longer
    group = dist.new_group(timeout=timedelta(seconds=seconds))
    return lent(group, fault) if kind == "lent" else divided(group, kind, fault)


def main(kind: str, fault: str, seconds: str) -> None:
    """A run of one step, that ends as others do that fail."""
    dist.init_process_group("gloo")
    with contextlib.suppress(KeyboardInterrupt):
        step_of(kind, float(seconds), Fault(fault, 600.0))()


if __name__ == "__main__":
    main(*sys.argv[1:])
