"""State on the host, on a fake GPU: what is on the device, and the order of copies, events and kernels."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from megatron_muon import Muon, state_bytes
from megatron_muon.optimizers.windows import Windows
from tests.fake_cuda.cases import EVERYTHING, weights
from tests.fake_cuda.streams import Operation, streams
from tests.fake_cuda.world import COMPARISON, FIRST_STEP, Allowed, World

SIDE = 64
MATRIX = 4 * SIDE * SIDE
ON_HOST = (
    Allowed("megatron_muon/optimizers/windows.py:step", "whoever reads state on the host finds what the step left"),
)
PLACED = (Allowed("megatron_muon/optimizers/windows.py:to_host", "state is new"),)

KEPT: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "momentum": (torch.float32, {}),
    "all": (torch.bfloat16, {"master": "remainder"}),
}


def is_in(each: Operation) -> bool:
    return each.stream == 1 and "copy_" in each.name and each.memory[0][0] == "cuda"


def is_out(each: Operation) -> bool:
    return each.stream == 2 and "copy_" in each.name and each.memory[0][0] == "cpu"


@pytest.mark.parametrize("offload", KEPT)
def test_copies_go_on_beside_the_products(offload: str) -> None:
    """Nothing is touched in no order; a part comes in while the products of the chunk before it run."""
    dtype, options = KEPT[offload]
    with World() as world:
        params = [world.parameter(SIDE, SIDE, dtype=dtype) for _ in range(4)]
        muon = Muon(params, chunk_mb=MATRIX / 2**20, offload=offload, **options)
        with streams(world) as found:
            with world.refusing((*FIRST_STEP, *ON_HOST, *PLACED)):
                muon.step()
            first = len(found.operations)
            waits = [stream.host_waits for stream in found.all]
            with world.refusing((*COMPARISON, *ON_HOST)):
                muon.step()
            assert [stream.host_waits for stream in found.all[1:3]] == [number + 1 for number in waits[1:3]]
            check_overlap(found.operations[first:], planes=3 if offload == "all" else 1)
        assert isinstance(muon.windows, Windows)
        # The windows are all of it that is on the device.
        sizes = [0 if each.memory is None else each.memory.numel() for each in muon.windows._windows]
        assert len(sizes) == 2 and max(sizes) == muon.windows.counters.largest == MATRIX
        counted = state_bytes(muon)
        assert counted.elsewhere["momentum_buffer"] == 4 * MATRIX
        assert counted.on_device.keys() == {"momentum_peak"}
        assert all(state["momentum_buffer"].device.type == "cpu" for state in muon.state.values())
        before = world.watch.live
        muon.sleep()
        assert before - world.watch.live == sum(sizes) + sum(counted.on_device.values())


def check_overlap(operations: list[Operation], planes: int) -> None:
    """Of four chunks: what comes in for one knows of no product of the one before, only that a window is free."""
    ins, outs = [each for each in operations if is_in(each)], [each for each in operations if is_out(each)]
    assert len(ins) == len(outs) == 4 * planes
    products = [each for each in operations if each.stream == 0 and "mm" in each.name]
    firsts = [products[len(products) // 4 * chunk].known[0] for chunk in range(4)]
    for chunk in range(1, 4):
        assert ins[planes * chunk].known[0] < firsts[chunk - 1]
    # What the step has changed of the momentum goes out while the products of its chunk run.
    assert [each.known[0] < first for each, first in zip(outs[::planes], firsts, strict=True)] == [True] * 4


def test_all_kinds_of_weights() -> None:
    """Parts of weights on two ranks, rows under Adam, variants that read momentum again: no two streams at odds."""
    for options in ({"variant": "namo"}, {"weight_decay_method": "l2", "nesterov": False}):
        with World(rank=1, ranks=2) as world:
            params = weights(world, EVERYTHING)
            muon = Muon(
                params,
                tp_group=world.own_group([(0, 1)]),
                chunk_mb=2000 / 2**20,
                offload="momentum",
                **options,
            )
            with streams(world), world.refusing((*FIRST_STEP, *ON_HOST, *PLACED)):
                muon.step()
                muon.step()
            assert muon.windows is not None and muon.windows.counters.parts > len(params)


@pytest.mark.parametrize("changes", [{}, {"momentum_dtype": "int8"}])
@pytest.mark.parametrize("offload", KEPT)
def test_what_is_loaded_never_comes_to_the_device_as_a_whole(offload: str, changes: dict[str, Any]) -> None:
    """Momentum in another form is converted, and goes to the host weight by weight."""
    dtype, options = KEPT[offload]
    with World() as world:
        params = [world.parameter(SIDE, SIDE, dtype=dtype) for _ in range(8)]
        muon = Muon(params, offload=offload, **options)
        muon.step()
        other = Muon(params, offload=offload, **options, **changes)
        assert muon.windows is not None
        muon.windows.forget()
        before = world.watch.peak = world.watch.live
        other.load_state_dict(muon.state_dict())
        assert world.watch.peak - before <= (3 * MATRIX if changes else 0)  # of eight
        counted = state_bytes(other)
        assert counted.on_device.keys() == {"momentum_peak"}
        names = {"momentum_buffer", *(each for each in ("momentum_scale",) if changes)}
        assert counted.elsewhere.keys() == names | ({"master_remainder", "master_ties"} if offload == "all" else set())


def test_what_an_error_leaves_in_a_window_is_waited_for() -> None:
    with World() as world:
        windows, far = Windows(("momentum_buffer",), 1.0), [torch.empty(SIDE)]
        with streams(world), windows.step(torch.device("cuda")):
            for _ in range(4):  # the last one is in the second one's memory
                with contextlib.suppress(ArithmeticError), windows.opened(far, writes=False) as near:
                    near[0].mul_(2.0)
                    raise ArithmeticError
