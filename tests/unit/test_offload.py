"""State that lives on the host and comes through two windows: the bits are those of state that never leaves."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_muon import ConfigError, Muon
from megatron_muon.optimizers import windows
from megatron_muon.optimizers.fading import EVERY
from megatron_muon.optimizers.graph import StepGraph
from megatron_muon.optimizers.windows import _pieces
from megatron_muon.routing.layout import WHOLE
from tests.unit.test_captured_step import CASES, ROWS, parameters, train

CHUNK_MB = 1300 / 2**20
"""A chunk of one matrix of 26 x 12 in float32, which has 1248 bytes."""

KEPT: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "momentum": (torch.float32, {}),
    "all": (torch.bfloat16, {"master": "remainder", "momentum_dtype": "int8"}),
}


def made(case: str, offload: str, how: str = "momentum", **changes: Any) -> Muon:
    layouts, options = copy.deepcopy(CASES[case])
    dtype, kept = KEPT[how]
    options = {"lr": 0.02, "chunk_mb": CHUNK_MB, "weight_decay": 0.1, **kept, **options, "offload": offload, **changes}
    return Muon(parameters(layouts * 2, dtype), **options)


def plain(*shapes: tuple[int, int]) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.randn(*shape)) for shape in shapes]
    for param in params:
        param.grad = torch.zeros_like(param)
    return params


def everything(optimizer: Muon) -> list[torch.Tensor]:
    state = itertools.chain.from_iterable(each.values() for each in optimizer.state.values())
    return [*(param.detach() for param in optimizer._own), *(each for each in state if isinstance(each, torch.Tensor))]


def same(one: Muon, other: Muon) -> bool:
    return all(map(torch.equal, everything(one), everything(other)))


@pytest.mark.parametrize("how", KEPT)
@pytest.mark.parametrize("case", [name for name in CASES if name not in ("independent", "scheduled", "cautious")])
def test_the_very_bits(case: str, how: str) -> None:
    near, far = made(case, "none", how), made(case, how, how)
    for optimizer in (near, far):
        train(optimizer, 3)
    assert far.windows is not None
    assert same(near, far)
    counters = far.windows.counters
    assert 0 < counters.largest <= max(windows._ALIGNED * 6, far.windows.bound + windows._ALIGNED * 3)
    assert counters.bytes_in >= counters.bytes_out > 0


def test_each_byte_comes_and_goes_once_and_no_window_is_larger_than_a_chunk() -> None:
    params = plain(*[(16, 16)] * 12)
    optimizer = Muon(params, chunk_mb=4 * 1024 / 2**20, offload="momentum")
    train(optimizer, 1)
    assert optimizer.windows is not None
    counters = optimizer.windows.counters
    assert (counters.parts, counters.bytes_in, counters.bytes_out) == (3, 12 << 10, 12 << 10)
    assert counters.largest == optimizer.windows.bound == 4 << 10
    train(optimizer, 2)
    assert (counters.parts, counters.bytes_in, counters.bytes_out) == (9, 36 << 10, 36 << 10)
    params[0].grad = None
    train(optimizer, 1)
    assert counters.largest == 4 << 10


def test_the_matrices_of_one_weight_come_in_turn() -> None:
    """Where a variant looks at momentum before it is packed."""
    (param,) = plain((16, 16))
    experts = torch.nn.Parameter(torch.randn(64, 16, 16))
    experts.matrix_layout, experts.grad = WHOLE.stack(), torch.zeros_like(experts)
    optimizer = Muon([param, experts], chunk_mb=4 * 1024 / 2**20, offload="momentum", variant="spectral_sphere")
    train(optimizer, 2)
    assert optimizer.windows is not None and optimizer.windows.counters.largest == 4 << 10


@pytest.mark.parametrize("decay", ["decoupled", "l2"])
def test_a_stack_under_a_variant_that_mixes_gradients_again_comes_in_turn(decay: str) -> None:
    """With the decay of method l2, gradients have masters in them, which come from the host for it."""
    found = []
    for offload in ("none", "all"):
        experts = torch.nn.Parameter(torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(1)).bfloat16())
        experts.matrix_layout, experts.grad = WHOLE.stack(), torch.zeros_like(experts)
        options = {"variant": "namo", "weight_decay": 0.1, "weight_decay_method": decay, "chunk_mb": 2 * 1024 / 2**20}
        found.append(Muon([experts], **options, master="remainder", offload=offload))
        train(found[-1], 2)
    assert same(*found) and found[1].windows is not None
    assert found[1].windows.counters.largest <= found[1].windows.bound == 2 << 10


def test_a_matrix_above_the_bound_comes_in_turn() -> None:
    params = plain((8, 8), (32, 32), (8, 8))
    optimizer = Muon(params, chunk_mb=600 / 2**20, offload="momentum")
    train(optimizer, 2)
    assert optimizer.windows is not None and optimizer.windows.counters.largest == 4 * 128  # rows of 32, below 600


def test_momentum_that_has_faded_is_forgotten() -> None:
    """In a step that looks at all momentum first, in another order than the others; some weights lose all."""
    found = []
    for offload in ("none", "momentum"):
        optimizer = made("rows under Adam", offload)
        train(optimizer, 1)
        for number in range(EVERY + 3):
            for param in optimizer._own:
                param.grad = torch.zeros_like(param) if number < EVERY else torch.ones_like(param)
            for group in optimizer.param_groups:
                group["momentum"] = 0.1
            optimizer.step()
        found.append(optimizer)
    assert same(*found)


def test_state_that_others_handle() -> None:
    """Replaced by copies, taken away, loaded, started anew: what is new lives on the host, too."""
    near, far = made("rows under Adam", "none"), made("rows under Adam", "momentum")
    for optimizer in (near, far):
        train(optimizer, 2)
        for state in optimizer.state.values():
            state["momentum_buffer"] = state["momentum_buffer"].clone()
        train(optimizer, 1, first=2)
        kept = copy.deepcopy(optimizer.state_dict())
        optimizer.state.pop(optimizer._own[0])
        train(optimizer, 1, first=3)
        optimizer.load_state_dict(kept)
        train(optimizer, 1, first=4)
        optimizer.reset()
        train(optimizer, 2, first=5)
    assert same(near, far)
    twin = copy.deepcopy(far)
    for param in twin._own:
        param.grad = torch.zeros_like(param)
    for optimizer in (near, twin):
        train(optimizer, 2, first=7)
    assert same(near, twin) and twin.windows is not far.windows


@pytest.mark.parametrize("to", ["host", "folder"])
def test_asleep(tmp_path: Path, to: str) -> None:
    near, far = made("plain", "none", "all"), made("plain", "all", "all")
    for optimizer in (near, far):
        train(optimizer, 2)
    assert far.windows is not None and far.windows._windows[0].memory is not None
    far.sleep("host" if to == "host" else tmp_path)
    assert far.windows._windows[0].memory is None
    with pytest.raises(ConfigError, match="asleep"):
        train(far, 1)
    far.wake()
    for optimizer in (near, far):
        train(optimizer, 2, first=2)
    assert same(near, far)


def test_a_step_that_fails_leaves_no_window_open() -> None:
    near, far = made("plain", "none"), made("plain", "momentum")
    for optimizer in (near, far):
        train(optimizer, 2)
        optimizer.param_groups[0]["lr"] = math.nan
        with pytest.raises(ConfigError, match="lr nan"):
            optimizer.step()
        train(optimizer, 2, first=2)
    assert same(near, far)


def test_cuda_graphs_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="--muon-offload momentum state comes from the host and goes back in each step"
    ):
        StepGraph(made("plain", "momentum"))


def test_copies_are_of_contiguous_memory() -> None:
    weight = torch.arange(6 * 8 * 4).view(6, 8, 4)
    for view, count in ((weight[::2], 3), (weight[:, 2:4], 6), (weight, 1), (weight.view(2, 3, 8, 4)[:, :, 2:5], 6)):
        near = torch.empty(view.shape, dtype=view.dtype)
        pieces = list(_pieces(near, view))
        assert len(pieces) == count and all(far.is_contiguous() for _, far in pieces)
        for target, source in pieces:
            target.copy_(source)
        assert torch.equal(near, view)


def test_scalar_rows_of_many_weights_come_in_turn() -> None:
    params = parameters([ROWS] * 12)
    optimizer = Muon(params, chunk_mb=CHUNK_MB, offload="momentum")
    train(optimizer, 2)
    assert optimizer.windows is not None
    assert optimizer.windows.counters.largest <= optimizer.windows.bound + 16 * windows._ALIGNED
