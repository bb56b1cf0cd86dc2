"""What ``--deterministic-mode`` forbids on GPUs, or makes slow, is in no step: prefix sums, and writes by index."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_muon import Muon
from megatron_muon.engine.packing import from_triangle, lower_triangle


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("width", "options"), [(37, {"scale_mode": "spectral_norm"}), (41, {"variant": "spectral_sphere"})]
)
def test_power_iterations_start_from_noise_that_is_made_once(width: int, options: dict[str, Any]) -> None:
    """Sizes are those of no other test."""
    param = torch.nn.Parameter(torch.randn(31, width))
    optimizer = Muon([param], **options)
    found = []
    for _ in range(2):
        param.grad = torch.randn(31, width)
        with Calls() as seen:
            optimizer.step()
        assert not seen.names & {"aten::cumsum", "aten::index_put_", "aten::_index_put_impl_"}
        found.append("aten::arange" in seen.names)
    assert found == [True, False]


def test_triangles_are_read_by_index_and_not_written() -> None:
    square = torch.randn(3, 7, 7)
    square = square + square.mT
    with Calls() as seen:
        assert torch.equal(from_triangle(lower_triangle(square), 7), square)
    assert not any("index_put" in name for name in seen.names)
    assert from_triangle(torch.zeros(0, 3), 2).shape == (0, 2, 2)
