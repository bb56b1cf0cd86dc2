"""What a step asks of the host for each logical matrix, in calls: operations of torch, and functions of Python."""

from __future__ import annotations

import sys
from collections import defaultdict
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_muon import Muon
from tools.host_time import CHUNK, LAYOUTS, optimizer_of, weights


class Operations(TorchDispatchMode):
    """Counts what reaches a kernel, or makes a view."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        # Of a list of tensors, each one is an operation on the CPU; views of a batch are made together.
        self.count += len(args[0]) if name.startswith("_foreach") else 1
        return func(*args, **(kwargs or {}))


def calls(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Operations of torch, and calls of Python's functions, in a step."""
    optimizer.step()  # plans and state
    functions = 0

    def notice(frame: FrameType, event: str, argument: object) -> None:
        nonlocal functions
        functions += event == "call"

    sys.setprofile(notice)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    with Operations() as operations:
        optimizer.step()
    return operations.count, functions


def for_each_matrix(variant: str, layout: str) -> tuple[float, float]:
    """What full chunks of matrices take more, for each."""
    each = LAYOUTS[layout][2]
    few, many = (calls(optimizer_of(variant, layout, weights(layout, count * CHUNK * each))) for count in (2, 4))
    return (many[0] - few[0]) / (2 * CHUNK * each), (many[1] - few[1]) / (2 * CHUNK * each)


@pytest.mark.parametrize("variant", ["plain", "nesterov"])
@pytest.mark.parametrize(
    ("layout", "operations", "functions"), [("whole", 6, 27), ("qkv", 12, 20), ("glu experts", 2.5, 11)]
)
def test_calls_for_each_matrix(variant: str, layout: str, operations: float, functions: float) -> None:
    found = for_each_matrix(variant, layout)
    assert found[0] <= operations and found[1] <= functions, found


@pytest.mark.parametrize(("variant", "operations"), [("normuon", 10), ("hyperball", 18), ("update_norm", 7)])
def test_operations_of_variants(variant: str, operations: float) -> None:
    assert for_each_matrix(variant, "whole")[0] <= operations


def test_engines_are_of_weights_as_they_are() -> None:
    """A layout that comes later, and memory of another shape, make another plan; the same weights keep theirs."""
    param = torch.nn.Parameter(torch.randn(16, 8))
    optimizer = Muon([param])
    param.grad = torch.randn(16, 8)
    optimizer.step()
    first = optimizer.prepare()
    param.grad = param.grad.clone()
    optimizer.step()
    assert optimizer.prepare() is first
    param.matrix_layout = LAYOUTS["glu"][0]
    annotated = optimizer.prepare()
    assert annotated is not None and annotated is not first and len(annotated.plan.chunks[0].batches[0].items) == 2
    param.data, param.grad, optimizer.state = torch.randn(24, 8), torch.randn(24, 8), defaultdict(dict)
    optimizer.step()
    assert optimizer.prepare() not in (first, annotated)


def test_l2_decay_copies_no_gradient_at_once() -> None:
    """What a step of method ``l2`` makes of new tensors of a weight's size is of a chunk's matrices."""
    params = weights("whole", 64)
    optimizer = Muon(params, weight_decay_method="l2", chunk_mb=4 * 4 * 8 * 4 / (1 << 20))
    before = [param.grad.clone() for param in params if param.grad is not None]
    largest = 0

    def added(tensors: Any, others: Any, **options: Any) -> Any:
        nonlocal largest
        largest = max(largest, len(tensors))
        return foreach_add(tensors, others, **options)

    foreach_add = torch._foreach_add
    with mock.patch.object(torch, "_foreach_add", added):
        optimizer.step()
    assert 0 < largest <= 4
    assert all(
        torch.equal(param.grad, grad) for param, grad in zip(params, before, strict=True) if param.grad is not None
    )
